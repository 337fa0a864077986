"""Tokens per second of a training step: ours (as train.py runs it), transformers' and nanoGPT's.

python bench/train.py baby shake 124M --nanogpt=PATH        # PATH: a checkout of nanoGPT

Each contestant has a process of its own, so that peak memory can be compared. They take turns; the table shows medians
over the rounds. A step draws a batch, runs forward and backward, clips the gradients and updates the weights.
"""

import contextlib
import io
import itertools
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from common import SIZES, VOCAB_SIZES, Worker, nanogpt_model

from model import GPT, GPTConfig
from plaingpt.console import UserError, run_script
from plaingpt.distributed import Distributed, connect
from plaingpt.settings import PathName, Positive, PositiveInt, load_settings
from plaingpt.tokens import Tokens
from train import Run, TrainConfig, train_step

CONTESTANTS = ("nanogpt", "transformers-fp32", "transformers-bf16", "ours-adamw", "ours-muon")
LIMITS = ("matmul-float32", "matmul-bfloat16")


@dataclass(frozen=True)
class BenchConfig:
    sizes: tuple[Literal[tuple(SIZES)], ...] = ()
    """baby, shake, 124M (default: all)"""
    contestants: str = ",".join(CONTESTANTS)
    """separated by commas; each also with -compiled"""
    nanogpt: PathName | None = None
    """checkout of nanoGPT, which runs in fp32 on a CPU and in bf16 on CUDA"""
    rounds: PositiveInt = 5
    """turns of each contestant"""
    turn_seconds: Positive = 2.0
    """approximate length of a turn"""
    sequences: PositiveInt | None = None
    """sequences per step (default: by size); on a GPU, 32 or 64 for 124M"""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu or cuda"""


@dataclass(frozen=True)
class Work:
    """What all contestants train on."""

    shape: dict[str, int]
    vocab_size: int
    batch_size: int
    tokens: str
    """file of token ids"""


def ours(work: Work, dist: Distributed, options: list[str]) -> Callable[[int], None]:
    optimizer, compiled = options[0], "compiled" in options
    config = TrainConfig(
        **work.shape, batch_size=work.batch_size, gradient_accumulation_steps=1, optimizer=optimizer, compile=compiled
    )
    tokens = Tokens([np.memmap(work.tokens, np.uint16, "r")])
    model = GPT(GPTConfig(vocab_size=work.vocab_size, bias=False, **work.shape))
    run = Run(config, tokens, model, dist)
    return lambda step: train_step(run, step)


def nanogpt(work: Work, dist: Distributed, options: list[str], checkout: str) -> Callable[[int], None]:
    """The step of nanoGPT's train.py, with its model, optimizer and batches."""
    module, cuda = nanogpt_model(checkout), dist.device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as in its train.py
    vocab_size = 50304 if work.vocab_size == 50257 else work.vocab_size
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(vocab_size=vocab_size, bias=False, **work.shape)).to(dist.device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), dist.device.type)
    forward = torch.compile(model) if "compiled" in options else model
    T = work.shape["block_size"]

    def batch() -> Iterator[torch.Tensor]:
        ids = np.memmap(work.tokens, np.uint16, "r")
        starts = torch.randint(len(ids) - T, (work.batch_size,))
        for i in (0, 1):
            x = torch.stack([torch.from_numpy(ids[s + i : s + i + T].astype(np.int64)) for s in starts])
            yield x.pin_memory().to(dist.device, non_blocking=True) if cuda else x

    def step(_: int) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            _, loss = forward(*batch())
        update(model, loss, optimizer)

    return step


