"""Tokens per second of a training step: ours (the one train.py runs, imported), transformers' and nanoGPT's.

python bench/train.py baby shake 124M --nanogpt=PATH        # PATH: a checkout of nanoGPT

Every contestant has a process of its own, so that peak memory is its own; they take turns, round by
round, and the medians count. Each step draws its batch, goes forward and backward, clips and updates.
"""

import contextlib
import importlib.util
import io
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from model import GPT, GPTConfig
from plaingpt.batches import TrainBatches
from plaingpt.console import UserError, run_script
from plaingpt.distributed import Distributed, connect
from plaingpt.optimizer import make_optimizers
from plaingpt.parallel import wrap
from plaingpt.settings import Positive, PositiveInt, load_settings
from plaingpt.tokens import Tokens
from train import Run, TrainConfig, train_step

SIZES = {  # layers, heads, width, T, sequences, vocabulary
    "baby": (4, 4, 128, 64, 12, 65),
    "shake": (6, 6, 384, 256, 16, 65),
    "124M": (12, 12, 768, 1024, 1, 50257),
}
CONTESTANTS = ("nanogpt", "transformers-fp32", "transformers-bf16", "ours-adamw", "ours-muon")
LIMITS = ("matmul-float32", "matmul-bfloat16")


@dataclass(frozen=True)
class BenchConfig:
    sizes: tuple[str, ...] = ()
    """baby, shake, 124M; by default all three"""
    contestants: str = ",".join(CONTESTANTS)
    """separated by commas: those, and each with -compiled"""
    nanogpt: str | None = None
    """a checkout of nanoGPT, for the contestants of that name; nanogpt is fp32 on the CPU, bf16 on CUDA"""
    rounds: PositiveInt = 5
    """turns of each contestant"""
    turn_seconds: Positive = 2.0
    """a turn lasts about as long"""
    sequences: PositiveInt | None = None
    """of a batch, in place of the size's own: on a GPU 124M wants 32 or 64"""
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    """where"""


@dataclass(frozen=True)
class Work:
    """What a contestant is given: the model's shape and where the tokens are."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int
    vocab_size: int
    tokens: str

    def shape(self) -> dict:
        return {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}


def ours(work: Work, dist: Distributed, options: list[str]) -> Callable[[int], None]:
    config = TrainConfig(
        **work.shape(), batch_size=work.batch_size, gradient_accumulation_steps=1, optimizer=options[0], max_iters=10**6
    )
    raw_model = GPT(GPTConfig(vocab_size=work.vocab_size, bias=False, **work.shape()))
    model = wrap(raw_model, dist, compiled="compiled" in options)
    optimizers = make_optimizers(raw_model, config.optimizer, config.learning_rate, 0.1, (0.9, 0.95), dtype=dist.dtype)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=False)
    batches = TrainBatches(Tokens([np.memmap(work.tokens, np.uint16, "r")]), work.block_size, work.batch_size, seed=0)
    tokens = work.batch_size * work.block_size
    run = Run(config, dist, None, raw_model, model, optimizers, scaler, batches, None, tokens)
    return lambda step: train_step(run, step)


def nanogpt(work: Work, dist: Distributed, options: list[str], checkout: str) -> Callable[[int], None]:
    """The step of its train.py, with its model, its optimizer and its way of drawing a batch."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    its = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(its)
    cuda = dist.device.type == "cuda"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as its train.py
    vocab_size = 50304 if work.vocab_size == 50257 else work.vocab_size
    with contextlib.redirect_stdout(io.StringIO()):
        model = its.GPT(its.GPTConfig(vocab_size=vocab_size, bias=False, **work.shape())).to(dist.device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), dist.device.type)
    forward = torch.compile(model) if "compiled" in options else model

    def batch() -> list[torch.Tensor]:
        ids, T = np.memmap(work.tokens, np.uint16, "r"), work.block_size
        starts = torch.randint(len(ids) - T, (work.batch_size,))
        pair = [
            torch.stack([torch.from_numpy(ids[i + o : i + o + T].astype(np.int64)) for i in starts]) for o in (0, 1)
        ]
        return [x.pin_memory().to(dist.device, non_blocking=True) if cuda else x for x in pair]

    def step(_: int) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            _, loss = forward(*batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def transformers(work: Work, dist: Distributed, options: list[str]) -> Callable[[int], None]:
    """GPT2LMHeadModel in a plain loop, with torch's fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=work.n_layer, n_head=work.n_head, n_embd=work.n_embd, n_positions=work.block_size,
            vocab_size=work.vocab_size, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False,
        )
    ).to(dist.device)  # fmt: skip
    forward = torch.compile(model) if "compiled" in options else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.from_numpy(np.fromfile(work.tokens, np.uint16).astype(np.int64))

    def step(_: int) -> None:
        starts = torch.randint(len(ids) - work.block_size, (work.batch_size, 1))
        inputs = ids[starts + torch.arange(work.block_size)].to(dist.device)
        with torch.autocast(dist.device.type, torch.bfloat16, enabled="bf16" in options):
            loss = forward(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def matrix_products(dist: Distributed, dtype: torch.dtype) -> Callable[[int], None]:
    n = side(dist.device)
    a, b = torch.randn(2, n, n, device=dist.device, dtype=dtype)
    return lambda _: [a @ b for _ in range(10)]


def side(device: torch.device) -> int:
    """Of the square matrices whose product shows the machine's limit."""
    return 8192 if device.type == "cuda" else 1024


def contestant(name: str, work: Work, config: BenchConfig, pipe) -> None:
    """The process of a contestant: for each number of steps that it is sent, the seconds of one and the peak memory."""
    torch.manual_seed(0)
    kind, *options = name.split("-")
    # `connect` tunes the process for us (glibc's memory, tf32); the others get it as Python starts
    dist = connect(config.device) if kind == "ours" else Distributed(torch.device(config.device), torch.float32)
    if kind == "ours":
        step = ours(work, dist, options)
    elif kind == "nanogpt":
        step = nanogpt(work, dist, options, config.nanogpt)
    elif kind == "transformers":
        step = transformers(work, dist, options)
    else:
        step = matrix_products(dist, getattr(torch, options[0]))
    count = 0
    for _ in range(3):
        step(count := count + 1)
    while n := pipe.recv():
        dist.synchronize()
        started = time.perf_counter()
        for _ in range(n):
            step(count := count + 1)
        dist.synchronize()
        seconds = (time.perf_counter() - started) / n
        if dist.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        pipe.send((seconds, memory))


class Contestant:
    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=contestant, args=(*arguments, other), daemon=True)
        self.process.start()
        other.close()

    def turn(self, seconds: float) -> tuple[float, int]:
        """(seconds of a step, peak bytes) over as many steps as fit into `seconds`."""
        self.pipe.send(1)
        one, _ = self.pipe.recv()
        self.pipe.send(max(1, round(seconds / one)))
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.send(0)
        self.process.join()


