"""Train a GPT on a prepared data set: from scratch, from a pretrained model, or from where a run stopped.

python train.py config/train_shakespeare_char.py --batch_size=32
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import plaingpt.startup

import dataclasses
import functools
import gc
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing import errors

from model import GPT
from plaingpt.batches import EvalBatches, TrainBatches, check_length, derive_seed
from plaingpt.budget import Deadline, choose_settings, extend_run
from plaingpt.console import note, run_script
from plaingpt.distributed import Distributed, StopSignal, connect
from plaingpt.evaluate import bits_per_byte, describe_loss, evaluate, sample_text
from plaingpt.files import set_aside
from plaingpt.graphs import Captured, graphs_work
from plaingpt.metrics import Metrics, Stopwatch, log_line
from plaingpt.optimizer import SkippedSteps, apply_gradients, clear_gradients, make_optimizers
from plaingpt.parallel import set_gradient_sync, wrap
from plaingpt.plan import announce, check_memory, dry_run, step_seconds
from plaingpt.run import (
    check_default,
    check_out_dir,
    check_same,
    check_shared,
    find_checkpoint,
    finish_run,
    initial_model,
    new_shape,
    resumed_settings,
    write_recipe,
)
from plaingpt.run_state import RunState, Saver, is_below, load_optimizers
from plaingpt.settings import load_settings
from plaingpt.tokens import DataSet, Tokens, open_data_set
from plaingpt.train_config import TrainConfig


class Run:
    """Everything that a training step needs. All ranks."""

    def __init__(self, config: TrainConfig, tokens: Tokens, raw_model: GPT, dist: Distributed):
        self.config, self.raw_model, self.dist = config, raw_model, dist
        sequences = config.gradient_accumulation_steps * config.batch_size
        self.batches = TrainBatches(tokens, config.block_size, sequences, config.seed)
        # the same model, replicated or sharded, and compiled
        self.model = wrap(raw_model, dist, config.sharding, config.recompute, config.compiles_on(dist.device.type))
        betas = (config.beta1, config.beta2)
        self.optimizers = make_optimizers(
            raw_model, config.optimizer, config.peak_lr, config.weight_decay, betas, config.momentum, dist.dtype
        )
        self.scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
        self.parameters = list(self.model.parameters())
        self.micro_step = functools.partial(forward_backward, self.model, dist, self.scaler)
        self.update = functools.partial(
            apply_gradients, self.parameters, self.optimizers, self.scaler, grad_clip=config.grad_clip
        )
        self.gradients = []  # tensors to which CUDA graphs add gradients; empty without graphs
        if uses_graphs(config, dist, raw_model):
            self.micro_step = Captured(self.micro_step)
            self.update = Captured(self.update, pool_of=self.micro_step)
            self.gradients = [torch.zeros_like(p) for p in self.parameters]


def uses_graphs(config: TrainConfig, dist: Distributed, model: GPT) -> bool:
    """Whether to run micro-steps and updates as CUDA graphs. That pays where launching the kernels from Python takes
    longer than running them; larger micro-steps would only need more memory. Recomputation saves random states, which
    cannot be captured.
    """
    alone = dist.device.type == "cuda" and dist.world_size == 1 and not config.recompute
    small = config.batch_size * config.block_size * model.flop_per_token() < 4e12
    return alone and small and graphs_work()


def forward_backward(
    model: nn.Module, dist: Distributed, scaler: torch.amp.GradScaler, inputs: Tensor, targets: Tensor, count: Tensor
) -> Tensor:
    """Accumulate the gradients of one of `count` micro-batches. Returns its contribution to the step's mean loss."""
    with dist.autocast():
        _, loss = model(inputs, targets, need_logits=False)
    loss = loss / count
    scaler.scale(loss).backward()
    return loss.detach()


def train_step(
    run: Run, step: int, stop: StopSignal | None = None, micro_steps: int | None = None
) -> tuple[Tensor, Tensor] | None:
    """One training step. Returns the mean loss of this rank's micro-batches and the gradients' norm, on the device.

    If `stop` is set before a micro-step, drops the gradients and returns None. micro_steps: how many to do in each
    process instead of the configured number, for timing. All ranks.
    """
    config, dist = run.config, run.dist
    micro_steps = micro_steps or dist.per_process(config.gradient_accumulation_steps)
    # `Captured` makes a graph for each number among its arguments, so `count` and the learning rate are tensors.
    total = torch.zeros((), device=dist.device)
    count = torch.full((), float(micro_steps), device=dist.device)
    if run.gradients:
        torch._foreach_zero_(run.gradients)
        for parameter, gradient in zip(run.parameters, run.gradients, strict=True):
            parameter.grad = gradient
    for i in range(micro_steps):
        if stop and dist.max(stop.number):
            clear_gradients(run.parameters)
            return None
        index = i * dist.world_size + dist.rank  # so any number of processes sees the same sequences in a step
        inputs, targets = dist.to_device(*run.batches.micro_batch(step, index, config.batch_size))
        if config.dropout:  # the only randomness in a step: with a seed for each micro-batch, no state has to be saved
            torch.manual_seed(derive_seed(config.seed, step, index))
        set_gradient_sync(run.model, last=i == micro_steps - 1)
        total += run.micro_step(inputs, targets, count)
    lr = config.learning_rate_at(step)
    return total, run.update(torch.full((), lr, device=dist.device) if run.gradients else lr)


