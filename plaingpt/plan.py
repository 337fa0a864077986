"""What a run takes, before it is begun: parameters, memory by part, tokens, and hours here or on other machines.

python train.py RECIPE --dry_run=True
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from model import GPT
from plaingpt.console import counted, millions, note
from plaingpt.distributed import PEAK_TFLOPS, Distributed
from plaingpt.parallel import shards

# Share of a card's half-precision limit at which GPT-2 124M has been trained, as published; to be replaced by our own.
# A100: nanoGPT, compiled, 0.85M tokens/s on eight. H100: llm.c, 468k tokens/s on one; H200: the same card for this.
MFU = {"A100": 0.29, "H100": 0.40, "H200": 0.40}
CARDS = {"A100": 80, "H100": 80, "H200": 141}  # GB of memory


def tokens_per_update(config: Any) -> int:
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


def memory(model: GPT, config: Any, shards: int = 1) -> dict[str, float]:
    """Bytes by part that a process needs to train `model`, which may be on torch's meta device; `shards`: of how many
    processes each holds an equal part of it (what is gathered for a block at a time is not counted).

    Activations are counted, not measured: what the backward pass keeps of a token in mixed precision, 36 C bytes a
    block (LayerNorms 8 and 4, attention 8, MLP 16) and 4 a logit (bf16, and its gradient), without dropout's masks.
    Where blocks are recomputed, 4 C of each are left, and 36 C of the one at work.
    """
    c = model.config
    parameters = sum(p.numel() for p in model.parameters())
    of_muon = sum(p.numel() for p in model.transformer.h.parameters() if p.dim() == 2) * (config.optimizer == "muon")
    blocks = 4 * c.n_layer + 36 if config.recompute else 36 * c.n_layer
    token = blocks * c.n_embd + 4 * c.padded_vocab_size
    return {
        "weights": 4 * parameters / shards,
        "their bf16 copies": 2 * parameters / shards,
        "gradients": 4 * parameters / shards,
        "optimizer": (8 * (parameters - of_muon) + 4 * of_muon) / shards,  # AdamW has two moments, Muon one
        "activations": config.batch_size * config.block_size * token,
    }


def hours(model: GPT, config: Any, card: str, cards: int) -> float:
    """Predicted from the FLOP of a token, the card's data sheet, and MFU; evaluations and saves not counted."""
    flop = config.max_iters * tokens_per_update(config) * model.flop_per_token()
    return flop / (PEAK_TFLOPS[card] * 1e12 * MFU[card] * cards) / 3600


def announce(model: GPT, config: Any, dist: Distributed, tokens: int) -> None:
    """Tell what the run is, in one line, and of its learning rate what is hardly meant; `tokens` are an epoch's."""
    precision, each = str(dist.dtype).removeprefix("torch."), tokens_per_update(config)
    epochs = config.max_iters * each / tokens
    note(
        f"{millions(model.num_parameters())} parameters, {dist.world_size} x {dist.device.type} in {precision}; "
        f"{counted(config.max_iters, 'update')} of {counted(each, 'token')}, "
        f"{epochs:{'.1f' if epochs >= 0.1 else '.2g'}} epochs of {tokens:,}"
    )
    if config.warmup_iters >= config.max_iters:
        note(
            f"warmup_iters={config.warmup_iters} is not below max_iters={config.max_iters}: the whole run is warm-up, "
            f"and the learning rate stays below {config.learning_rate:g}; give a lower --warmup_iters"
        )
    if config.decay_lr and config.min_lr > config.learning_rate:
        note(
            f"min_lr={config.min_lr:g} is above learning_rate={config.learning_rate:g}: after the warm-up "
            "the learning rate rises to it; give a lower --min_lr, or --decay_lr=False to keep it constant"
        )


def rehearse(model: GPT, config: Any, dist: Distributed, update: Callable[[Any], object]) -> None:
    """Tell what the run takes, from a few updates that are timed and forgotten. `update` makes one, of as many
    micro-steps as the settings that it is given say. All ranks.
    """
    micro_steps = dist.share(config.gradient_accumulation_steps)
    short = [replace(config, gradient_accumulation_steps=n * dist.world_size) for n in (1, 2)]
    one, two = (_median_seconds(dist, lambda settings=settings: update(settings)) for settings in short)
    seconds = one + (micro_steps - 1) * max(two - one, 0.0)  # a micro-step, and what an update costs beside them
    if not dist.is_main:
        return
    parts = memory(model, config, shards(dist, config.sharding))
    note(f"memory of a process, by count: {', '.join(f'{name} {gb(size)}' for name, size in parts.items())}")
    peak = _peak_memory(dist)
    note(f"in all {gb(sum(parts.values()))}" + (f"; this process had {gb(peak)} at its peak" if peak else ""))
    speed, span = tokens_per_update(config) / seconds, tqdm.format_interval
    note(f"here {seconds:.3g} s an update, {speed:,.0f} tokens/s: {span(seconds * config.max_iters)} in all")
    if hours(model, config, "A100", 1) > 0.1:  # less says nothing: small models do not fill a card
        there = [f"{n} x {card} {span(3600 * hours(model, config, card, n))}" for card in MFU for n in (1, 8)]
        note(f"predicted elsewhere: {', '.join(there)}")


def _median_seconds(dist: Distributed, run: Callable[[], object]) -> float:
    times = []
    for _ in range(4):
        dist.synchronize()
        started = time.perf_counter()
        run()
        dist.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])  # the first one compiles and allocates


def _peak_memory(dist: Distributed) -> int | None:
    if dist.device.type == "cuda":
        return torch.cuda.max_memory_allocated(dist.device)
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.2f} MB"
