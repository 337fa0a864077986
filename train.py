"""Train a GPT on a prepared data set, from scratch, from a pretrained model, or on from where a run stopped.

python train.py config/train_shakespeare_char.py --batch_size=32
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import dataclasses
import functools
import gc
import itertools
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from plaingpt.batches import EvalBatches, TrainBatches, mix
from plaingpt.console import RunFailed, UserError, note, run_script
from plaingpt.distributed import Distributed, StopSignal, connect
from plaingpt.evaluate import bits_per_byte, describe_loss, evaluate, write_sample
from plaingpt.files import existing, set_aside
from plaingpt.metrics import Metrics, Progress, Stopwatch
from plaingpt.optimizer import SkippedUpdates, apply_gradients, make_optimizers, scheduled_learning_rate
from plaingpt.parallel import exchange_gradients, shard_count, wrap
from plaingpt.plan import announce, check_memory, dry_run, memory, warn_of_schedule
from plaingpt.resume import resumed_settings
from plaingpt.run_state import NEW_RUN, Saver, initial_model, load_optimizers, load_training
from plaingpt.settings import Decay, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, load_settings
from plaingpt.tokens import open_data_set

MAX_SKIPPED = 20  # updates in a row whose gradients were not finite: then the run ends
DERIVED = ("warmup_iters", "lr_decay_iters", "min_lr")  # settings that follow from others where they are not given


@dataclass(frozen=True)
class TrainConfig:
    out_dir: str = "out"
    """folder of the run: last/, best/, metrics.jsonl, loss.png"""
    eval_interval: PositiveInt = 2000
    """updates between evaluations; each is followed by a save"""
    eval_iters: NonNegativeInt = 200
    """size of an evaluation, in updates' worth of sequences, always the same ones; 0: the entire validation split"""
    patience: NonNegativeInt = 0
    """evaluations in a row without a lower loss after which the run ends; 0: any number"""
    keep_every: NonNegativeInt = 0
    """updates between checkpoints that are kept for good, out_dir/step-001000 and so on; 0: none"""
    eval_only: bool = False
    """evaluate once, then end; nothing is written"""
    dry_run: bool = False
    """tell memory, speed and hours from a few timed updates, then end; nothing is written"""
    log_interval: PositiveInt = 10
    """updates between lines of the log"""
    sample_tokens: NonNegativeInt = 48
    """tokens written by the model at each evaluation, for a look; 0: none"""
    init_from: str = "scratch"
    """scratch; resume: from out_dir/last; resume:step-001000; auto: resume or start; or a model: gpt2, a directory"""
    wandb_log: bool = False
    """also record the run in Weights & Biases"""
    wandb_project: str = "plaingpt"
    """its project there"""
    wandb_run_name: str | None = None
    """its name there"""
    tensorboard_log: bool = False
    """also write TensorBoard's files, to out_dir/tensorboard"""
    dataset: str = "openwebtext"
    """name of a prepared data set, a folder of data_dir"""
    data_dir: str = "data"
    """the folder of the data sets"""
    gradient_accumulation_steps: PositiveInt = 40
    """micro-steps of an update, over all processes: more processes never change the recipe"""
    batch_size: PositiveInt = 12
    """sequences of a micro-step"""
    block_size: PositiveInt = 1024
    """tokens of a sequence, and positions of the model"""
    n_layer: PositiveInt = 12
    """blocks"""
    n_head: PositiveInt = 12
    """attention heads of a block"""
    n_embd: PositiveInt = 768
    """channels"""
    dropout: Fraction = 0.0
    """share of activations dropped: 0 is good for pretraining, 0.1 and more for small data sets"""
    bias: bool = False
    """biases in linear layers and LayerNorms, as GPT-2 has them; without is a little faster and as good"""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon for the matrices of the blocks and AdamW for the rest, or adamw for everything"""
    learning_rate: Positive = 6e-4
    """the peak"""
    max_iters: PositiveInt = 600000
    """updates, exactly"""
    weight_decay: NonNegative = 0.1
    """of matrices and embeddings"""
    momentum: Decay = 0.95
    """Muon's; a run of a few hundred updates ends lower with 0.85"""
    beta1: Decay = 0.9
    """AdamW's decay of the mean of the gradients"""
    beta2: Decay = 0.95
    """AdamW's decay of the mean of their squares"""
    grad_clip: NonNegative = 1.0
    """largest norm of the gradients; 0: any"""
    decay_lr: bool = True
    """lower the learning rate after the warm-up"""
    lr_schedule: Literal["linear", "cosine"] = "linear"
    """the way down from learning_rate to min_lr; nanoGPT's recipe is adamw with cosine"""
    warmup_iters: NonNegativeInt | None = None
    """updates until the peak (by default a twentieth of max_iters, at most 2000)"""
    lr_decay_iters: PositiveInt | None = None
    """update at which the learning rate arrives at min_lr (by default max_iters)"""
    min_lr: NonNegative | None = None
    """learning rate at the end (by default 0 of linear, a tenth of learning_rate of cosine)"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of matrix products; auto: bfloat16 where the processor has it (float32 on CUDA means tf32)"""
    compile: bool | None = None
    """torch.compile the forward and backward pass (by default on CUDA)"""
    sharding: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """ddp: every process holds the whole model; fsdp: its share of it; hybrid: fsdp in a node, ddp between nodes"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """precision in which processes exchange gradients: bfloat16 halves the traffic"""
    recompute: bool = False
    """compute each block again in the backward pass (activation checkpointing): a third more work, less memory"""
    timeout: Positive = 600
    """seconds that a process waits for another before the run ends"""
    seed: NonNegativeInt = 1337
    """of initialisation, data order and dropout"""

    RETIRED: ClassVar = {
        "backend": "not needed, the device decides (nccl on CUDA, gloo elsewhere)",
        "always_save_checkpoint": "not needed, out_dir/last is always saved and out_dir/best when it improves",
    }

    def __post_init__(self):
        lowest = self.learning_rate / 10 if self.lr_schedule == "cosine" else 0.0
        values = (min(2000, self.max_iters // 20), self.max_iters, lowest)
        for name, value in zip(DERIVED, values):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def learning_rate_at(self, step: int) -> float:
        between = (self.learning_rate, self.warmup_iters, self.lr_decay_iters, self.min_lr)
        return scheduled_learning_rate(step, *between, self.lr_schedule if self.decay_lr else "constant")


def train_step(
    model: nn.Module, optimizers: list, scaler, batches: TrainBatches, step: int, config: TrainConfig, dist: Distributed
) -> tuple[Tensor, Tensor]:
    """One update. Returns the mean loss of this rank's micro-batches and the norm of the gradients, on the device."""
    micro_steps = dist.per_process(config.gradient_accumulation_steps)
    total = torch.zeros((), device=dist.device)
    for i in range(micro_steps):
        index = i * dist.world_size + dist.rank  # rank by rank, so that any number of processes sees the same update
        inputs, targets = dist.to_device(*batches.micro_batch(step, index, config.batch_size))
        torch.manual_seed(mix(config.seed, step, index))  # dropout: nothing of the generators needs saving
        exchange_gradients(model, last=i == micro_steps - 1)
        with dist.autocast():
            _, loss = model(inputs, targets, need_logits=False)
        scaler.scale(loss / micro_steps).backward()
        total += loss.detach() / micro_steps
    return total, apply_gradients(model, optimizers, scaler, config.learning_rate_at(step), config.grad_clip)