def transformers(work: Work, dist: Distributed, options: list[str]) -> Callable[[int], None]:
    """GPT2LMHeadModel in a plain loop, with torch's fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = dict(work.shape)
    T = shape.pop("block_size")
    no_dropout = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    config = GPT2Config(vocab_size=work.vocab_size, n_positions=T, use_cache=False, **shape, **no_dropout)
    model = GPT2LMHeadModel(config).to(dist.device)
    forward = torch.compile(model) if "compiled" in options else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.from_numpy(np.fromfile(work.tokens, np.uint16).astype(np.int64))

    def step(_: int) -> None:
        starts = torch.randint(len(ids) - T, (work.batch_size, 1))
        inputs = ids[starts + torch.arange(T)].to(dist.device)
        with torch.autocast(dist.device.type, torch.bfloat16, enabled="bf16" in options):
            loss = forward(input_ids=inputs, labels=inputs).loss
        update(model, loss, optimizer)

    return step


def update(model: torch.nn.Module, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def side(device: str) -> int:
    """Rows of the square matrices whose product shows what the machine can reach."""
    return 8192 if device == "cuda" else 1024


def matrix_products(dist: Distributed, dtype: torch.dtype) -> Callable[[int], None]:
    n = side(dist.device.type)
    a, b = torch.randn(2, n, n, device=dist.device, dtype=dtype)
    return lambda _: [a @ b for _ in range(10)]


class Contestant:
    """Runs in a process of its own."""

    def __init__(self, name: str, work: Work, config: BenchConfig):
        torch.manual_seed(0)
        kind, *options = name.split("-")
        # `connect` and `wrap` set up tf32 and memory allocation for ours; the others run as Python starts them
        is_ours = kind == "ours"
        self.dist = connect(config.device) if is_ours else Distributed(torch.device(config.device), torch.float32)
        if kind == "nanogpt":
            self.step = nanogpt(work, self.dist, options, config.nanogpt)
        elif kind == "matmul":
            self.step = matrix_products(self.dist, getattr(torch, options[0]))
        else:
            self.step = (ours if is_ours else transformers)(work, self.dist, options)
        self.numbers = itertools.count()
        self.seconds(3)  # warm-up

    def seconds(self, steps: int) -> float:
        """Mean seconds per step."""
        self.dist.synchronize()
        started = time.perf_counter()
        for number in itertools.islice(self.numbers, steps):
            self.step(number)
        self.dist.synchronize()
        return (time.perf_counter() - started) / steps

    def turn(self, seconds: float) -> tuple[float, int]:
        """Seconds per step, over as many steps as fit into `seconds`, and peak memory in bytes."""
        found = self.seconds(max(1, round(seconds / self.seconds(1))))
        if self.dist.device.type == "cuda":
            return found, torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compete(work: Work, names: list[str], config: BenchConfig) -> dict[str, tuple[float, int]]:
    """For each contestant, the median seconds of a step and the peak memory in bytes."""
    workers, seconds, memory = {}, {name: [] for name in names}, {}
    for _ in range(config.rounds):
        for name in names:
            if name not in workers:
                workers[name] = Worker(Contestant, name, work, config)
            found, memory[name] = workers[name](Contestant.turn, config.turn_seconds)
            seconds[name].append(found)
            if config.device == "cuda":  # whose memory one process at a time can use
                workers.pop(name).stop()
    for worker in workers.values():
        worker.stop()
    return {name: (statistics.median(seconds[name]), memory[name]) for name in names}


def bench(size: str, names: list[str], config: BenchConfig, tokens: str) -> None:
    shape, vocab_size = dict(SIZES[size]), VOCAB_SIZES[size]
    work = Work(shape, vocab_size, config.sequences or shape["batch_size"], tokens)
    del shape["batch_size"]
    limits = LIMITS if connect(config.device).dtype == torch.bfloat16 else LIMITS[:1]  # emulated, it takes minutes
    found = compete(work, [*names, *limits], config)
    reached = {name.removeprefix("matmul-"): 10 * 2 * side(config.device) ** 3 / found[name][0] for name in limits}
    fastest = max(reached.values())
    with torch.device("meta"):
        flop = GPT(GPTConfig(vocab_size=vocab_size, bias=False, **shape)).flop_per_token()
    print(f"\n{size}: {shape['n_layer']} layers, width {shape['n_embd']},", end=" ")
    print(f"{work.batch_size} x {shape['block_size']} tokens per step")
    rates = (f"{rate / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, rate in reached.items())
    print(f"matrix products alone reach {', '.join(rates)}\n")
    print("| step | ms | tokens/s | GFLOP/s | of the higher limit | peak memory, GB | times nanoGPT |")
    print("| --- " * 7 + "|")
    for name in names:
        seconds, memory = found[name]
        speed = work.batch_size * shape["block_size"] / seconds
        cells = [name, f"{seconds * 1e3:.1f}", f"{speed:,.0f}"]
        cells += [f"{speed * flop / 1e9:,.0f}", f"{speed * flop / fastest:.0%}"]
        cells += [f"{memory / 1e9:.2f}", f"{found['nanogpt'][0] / seconds:.2f}" if "nanogpt" in found else ""]
        print("|", " | ".join(cells), "|", flush=True)


def main() -> None:
    config, _ = load_settings(BenchConfig, positional="sizes")
    names = config.contestants.split(",")
    if unknown := [name for name in names if name.removesuffix("-compiled") not in CONTESTANTS]:
        raise UserError(f"--contestants: no contestant {unknown[0]}; there are {', '.join(CONTESTANTS)}")
    names = [name for name in names if config.nanogpt or not name.startswith("nanogpt")]
    with tempfile.TemporaryDirectory() as folder:
        for size in config.sizes or SIZES:
            tokens = Path(folder) / "train.bin"
            np.random.default_rng(0).integers(0, VOCAB_SIZES[size], 2_000_000).astype(np.uint16).tofile(tokens)
            bench(size, names, config, str(tokens))


if __name__ == "__main__":
    run_script(main)