def compete(work: Work, names: list[str], config: BenchConfig) -> dict[str, SimpleNamespace]:
    """{name: median seconds of a step and peak bytes}. On CUDA only one process at a time holds memory."""
    together = config.device == "cpu"
    standing = {}
    times, memory = {name: [] for name in names}, dict.fromkeys(names, 0)
    for _ in range(config.rounds):
        for name in names:
            runner = standing.get(name) or Contestant(name, work, config)
            seconds, memory[name] = runner.turn(config.turn_seconds)
            times[name].append(seconds)
            if together:
                standing[name] = runner
            else:
                runner.stop()
    for runner in standing.values():
        runner.stop()
    return {name: SimpleNamespace(seconds=statistics.median(times[name]), memory=memory[name]) for name in names}


def bench(size: str, config: BenchConfig, tokens: str) -> None:
    *shape, sequences, vocab_size = SIZES[size]
    work = Work(*shape, config.sequences or sequences, vocab_size, tokens)
    names = [name for name in config.contestants.split(",") if config.nanogpt or not name.startswith("nanogpt")]
    found = compete(work, [*names, *LIMITS], config)
    fp32, bf16 = (10 * 2 * side(torch.device(config.device)) ** 3 / found[name].seconds for name in LIMITS)
    with torch.device("meta"):
        flop = GPT(GPTConfig(vocab_size=vocab_size, bias=False, **work.shape())).flop_per_token()
    tokens_per_step = work.batch_size * work.block_size
    print(f"\n{size}: {work.n_layer} layers, {work.n_embd} wide, {work.batch_size} x {work.block_size} tokens a step")
    print(f"matrix products alone reach {fp32 / 1e9:,.0f} GFLOP/s in fp32, {bf16 / 1e9:,.0f} in bf16\n")
    print("| step | ms | tokens/s | GFLOP/s | of bf16's limit | peak memory, GB | times nanoGPT |")
    print("| --- " * 7 + "|")
    for name in names:
        speed, memory = tokens_per_step / found[name].seconds, found[name].memory / 1e9
        ratio = f"{found['nanogpt'].seconds / found[name].seconds:.2f}" if "nanogpt" in found else ""
        print(
            f"| {name} | {found[name].seconds * 1e3:.1f} | {speed:,.0f} | {speed * flop / 1e9:,.0f} "
            f"| {speed * flop / bf16:.0%} | {memory:.2f} | {ratio} |",
            flush=True,
        )


def main() -> None:
    config, _ = load_settings(BenchConfig, positional="sizes")
    for name in config.contestants.split(","):
        if name.removesuffix("-compiled") not in CONTESTANTS:
            raise UserError(f"--contestants: there is no {name}; --help lists them")
    for size in config.sizes:
        if size not in SIZES:
            raise UserError(f"there is no size {size}: {', '.join(SIZES)}")
    with tempfile.TemporaryDirectory() as folder:
        for size in config.sizes or SIZES:
            tokens = Path(folder) / "train.bin"
            np.random.default_rng(0).integers(0, SIZES[size][-1], 2_000_000).astype(np.uint16).tofile(tokens)
            bench(size, config, str(tokens))


if __name__ == "__main__":
    run_script(main)
