"""Train a GPT on a prepared data set: from scratch, from a pretrained model, or from where a run stopped.

python train.py config/train_shakespeare_char.py --batch_size=32
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import plaingpt.startup

import dataclasses
import functools
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
from plaingpt.parallel import exchange_gradients, shard_count, wrap
from plaingpt.plan import announce, check_memory, dry_run, memory
from plaingpt.run import check_schedule, closing_lines, initial_model, resumed_settings
from plaingpt.run_state import RunState, Saver, load_optimizers, load_state
from plaingpt.settings import BelowOne, NonNegative, NonNegativeInt, PathName, Positive, PositiveInt, load_settings
from plaingpt.tokens import DataSet, open_data_set

DERIVED = ("warmup_iters", "lr_decay_iters", "min_lr")  # settings that are computed from others unless given


@dataclass(frozen=True)
class RunSettings:
    out_dir: PathName = "out"
    """directory for checkpoints (last/, best/), metrics.jsonl and loss.png"""
    dataset: str = "openwebtext"
    """prepared data set to train on, a directory in data_dir"""
    data_dir: PathName = "data"
    """directory of the prepared data sets"""
    init_from: PathName = "scratch"
    """scratch; resume (out_dir/last); resume:step-001000; auto (resume, else scratch); or a model: gpt2, a directory"""
    max_iters: PositiveInt = 600000
    """number of training steps"""
    batch_size: PositiveInt = 12
    """sequences per micro-step"""
    gradient_accumulation_steps: PositiveInt = 40
    """micro-steps per training step over all processes, so that adding GPUs does not change the recipe"""
    eval_interval: PositiveInt = 2000
    """steps between evaluations; each is followed by a checkpoint"""
    eval_iters: NonNegativeInt = 200
    """batches per evaluation, the same ones each time (0: the entire validation split)"""
    patience: NonNegativeInt = 0
    """stop after this many evaluations without improvement (0: never)"""
    keep_every: NonNegativeInt = 0
    """steps between permanent checkpoints, out_dir/step-001000 and so on (0: none)"""
    eval_only: bool = False
    """evaluate once and exit; nothing is written"""
    dry_run: bool = False
    """time a few steps, print memory, speed and hours, and exit; nothing is written"""
    seed: NonNegativeInt = 1337
    """random seed of initialization, data order and dropout"""


@dataclass(frozen=True)
class ModelSettings:
    n_layer: PositiveInt = 12
    """number of blocks"""
    n_head: PositiveInt = 12
    """attention heads per block"""
    n_embd: PositiveInt = 768
    """width of the model, in channels"""
    block_size: PositiveInt = 1024
    """context length, in tokens"""
    dropout: BelowOne = 0.0
    """dropout probability: 0 for pretraining, 0.1 or more for small data sets"""
    bias: bool = False
    """biases in linear layers and LayerNorms, as in GPT-2; without them it is slightly faster and just as good"""


@dataclass(frozen=True)
class OptimizationSettings:
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon (for the matrices of the blocks, AdamW for the rest) or adamw (for everything)"""
    learning_rate: Positive = 6e-4
    """peak learning rate"""
    lr_schedule: Literal["linear", "cosine"] = "linear"
    """shape of the decay from learning_rate to min_lr; nanoGPT uses cosine, with adamw"""
    decay_lr: bool = True
    """decay the learning rate after warmup (False: keep it constant)"""
    warmup_iters: NonNegativeInt | None = None
    """steps of linear warmup (None: max_iters / 20, at most 2000)"""
    lr_decay_iters: PositiveInt | None = None
    """step at which the learning rate reaches min_lr (None: max_iters)"""
    min_lr: NonNegative | None = None
    """final learning rate (None: 0 for linear, learning_rate / 10 for cosine)"""
    weight_decay: NonNegative = 0.1
    """weight decay of matrices and embeddings"""
    momentum: BelowOne = 0.95
    """Muon's momentum; 0.85 is better for runs of a few hundred steps"""
    beta1: BelowOne = 0.9
    """AdamW's decay rate of the gradient average"""
    beta2: BelowOne = 0.95
    """AdamW's decay rate of the squared-gradient average"""
    grad_clip: NonNegative = 1.0
    """maximum gradient norm (0: no clipping)"""