def main() -> int:
    config, given = load_settings(TrainConfig)
    how, _, name = config.init_from.partition(":")
    checkpoint, training = Path(config.out_dir) / (name or "last"), None
    if how == "resume" or (how == "auto" and existing(checkpoint)):
        training = load_training(checkpoint)
        config = resumed_settings(config, given, training)
    dist = connect(config.device, config.dtype, config.timeout)
    status = run(config, given, training, dist)
    dist.close()  # not after an error: it might wait for processes that still compute
    return status


def run(config: TrainConfig, given: dict[str, str], training: dict | None, dist: Distributed) -> int:
    """From the data to the last save, on every rank. training: what a checkpoint says. Returns the exit status."""
    dist.per_process(config.gradient_accumulation_steps)  # or refuse, before anything is read
    data = open_data_set(Path(config.data_dir) / config.dataset, check=dist.is_main)
    if training and training["data"] != data.digest:
        note(f"the data set {config.dataset} is not the one that {training['directory']} was trained on")
    compiled = config.compile if config.compile is not None else dist.device.type == "cuda"
    shards = shard_count(dist, config.sharding)
    cost = functools.partial(memory, config.batch_size, config.optimizer, config.recompute, compiled, shards)
    check = (lambda shape: None) if config.eval_only else (lambda shape: check_memory(shape, dist, cost))
    raw_model, config = initial_model(config, given, data, training, check)
    update_tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    train_batches = TrainBatches(data.train, config.block_size, update_tokens // config.block_size, config.seed)
    eval_batches = EvalBatches(
        data.val, config.block_size, config.batch_size, config.eval_iters * update_tokens // config.block_size
    )
    model = wrap(raw_model, dist, config.sharding, config.reduce_dtype, config.recompute, config.compile)
    if config.eval_only:
        note(describe_loss(evaluate(model, eval_batches, dist), data))
        return 0

    decays = ((config.beta1, config.beta2), config.momentum, dist.dtype)
    optimizers = make_optimizers(raw_model, config.optimizer, config.learning_rate, config.weight_decay, *decays)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    announce(raw_model, dist, config.max_iters, update_tokens, len(data.train))
    if config.decay_lr:
        schedule = (config.learning_rate, config.min_lr, config.warmup_iters, config.lr_decay_iters, config.max_iters)
        warn_of_schedule(*schedule)
    if config.dry_run:

        def update(micro_steps: int) -> None:
            short = dataclasses.replace(config, gradient_accumulation_steps=micro_steps * dist.world_size)
            train_step(model, optimizers, scaler, train_batches, 0, short, dist)

        micro_steps = dist.per_process(config.gradient_accumulation_steps)
        dry_run(raw_model, dist, update, micro_steps, update_tokens, config.max_iters, cost(raw_model))
        return 0

    out_dir, saved = Path(config.out_dir), training or NEW_RUN
    start, watch = saved["step"], Stopwatch(saved["seconds"])
    lowest, since_lowest = saved["best_val_loss"], saved["evaluations_since_best"]
    skipped = SkippedUpdates(saved["skipped"], dist.device)
    if not dist.all_equal(start):
        raise UserError(f"the processes found different checkpoints in {out_dir}: it has to be on a disk they share")
    if training:
        load_optimizers(training, raw_model, optimizers, scaler)
    elif dist.is_main:
        set_aside(out_dir)
    derived = [name for name in DERIVED if name not in given and name in saved.get("derived", DERIVED)]
    of_the_run = dict(settings=dataclasses.asdict(config), derived=derived, data=data.digest)
    metrics = Metrics(out_dir, dist.is_main, start if training else None)
    metrics.track(of_the_run["settings"])
    progress = Progress(start, config.max_iters, dist.is_main)
    saver = Saver(out_dir, raw_model, optimizers, data.tokenizer, dist, lowest, progress.tell)
    stop, stopping, failing = StopSignal(), 0, 0
    logged, logged_seconds = start, watch.seconds
    gc.disable()  # an update leaves nothing to collect; looking for it again and again costs pauses
    gc.freeze()  # and what is there stays: the collections below need not look through it
    for step in itertools.count(start):
        evaluating = step == 0 or (step > start and (step == config.max_iters or step % config.eval_interval == 0))
        keeping = step > start and config.keep_every > 0 and step % config.keep_every == 0
        pausing = evaluating or keeping or stopping
        if pausing:
            dist.synchronize()
            watch.pause()
            gc.collect()
            failing = skipped.in_a_row
        if failing >= MAX_SKIPPED:
            raise RunFailed(
                f"the gradients were not finite in {failing} updates in a row, seen after update {step}; "
                "no weights were touched: resume from the last save, or start anew, with a lower --learning_rate"
            )
        if evaluating:
            val_loss = evaluate(model, eval_batches, dist)
            val_bpb = bits_per_byte(val_loss, data.val)
            metrics.write(step=step, tokens=step * update_tokens, val_loss=val_loss, val_bpb=val_bpb)
            progress.tell(f"step {step}: {describe_loss(val_loss, data)}")
            if step:
                lowest, since_lowest = (val_loss, 0) if val_loss < lowest else (lowest, since_lowest + 1)
        if pausing and step > start:
            so_far = dict(step=step, seconds=watch.seconds, skipped=skipped.all, evaluations_since_best=since_lowest)
            metrics.draw()
            saver.save(so_far | of_the_run | {"scaler": scaler.state_dict()}, val_loss if evaluating else None, keeping)
        if evaluating and config.sample_tokens:
            text = write_sample(raw_model, data, config.sample_tokens, dist, seed=step)
            progress.tell(text, indent="  ")
            metrics.sample(step, text)
        if step >= config.max_iters or stopping or 0 < config.patience <= since_lowest:
            break

        watch.go()
        loss, norm = train_step(model, optimizers, scaler, train_batches, step, config, dist)
        skipped.count(norm)
        done = step + 1
        if done % config.log_interval == 0 or done == config.max_iters:
            (loss_sum,) = dist.sum(loss.item())  # a CPU-GPU sync point: only here
            updates_per_second = (done - logged) / (watch.seconds - logged_seconds)
            logged, logged_seconds = done, watch.seconds
            line = dict(step=done, tokens=done * update_tokens, seconds=watch.seconds, lr=config.learning_rate_at(step))
            line |= dict(train_loss=loss_sum / dist.world_size, grad_norm=norm.item(), skipped=skipped.all or None)
            line["tokens_per_second"] = updates_per_second * update_tokens
            if dist.peak_flops:
                line["mfu"] = line["tokens_per_second"] * raw_model.flop_per_token() / dist.peak_flops
            metrics.write(**line)
            progress.show(line, seconds_left=(config.max_iters - done) / updates_per_second)
            if spike := metrics.spike(line["train_loss"]):
                progress.tell(f"step {done}: {spike}")
        progress.advance()
        stopping, failing = dist.max(stop.number, skipped.in_a_row)

    progress.close()
    if problem := saver.wait():
        raise RunFailed(f"the last save failed: {problem}")
    metrics.close()
    if stopping:
        note(f"stopped by {signal.Signals(stopping).name} after update {step}, saved; go on with --init_from=resume")
        return 128 + stopping
    if step < config.max_iters:
        note(f"ended early, after update {step}: the lowest loss is still {lowest:.4f} (--patience={config.patience})")
    note(f"done: best, last, loss.png in {out_dir}; next: python sample.py --out_dir={shlex.quote(str(out_dir))}")
    return 0


if __name__ == "__main__":
    run_script(record(main))  # so that torchrun ends with the error that came first, on whatever rank and node