def train(run: Run, state: RunState, data: DataSet, eval_batches: EvalBatches) -> int:
    """The training loop: evaluate, save, step, log. All ranks. Returns the exit status."""
    config, dist, start, out_dir = run.config, run.dist, state.step, Path(run.config.out_dir)
    metrics = Metrics(out_dir, dist.is_main, resumed_from=start or None)
    # W&B gets the derived values. A checkpoint keeps None, so that a resumed run derives them from its own settings.
    metrics.track(state.settings | {"lr_decay_iters": config.decay_end, "min_lr": config.final_lr})
    saver = Saver(out_dir, state, run.raw_model, run.optimizers, data.tokenizer, dist)
    watch, skipped = Stopwatch(state.seconds, start), SkippedSteps(state.skipped, dist.device)
    deadline = Deadline(config, state, dist, watch, len(data.train))
    if config.minutes and not start and dist.is_main:
        write_recipe(config)
    stop, stopping = StopSignal(), 0  # stopping: the number of a signal that some rank received; equal on all ranks
    paused_at = None  # the step of the last evaluation or save: if a stop follows at once, nothing new has to be saved
    gc.disable()  # a step leaves no garbage, and searching for it causes pauses
    gc.freeze()  # the collections below skip everything that exists now
    while True:
        step = state.step
        config = run.config = deadline.corrected(config)  # changes under --minutes only
        due = step == config.max_iters or step % config.eval_interval == 0
        evaluating = due and step != state.evaluated_at
        keeping = step > start and config.keep_every > 0 and step % config.keep_every == 0
        if (evaluating or keeping or stopping) and step != paused_at:
            paused_at, val_loss = step, None
            dist.synchronize()
            watch.pause()
            gc.collect()
            state.skipped = skipped.total(step)
            if evaluating and (val_loss := evaluate(run.model, eval_batches, dist, stop)) is not None:
                state.evaluated_at = step
                bpb = bits_per_byte(val_loss, data.val)
                metrics.write(step=step, tokens=step * config.tokens_per_step, val_loss=val_loss, val_bpb=bpb)
                note(f"step {step}: {describe_loss(val_loss, data)}")
            if step == 0:  # the model that training begins with is not saved
                state.initial_val_loss = val_loss if is_below(val_loss, None) else None  # None: not finite
            elif step > start or val_loss is not None:
                state.seconds, state.scaler = watch.seconds, run.scaler.state_dict()
                saver.save(val_loss, keeping)  # also counts evaluations_since_lowest
            metrics.draw()
            if val_loss is not None and config.sample_tokens:
                text = sample_text(run.raw_model, data, config.sample_tokens, dist, seed=step)
                note("sample:\n  " + text.replace("\n", "\n  "))
        if step >= config.max_iters or stopping or 0 < config.patience <= state.evaluations_since_lowest:
            break

        watch.go()
        if update := train_step(run, step, stop):
            state.step += 1
            loss, norm = update
            skipped.count(norm)
            if state.step % config.log_interval == 0 or state.step == config.max_iters:
                log(run, state.step, loss, norm, skipped, watch, metrics)
        else:
            stopping = dist.max(stop.number)

    metrics.draw(at_once=True)  # during the last save
    problem = saver.wait()
    stopping = dist.max(stop.number)  # before W&B's uploads: only main waits for them
    metrics.close()
    return finish_run(config, state, start, saver.best, stopping, problem)


def log(
    run: Run, step: int, loss: Tensor, norm: Tensor, skipped: SkippedSteps, watch: Stopwatch, metrics: Metrics
) -> None:
    """Record and print a step. All ranks."""
    config, dist = run.config, run.dist
    train_loss = dist.sum(loss.item() / dist.world_size)  # waits for the device
    rate = watch.rate(step)
    speed = rate * config.tokens_per_step
    peak = dist.peak_flops
    record = dict(step=step, tokens=step * config.tokens_per_step, seconds=watch.seconds, train_loss=train_loss)
    record |= dict(lr=config.learning_rate_at(step - 1), grad_norm=norm.item(), tokens_per_second=speed)
    record |= dict(mfu=peak and speed * run.raw_model.flop_per_token() / peak, skipped=skipped.total(step) or None)
    metrics.write(**record)
    note(log_line(record, config.max_iters, seconds_left=(config.max_iters - step) / rate))


