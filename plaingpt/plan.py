"""What a run needs, before it starts: parameters, memory, tokens, and hours.

python train.py RECIPE --dry_run=True
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from model import GPT, GPTConfig
from plaingpt.console import UserError, counted, millions, note
from plaingpt.distributed import Distributed
from plaingpt.optimizer import MATRICES_AT_ONCE


def memory(
    batch_size: int, optimizer: str, recompute: bool, compiled: bool, shards: int, c: GPTConfig
) -> dict[str, float]:
    """Bytes, by purpose, that torch reserves in each of `shards` processes to train a model, in 16-bit precision.

    The constants match runs of 124M to 1.5B within 10% (bench/results/2026-11-27-gpu-simulated.md). Per token, each
    block stores 34 C bytes for the backward pass (36 if not compiled): two LayerNorm inputs in float32, the rest in 16
    bits; dropout masks add 2 C. With recomputation, each block stores 4 C bytes, and one block at a time all of it. A
    logit takes 2 bytes; if not compiled, 4, and the loss needs float32 copies of 2**26 logits at a time.
    """
    matrices = 12 * c.n_embd**2  # parameters of a block
    of_block = matrices + (13 if c.bias else 2) * c.n_embd
    embeddings = (c.padded_vocab_size + c.block_size + (2 if c.bias else 1)) * c.n_embd  # and ln_f
    parameters, of_muon = embeddings + c.n_layer * of_block, c.n_layer * matrices * (optimizer == "muon")
    parts = {
        "weights": 4 * parameters / shards,
        "gradients": 4 * parameters / shards,
        "optimizer": (8 * (parameters - of_muon) + 4 * of_muon) / shards,  # AdamW has two moments, Muon one
    }
    tokens, logits = batch_size * c.block_size, batch_size * c.block_size * c.padded_vocab_size
    block = tokens * c.n_embd * ((34 if compiled else 36) + 2 * (c.dropout > 0))
    head = tokens * c.n_embd * 12 + (2 * logits if compiled else 4 * logits + 12 * min(logits, 2**26))
    inputs = tokens * c.n_embd * 4
    activations = inputs * c.n_layer + max(block, head) if recompute else block * c.n_layer + head
    if shards > 1:  # embeddings and their gradient in float32, and two blocks: the one at work and the next
        copies = 8 * embeddings + 4 * of_block
    else:
        copies = 2 * (embeddings + of_block if recompute and compiled else parameters)
    muon = 22 * min(MATRICES_AT_ONCE, 4 * c.n_embd**2 * c.n_layer) / shards if optimizer == "muon" else 0
    parts |= {"16-bit copies": copies, "activations": max(activations, muon - copies)}
    # Gradients are allocated where the logits were, which then need new space: the allocator does not move blocks.
    unused = (0.08 if recompute else 0.04) * sum(parts.values()) + (1.4 * logits if compiled else 0)
    return parts | {"unused by the allocator": unused}


def check_memory(dist: Distributed, cost: Callable[[GPTConfig], dict[str, float]], config: GPTConfig) -> None:
    """UserError if training needs more memory than is free. Call it before the model is created: otherwise the kernel
    kills the process. All ranks.

    cost: `memory` of a model. Only half of the activations count: a run that fits must not be refused.
    """
    parts, free = cost(config), free_memory(dist)
    needed = sum(parts[name] for name in ("weights", "gradients", "optimizer")) + parts["activations"] / 2
    if free is None:
        return
    free = -dist.max(-int(free))[0]  # the least of all ranks, so that they agree
    if needed > free:
        more = ", or more GPUs with --sharding=fsdp" if dist.device.type == "cuda" else ""
        raise UserError(
            f"{counted(config.n_layer, 'layer')} of width {config.n_embd} need at least {gb(needed)} to train, and "
            f"{gb(free)} is free; try a smaller model, a smaller --batch_size or --recompute=True{more}"
        )


def free_memory(dist: Distributed) -> float | None:
    """Bytes that this process can still allocate on its device; None if unknown."""
    if dist.device.type == "cuda":  # what torch keeps of freed memory is free, too
        cached = torch.cuda.memory_reserved(dist.device) - torch.cuda.memory_allocated(dist.device)
        return torch.cuda.mem_get_info(dist.device)[0] + cached
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        size = {line[0]: 1024 * int(line[1]) for line in lines}
        free = size["MemAvailable:"] + size["SwapFree:"]
        limit = Path("/sys/fs/cgroup/memory.max")
        if limit.exists() and (text := limit.read_text().strip()).isdecimal():  # a container's
            stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            free = min(free, int(text) - int(stat["anon"]))
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        return None
    return free / dist.local_world_size


def announce(model: GPT, dist: Distributed, max_iters: int, tokens_per_step: int, epoch_tokens: int) -> None:
    """Print the run in one line."""
    precision, epochs = str(dist.dtype).removeprefix("torch."), max_iters * tokens_per_step / epoch_tokens
    note(
        f"{millions(model.num_parameters())} parameters, {dist.world_size} x {dist.device.type} in {precision}; "
        f"{counted(max_iters, 'step')} of {counted(tokens_per_step, 'token')}, "
        f"{epochs:{'.1f' if epochs >= 0.1 else '.2g'}} epochs of {epoch_tokens:,} tokens"
    )


def dry_run(
    dist: Distributed,
    step: Callable[[int], object],
    micro_steps: int,
    tokens_per_step: int,
    max_iters: int,
    parts: dict[str, float],
) -> None:
    """Print memory, speed and hours of a run from a few timed steps. All ranks.

    step: runs a training step with that many micro-steps per process. micro_steps: those of a real step.
    parts: what `memory` predicts.
    """
    one, two = (_median_seconds(dist, lambda n=n: step(n)) for n in (1, 2))
    seconds = one + (micro_steps - 1) * max(two - one, 0.0)
    if not dist.is_main:
        return
    if dist.device.type == "cuda" and dist.dtype != torch.float32:  # what `memory` predicts
        note(f"predicted memory per process: {', '.join(f'{name} {gb(size)}' for name, size in parts.items())}")
        note(f"in total {gb(sum(parts.values()))}")
    note(_measured_memory(dist))
    speed, span = tokens_per_step / seconds, tqdm.format_interval
    note(f"measured: {seconds:.3g} s per step, {speed:,.0f} tokens/s; {span(seconds * max_iters)} for the run")


def _median_seconds(dist: Distributed, run: Callable[[], object]) -> float:
    times, enough = [], False
    while not enough:
        dist.synchronize()
        started = time.perf_counter()
        run()
        dist.synchronize()
        times.append(time.perf_counter() - started)
        (enough,) = dist.max(len(times) == 4 or (len(times) > 1 and sum(times) > 10))
    return statistics.median(times[1:])  # the first one compiles and allocates


def _measured_memory(dist: Distributed) -> str:
    if dist.device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(dist.device), torch.cuda.max_memory_reserved(dist.device)
        return f"measured: peak {gb(peak)}, reserved {gb(reserved)}"
    try:
        import resource
    except ImportError:  # Windows has none
        return "not measured"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"measured: peak {gb(peak)} with Python and torch"


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.2f} MB"
