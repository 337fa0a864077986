"""Train a GPT on a prepared data set: from scratch, from a pretrained model, or from where a run stopped.

python train.py config/train_shakespeare_char.py --batch_size=32
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import dataclasses
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from model import GPT
from plaingpt.batches import EvalBatches, TrainBatches, mix
from plaingpt.console import UserError, note, run_script
from plaingpt.distributed import Distributed, StopSignal, connect
from plaingpt.evaluate import bits_per_byte, describe_loss, evaluate, write_sample
from plaingpt.files import existing, make_writable, set_aside
from plaingpt.metrics import Metrics, Progress, Stopwatch
from plaingpt.optimizer import (
    SkippedUpdates,
    apply_gradients,
    check_gradients,
    make_optimizers,
    scheduled_learning_rate,
)
from plaingpt.parallel import exchange_gradients, wrap
from plaingpt.plan import announce, rehearse, tokens_per_update
from plaingpt.run import check_schedule, closing_lines, initial_model, resumed_settings
from plaingpt.run_state import RunState, Saver, load_optimizers, load_state
from plaingpt.settings import Decay, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, load_settings
from plaingpt.tokens import DataSet, open_data_set

DERIVED = ("warmup_iters", "lr_decay_iters", "min_lr")  # settings that are computed from others unless given


@dataclass(frozen=True)
class TrainConfig:
    out_dir: str = "out"
    """folder of the run: last/, best/, metrics.jsonl, loss.png"""
    eval_interval: PositiveInt = 2000
    """updates between evaluations; each is followed by a save"""
    eval_iters: NonNegativeInt = 200
    """batches of an evaluation, always the same ones; 0: the whole validation split"""
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


@dataclass
class Run:
    """What the training loop works with."""

    config: TrainConfig
    dist: Distributed
    data: DataSet
    raw_model: GPT
    model: nn.Module  # the same, replicated or sharded, and compiled
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    train_batches: TrainBatches
    eval_batches: EvalBatches
    update_tokens: int


def train_step(run: Run, step: int, stop: StopSignal | None = None) -> tuple[Tensor, Tensor] | None:
    """One update. Returns the mean loss of this rank's micro-batches and the norm of the gradients, on the device.

    If `stop` asks for it between two micro-steps, returns None with nothing changed. All ranks.
    """
    config, dist = run.config, run.dist
    micro_steps = dist.share(config.gradient_accumulation_steps)
    total = torch.zeros((), device=dist.device)
    for i in range(micro_steps):
        if i and stop and dist.max(stop.number)[0]:
            run.model.zero_grad(set_to_none=True)
            return None
        index = i * dist.world_size + dist.rank  # so any number of processes sees the same sequences in an update
        inputs, targets = dist.to_device(*run.train_batches.micro_batch(step, index, config.batch_size))
        torch.manual_seed(mix(config.seed, step, index))  # dropout: no random state has to be saved
        exchange_gradients(run.model, last=i == micro_steps - 1)
        with dist.autocast():
            _, loss = run.model(inputs, targets, need_logits=False)
        run.scaler.scale(loss / micro_steps).backward()
        total += loss.detach() / micro_steps
    lr = config.learning_rate_at(step)
    return total, apply_gradients(run.model, run.optimizers, run.scaler, lr, config.grad_clip)


def train(run: Run, state: RunState, out_dir: Path) -> int:
    """The training loop: evaluate, save, update, log. All ranks. Returns the exit status."""
    config, dist, start = run.config, run.dist, state.step
    metrics = Metrics(out_dir, dist.is_main, until_step=start or None)
    metrics.track(state.settings)
    progress = Progress(start, config.max_iters, dist.is_main)
    saver = Saver(out_dir, state, run.raw_model, run.optimizers, run.data.tokenizer, dist, progress.tell)
    watch, skipped = Stopwatch(state.seconds, start), SkippedUpdates(state.skipped, dist.device)
    stop, stopping, paused_at = StopSignal(), 0, None
    gc.disable()  # an update leaves no garbage, and searching for it causes pauses
    gc.freeze()  # spares the collections below a search through all that exists by now
    while True:
        step = state.step
        evaluating = step == 0 or (step > start and (step == config.max_iters or step % config.eval_interval == 0))
        keeping = step > start and config.keep_every > 0 and step % config.keep_every == 0
        if (evaluating or keeping or stopping) and step != paused_at:
            paused_at, val_loss = step, None
            dist.synchronize()
            watch.pause()
            gc.collect()
            check_gradients(skipped.in_a_row, step)
            if evaluating:
                val_loss = evaluate(run.model, run.eval_batches, dist)
                bpb = bits_per_byte(val_loss, run.data.val)
                metrics.write(step=step, tokens=step * run.update_tokens, val_loss=val_loss, val_bpb=bpb)
                progress.tell(f"step {step}: {describe_loss(val_loss, run.data)}")
            if step > start:
                state.seconds, state.skipped, state.scaler = watch.seconds, skipped.all, run.scaler.state_dict()
                saver.save(val_loss, keeping)
            metrics.draw()
            if evaluating and config.sample_tokens:
                text = write_sample(run.raw_model, run.data, config.sample_tokens, dist, seed=step)
                progress.tell(text, indent="  ")
                metrics.sample(step, text)
        if step >= config.max_iters or stopping or 0 < config.patience <= state.evaluations_since_best:
            break

        watch.go()
        if update := train_step(run, step, stop):
            state.step += 1
            loss, norm = update
            skipped.count(norm)
            if state.step % config.log_interval == 0 or state.step == config.max_iters:
                (train_loss,) = dist.sum(loss.item() / dist.world_size)  # waits for the device: only here
                rate = watch.rate(state.step)
                record = dict(step=state.step, tokens=state.step * run.update_tokens, seconds=watch.seconds)
                record |= dict(train_loss=train_loss, lr=config.learning_rate_at(step), grad_norm=norm.item())
                record |= dict(skipped=skipped.all or None, tokens_per_second=rate * run.update_tokens)
                if dist.peak_flops:
                    record["mfu"] = record["tokens_per_second"] * run.raw_model.flop_per_token() / dist.peak_flops
                metrics.write(**record)
                progress.show(record, seconds_left=(config.max_iters - state.step) / rate)
                if spike := metrics.spike(train_loss):
                    progress.tell(f"step {state.step}: {spike}")
            progress.advance()
        stopping, failing = dist.max(stop.number, skipped.in_a_row)
        check_gradients(failing, state.step)

    progress.close()
    problem = saver.wait()
    metrics.close()
    return closing_lines(config, state, stopping, problem)


def set_up(config: TrainConfig, data: DataSet, raw_model: GPT, eval_sequences: int, dist: Distributed) -> Run:
    """Everything but the state of the run. All ranks."""
    update_tokens = tokens_per_update(config)
    train_batches = TrainBatches(data.train, config.block_size, update_tokens // config.block_size, config.seed)
    eval_batches = EvalBatches(data.val, config.block_size, config.batch_size, eval_sequences)
    model = wrap(raw_model, dist, config.sharding, config.reduce_dtype, config.recompute, config.compile)
    decays = ((config.beta1, config.beta2), config.momentum, dist.dtype)
    optimizers = make_optimizers(raw_model, config.optimizer, config.learning_rate, config.weight_decay, *decays)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    return Run(config, dist, data, raw_model, model, optimizers, scaler, train_batches, eval_batches, update_tokens)


def run(config: TrainConfig, given: dict[str, str], state: RunState, checkpoint: Path | None, dist: Distributed) -> int:
    """From the data to the last save. checkpoint: what the run is resumed from. All ranks. Returns the exit status."""
    dist.share(config.gradient_accumulation_steps)  # raises UserError before anything is read
    data = open_data_set(Path(config.data_dir) / config.dataset, check=dist.is_main)
    if checkpoint and state.data != data.digest:
        note(f"the data set {config.dataset} is not the one that {checkpoint} was trained on")
    raw_model, config = initial_model(config, given, data, checkpoint)
    if state.eval_sequences is None or "eval_iters" in given:
        state.eval_sequences = config.eval_iters * config.batch_size
    run = set_up(config, data, raw_model, state.eval_sequences, dist)
    if config.eval_only:
        note(describe_loss(evaluate(run.model, run.eval_batches, dist), data))
        return 0
    announce(raw_model, config, dist, len(data.train))
    if config.dry_run:
        rehearse(raw_model, config, dist, lambda c: train_step(dataclasses.replace(run, config=c), 0))
        return 0

    out_dir = Path(config.out_dir)
    if state.step < config.max_iters:
        check_schedule(config)
    if not dist.all_equal(state.step):
        raise UserError(f"the processes found different checkpoints in {out_dir}: all nodes need the same disk")
    if checkpoint:
        load_optimizers(checkpoint, state.scaler, raw_model, run.optimizers, run.scaler)
    elif dist.is_main:
        set_aside(out_dir)
    if dist.is_main:
        make_writable(out_dir)
    derived = state.derived if checkpoint else DERIVED
    state.derived = [name for name in derived if name not in given]
    state.settings, state.data = dataclasses.asdict(config), data.digest
    return train(run, state, out_dir)


def main() -> int:
    config, given = load_settings(TrainConfig)
    how, _, name = config.init_from.partition(":")
    directory = Path(config.out_dir) / (name or "last")
    state, checkpoint = RunState(), None
    if how == "resume" or (how == "auto" and existing(directory)):
        state, checkpoint = load_state(directory)
        config = resumed_settings(config, given, state, checkpoint)
    dist = connect(config.device, config.dtype, config.timeout)
    status = run(config, given, state, checkpoint, dist)
    dist.close()  # not after an error: it might wait for processes that still compute
    return status


if __name__ == "__main__":
    run_script(record(main))  # so that torchrun reports the error that came first, on whatever rank and node