def tokens_per_second(data: DataSet, dist: Distributed, config: TrainConfig, seconds: float) -> float:
    """Training speed with the settings of `config`, not compiled. All ranks. seconds: as `limit` in `step_seconds`."""
    config = dataclasses.replace(config, compile=False)
    shape = new_shape(config, data)
    check_length(data.val, config.block_size, "val")
    check_memory(config, dist, shape)
    run = Run(config, data.train, GPT(shape), dist)
    warmups = 2 if run.gradients else 1  # the first one allocates; the second one captures a graph
    per_step = step_seconds(config, dist, lambda n: train_step(run, 0, micro_steps=n), warmups, limit=seconds)
    return config.tokens_per_step / dist.sum(per_step / dist.world_size)


def start_run(
    config: TrainConfig, given: dict[str, str], state: RunState, checkpoint: Path | None, dist: Distributed
) -> int:
    """Open the data and the model, then train. All ranks. Returns the exit status.

    given: the file or flag of each setting that was given; on resume, only flags. checkpoint: the directory that the
    run is resumed from, if it is.
    """
    choosing = config.minutes and not checkpoint and not config.eval_only
    check_shared(config, dist, state.step)
    data = open_data_set(Path(config.data_dir) / config.dataset, check=dist.is_main)
    check_same(config, data, dist)
    if checkpoint and state.data != data.digest:
        note(f"the data set {config.dataset} is not the one that {checkpoint} was trained on")
    if dist.is_main and not (config.eval_only or config.dry_run):
        check_out_dir(config, checkpoint, state)
    if choosing:
        config = choose_settings(config, given, data, dist, functools.partial(tokens_per_second, data, dist))
    if not config.eval_only:
        dist.per_process(config.gradient_accumulation_steps)  # UserError before the model is read
    raw_model, config = initial_model(config, given, data, checkpoint, dist)
    # Saved as numbers, these two stay the same if the run is extended. `min_lr` and `lr_decay_iters` may remain None:
    # then the decay ends at the new last step.
    config = dataclasses.replace(config, learning_rate=config.peak_lr, warmup_iters=config.warmup_steps)
    sequences = state.eval_sequences
    if sequences is None or "eval_iters" in given:
        sequences = config.eval_iters * config.batch_size
    state.set_evaluation(data.digest, sequences, Path(config.out_dir))
    check_shared(config, dist, state.evaluated_at, state.lowest_val_loss)  # read from `best`
    eval_batches = EvalBatches(data.val, config.block_size, config.batch_size, sequences)
    if config.eval_only:
        model = wrap(raw_model, dist, config.sharding, compiled=config.compiles_on(dist.device.type))
        note(describe_loss(evaluate(model, eval_batches, dist), data))
        return 0
    run = Run(config, data.train, raw_model, dist)
    announce(config, dist, raw_model, len(data.train))
    if state.step < config.max_iters:
        config.check_schedule()
    elif state.evaluated_at == state.step:
        longer = "to train longer: --init_from=resume with --minutes or a higher --max_iters"
        note(f"the run is complete at step {state.step}; {longer}; to start again: --init_from=scratch")
    if config.dry_run:
        dry_run(config, dist, lambda n: train_step(run, 0, micro_steps=n), config.max_iters - state.step)
        return 0

    if checkpoint:
        load_optimizers(checkpoint, state.scaler, raw_model, run.optimizers, run.scaler)
    elif dist.is_main:
        set_aside(Path(config.out_dir))
    state.settings = dataclasses.asdict(config)
    return train(run, state, data, eval_batches)


def main() -> int:
    config, given = load_settings(TrainConfig)
    state, checkpoint = find_checkpoint(config)
    if checkpoint:
        if config.minutes and config.init_from == "auto":  # perhaps restarted after a failure
            note("--minutes is ignored: the run keeps its number of steps")
            config = dataclasses.replace(config, minutes=None)
        elif config.minutes and not config.eval_only:
            config, given = extend_run(config, given, state)
        config, given = resumed_settings(config, given, state, checkpoint)
    dist = connect(config.device, config.dtype, config.timeout)
    if not checkpoint:
        check_default(config, given, dist.device.type)
    status = start_run(config, given, state, checkpoint, dist)
    dist.close()  # not after an error, when it could wait forever for the other processes
    return status


if __name__ == "__main__":
    # record: so that torchrun reports the error that came first, on whatever rank and node
    run_script(errors.record(main), less_memory="model, a smaller --batch_size or --recompute")