@dataclass(frozen=True)
class LoggingSettings:
    log_interval: PositiveInt = 10
    """steps between log lines"""
    sample_tokens: NonNegativeInt = 48
    """length of the sample printed at each evaluation, in tokens (0: no sample)"""
    wandb_log: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "plaingpt"
    """Weights & Biases project"""
    wandb_run_name: str | None = None
    """name of the Weights & Biases run (None: a random one)"""
    tensorboard_log: bool = False
    """write TensorBoard event files to out_dir/tensorboard"""


@dataclass(frozen=True)
class HardwareSettings:
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of matrix products (auto: bfloat16 if the hardware supports it; float32 on CUDA means TF32)"""
    compile: bool | None = None
    """compile the forward and backward pass with torch.compile (None: on CUDA)"""
    recompute: bool = False
    """activation checkpointing: less memory for a third more compute"""
    sharding: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """ddp: each process holds the full model; fsdp: one shard of it; hybrid: fsdp within a node, ddp across nodes"""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """precision of gradient communication; bfloat16 halves the traffic"""
    timeout: Positive = 600
    """seconds that a process waits for the others before the run fails"""


@dataclass(frozen=True)
class TrainConfig(RunSettings, ModelSettings, OptimizationSettings, LoggingSettings, HardwareSettings):
    SYNONYMS: ClassVar = {"lr": "learning_rate", "epochs": "max_iters", "steps": "max_iters", "resume": "init_from"}
    RETIRED: ClassVar = {
        "backend": "ignored: the device determines it (nccl on CUDA, gloo elsewhere)",
        "always_save_checkpoint": "ignored: out_dir/last is always saved, and out_dir/best at each improvement",
        "local_rank": "ignored; start processes with torchrun instead of python -m torch.distributed.launch",
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
    micro_steps = dist.per_process(config.gradient_accumulation_steps)
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
    update_tokens = config.gradient_accumulation_steps * config.batch_size * config.block_size
    train_batches = TrainBatches(data.train, config.block_size, update_tokens // config.block_size, config.seed)
    eval_batches = EvalBatches(data.val, config.block_size, config.batch_size, eval_sequences)
    model = wrap(raw_model, dist, config.sharding, config.reduce_dtype, config.recompute, config.compile)
    decays = ((config.beta1, config.beta2), config.momentum, dist.dtype)
    optimizers = make_optimizers(raw_model, config.optimizer, config.learning_rate, config.weight_decay, *decays)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    return Run(config, dist, data, raw_model, model, optimizers, scaler, train_batches, eval_batches, update_tokens)


def run(config: TrainConfig, given: dict[str, str], state: RunState, checkpoint: Path | None, dist: Distributed) -> int:
    """From the data to the last save. checkpoint: what the run is resumed from. All ranks. Returns the exit status."""
    dist.per_process(config.gradient_accumulation_steps)  # raises UserError before anything is read
    data = open_data_set(Path(config.data_dir) / config.dataset, check=dist.is_main)
    if checkpoint and state.data != data.digest:
        note(f"the data set {config.dataset} is not the one that {checkpoint} was trained on")
    compiled = dist.device.type == "cuda" if config.compile is None else config.compile
    shards = shard_count(dist, config.sharding)
    cost = functools.partial(memory, config.batch_size, config.optimizer, config.recompute, compiled, shards)
    check = (lambda shape: None) if config.eval_only else (lambda shape: check_memory(shape, dist, cost))
    raw_model, config = initial_model(config, given, data, checkpoint, check)
    if state.eval_sequences is None or "eval_iters" in given:
        state.eval_sequences = config.eval_iters * config.batch_size
    run = set_up(config, data, raw_model, state.eval_sequences, dist)
    if config.eval_only:
        note(describe_loss(evaluate(run.model, run.eval_batches, dist), data))
        return 0
    announce(raw_model, dist, config.max_iters, run.update_tokens, len(data.train))
    if state.step < config.max_iters:
        check_schedule(config)
    if config.dry_run:

        def update(micro_steps: int) -> None:
            short = dataclasses.replace(config, gradient_accumulation_steps=micro_steps * dist.world_size)
            train_step(dataclasses.replace(run, config=short), 0)

        micro_steps = dist.per_process(config.gradient_accumulation_steps)
        dry_run(raw_model, dist, update, micro_steps, run.update_tokens, config.max_iters, cost(raw_model))
        return 0

    out_dir = Path(config.out_dir)
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
