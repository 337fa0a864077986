"""Before a run: check its memory, describe it, and time a few steps.

python train.py RECIPE --dry_run=True
"""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from model import GPT, GPTConfig
from plaingpt.console import TooLittleMemory, counted, note
from plaingpt.cpu import return_freed_memory
from plaingpt.distributed import Distributed
from plaingpt.parallel import shard_count
from plaingpt.train_config import TrainConfig


def check_memory(config: TrainConfig, dist: Distributed, c: GPTConfig) -> None:
    """TooLittleMemory if training certainly needs more memory than is free. Call it before the model is created:
    otherwise the kernel kills the process. All ranks.

    Counts this process's weights, gradients and moments (12 bytes per parameter, or 16 with AdamW alone), and only the
    activations that are stored in any case, so that a run that fits is never refused.
    """
    if config.eval_only:
        return
    parameters = 12 * c.n_layer * c.n_embd**2 + c.padded_vocab_size * c.n_embd
    # Bytes, at least. A block stores 4 per channel if it is recomputed (its input in float32), otherwise 34 in bf16, of
    # which half are counted; a logit has 2, of which 1 is counted.
    per_token = c.n_layer * c.n_embd * (4 if config.recompute else 17) + c.padded_vocab_size
    state = (16 if config.optimizer == "adamw" else 12) * parameters / shard_count(dist, config.sharding)
    needed = state + config.batch_size * c.block_size * per_token
    free = -dist.max(-free_memory(dist))  # the least of all ranks, so that they agree
    if needed > free:
        more = ", or more GPUs with --sharding=fsdp" if dist.device.type == "cuda" else ""
        raise TooLittleMemory(
            f"a model of {counted(c.n_layer, 'layer')} and width {c.n_embd} needs at least {gb(needed)} to train, but "
            f"only {gb(free)} is free for each process; try a smaller model, a smaller --batch_size or "
            f"--recompute=True{more}"
        )


def free_memory(dist: Distributed) -> int:
    """Bytes that this process can still allocate on its device; more than any machine has if unknown."""
    if dist.world_size > 1:
        gc.collect()  # DDP's and FSDP's models are reference cycles; one may have been timed
    if dist.device.type == "cuda":  # what torch keeps of freed memory is free, too
        cached = torch.cuda.memory_reserved(dist.device) - torch.cuda.memory_allocated(dist.device)
        return torch.cuda.mem_get_info(dist.device)[0] + cached
    return_freed_memory()  # else what a timed model has freed would count as used
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        size = {line[0]: 1024 * int(line[1]) for line in lines}
        free = size["MemAvailable:"] + size["SwapFree:"]
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.exists() and (text := limit.read_text().strip()).isdecimal():  # a container's
            stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            free = min(free, int(text) - int(stat["anon"]))
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        free = 1 << 60
    return free // dist.local_world_size


def announce(config: TrainConfig, dist: Distributed, model: GPT, epoch_tokens: int) -> None:
    """Print the run in one line."""
    precision = str(dist.dtype).removeprefix("torch.")
    epochs = config.max_iters * config.tokens_per_step / epoch_tokens
    note(
        f"{model.num_parameters() / 1e6:,.2f}M parameters, {dist.world_size} x {dist.device.type} in {precision}; "
        f"{counted(config.max_iters, 'step')} of {counted(config.tokens_per_step, 'token')}, "
        f"{epochs:{',.1f' if epochs >= 0.1 else '.2g'}} epochs of {epoch_tokens:,} tokens"
    )


def dry_run(config: TrainConfig, dist: Distributed, step: Callable[[int], object], steps_left: int) -> None:
    """Time a few steps; print their speed, how long the remaining steps take, and on CUDA the memory. All ranks.

    step: runs a training step with that many micro-steps per process.
    """
    seconds = step_seconds(config, dist, step, warmups=2, limit=1)
    if not dist.is_main:
        return
    if dist.device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(dist.device), torch.cuda.max_memory_reserved(dist.device)
        note(f"measured: peak {gb(peak)}, reserved {gb(reserved)}")
    speed, run = f"{config.tokens_per_step / seconds:,.0f} tokens/s", tqdm.format_interval(seconds * steps_left)
    note(f"measured: {seconds:.3g} s per step, {speed}; estimated: {run} for {counted(steps_left, 'step')}")


def step_seconds(
    config: TrainConfig, dist: Distributed, step: Callable[[int], object], warmups: int, limit: float
) -> float:
    """Seconds of a training step, extrapolated from steps of one and of up to four micro-steps. All ranks.

    step: as for `dry_run`. warmups: steps that are not timed. limit: as for `median_seconds`.
    """
    for _ in range(warmups):
        step(1)
    one = median_seconds(dist, step, 1, limit)
    micro_steps = dist.per_process(config.gradient_accumulation_steps)
    few = min(4, micro_steps)
    if few == 1:
        return one
    per_micro_step = (median_seconds(dist, step, few, limit) - one) / (few - 1)
    return one + (micro_steps - 1) * max(per_micro_step, 0.0)


def median_seconds(dist: Distributed, step: Callable[[int], object], micro_steps: int, limit: float) -> float:
    """Median time of a step of that many micro-steps, repeated until `limit` seconds have passed. All ranks."""
    times = []
    while not dist.max(sum(times) > limit):
        dist.synchronize()
        started = time.perf_counter()
        step(micro_steps)
        dist.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.2f} MB"
