"""How much of their speed processes keep when they train together: measured here on two, predicted for up to 512 GPUs.

python bench/scale.py baby shake 124M     # one process of one thread, against two that exchange gradients by gloo
python bench/scale.py --predict=True      # the prediction against published figures; docs/scale.py draws its table

Efficiency: tokens per second of n processes, over n times those of one. The prediction is a sum that fits a page:

- A micro-step takes its FLOP over the card's limit times MFU; two thirds of them are the backward pass.
- An exchange runs within nodes and then between them, `Cluster.half` being the half of an all-reduce.
- DDP exchanges once an update, behind the backward pass of the last micro-step. What does not fit behind it waits, and
  so does the tied embedding, whose gradient is whole at the very end only.
- FSDP gathers every block's weights for the forward and for the backward pass, and scatters gradients, in each
  micro-step. What is longer than the micro-step waits, and the first gathering and the last scattering.
- The optimizer comes after: Muon's products on each process (FSDP: shared out), and the memory's traffic.
- Each doubling of the nodes costs UNEVEN more: somebody is late. That constant is fitted to torchtitan's figures.
"""

import math
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.distributed

from model import GPT, GPTConfig
from plaingpt.batches import TrainBatches
from plaingpt.console import UserError, run_script
from plaingpt.distributed import PEAK_TFLOPS, connect
from plaingpt.optimizer import QUINTICS, make_optimizers
from plaingpt.parallel import wrap
from plaingpt.plan import MFU
from plaingpt.settings import Positive, PositiveInt, load_settings
from plaingpt.tokens import Tokens
from train import TrainConfig, train_step

# Predicted


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. Bandwidths in bytes a second of one GPU and direction, four fifths of the data sheets'; latencies
    in seconds a hop."""

    card: str = "H100"
    in_node: float = 360e9  # NVLink 4
    between: float = 40e9  # 400 Gb/s a GPU
    memory: float = 2.7e12
    per_node: int = 8
    hop_in_node: float = 3e-6
    hop_between: float = 15e-6

    def half(self, size: float, gpus: int) -> float:
        """Seconds to gather `size` bytes on every GPU, or to scatter their sum: half of an all-reduce, as rings do it.
        (n-1)/n of the bytes pass each link of n GPUs; between nodes, a GPU carries the share of its node's."""
        inside = min(gpus, self.per_node)
        nodes = max(1, gpus // self.per_node)
        links = (inside - 1) / inside * size / self.in_node + (nodes - 1) / nodes * size / inside / self.between
        return links + (inside - 1) * self.hop_in_node + (nodes - 1) * self.hop_between

    def all_reduce(self, size: float, gpus: int) -> float:
        """Between nodes by a tree, so that hops are as many as the nodes' logarithm."""
        nodes = max(1, gpus // self.per_node)
        rings = 2 * (self.half(size, gpus) - (nodes - 1) * self.hop_between)
        return rings + 2 * math.log2(nodes) * self.hop_between


FAST = Cluster()
SLOW = Cluster(between=1.25e9)  # 100 Gb/s Ethernet a node
UNEVEN = 0.005


@dataclass(frozen=True)
class Model:
    """What the prediction needs to know of a model: parameters, FLOP a token, FLOP of Muon an update."""

    parameters: float
    embedding: float  # of the parameters, those of the tied embedding and the positions
    blocks: int
    flop_per_token: float
    muon_flop: float = 0.0

    @classmethod
    def of(cls, gpt: GPT) -> "Model":
        """`gpt` may be on torch's meta device."""
        c = gpt.config
        parameters = sum(p.numel() for p in gpt.parameters())
        matrices = [(c.n_embd, c.n_embd)] * 4 + [(c.n_embd, 4 * c.n_embd)] * 2  # query, key, value and projection; MLP
        step = sum(4 * short**2 * long + 2 * short**3 for short, long in matrices)  # X X', A A, (b A + c A A) X
        embedding = c.n_embd * (c.padded_vocab_size + c.block_size)
        return cls(parameters, embedding, c.n_layer, gpt.flop_per_token(), len(QUINTICS) * c.n_layer * step)


def update_seconds(
    model: Model,
    gpus: int,
    tokens: int,
    micro_steps: int,
    cluster: Cluster = FAST,
    sharding: str = "ddp",
    reduce_bytes: int = 4,
    mfu: float | None = None,
) -> float:
    """One update of `tokens` a GPU in `micro_steps`; `reduce_bytes`: of one number of a gradient on its way."""
    rate = PEAK_TFLOPS[cluster.card] * 1e12 * (mfu or MFU[cluster.card])
    micro_step = tokens / micro_steps * model.flop_per_token / rate
    shards = 1 if sharding == "ddp" else gpus if sharding == "fsdp" else min(gpus, cluster.per_node)
    replicas, optimizer = gpus // shards, model.muon_flop / rate + 28 * model.parameters / cluster.memory
    waits = 0.0
    if shards > 1:
        per_block = (model.parameters - model.embedding) / model.blocks
        gather = cluster.half(2 * per_block, shards)
        scatter = cluster.half(reduce_bytes * per_block, shards)
        first, last = cluster.half(4 * model.embedding, shards), cluster.half(reduce_bytes * model.embedding, shards)
        traffic = model.blocks * (2 * gather + scatter)
        waits += micro_steps * (max(0.0, traffic - micro_step) + first + gather + scatter + last)
    if replicas > 1:  # of the shards, each by itself
        apart = cluster if shards == 1 else Cluster(cluster.card, between=cluster.between, per_node=1)
        size = reduce_bytes * model.parameters / shards
        tail = apart.all_reduce(reduce_bytes * model.embedding / shards, replicas)
        waits += tail + max(0.0, apart.all_reduce(size, replicas) - tail - micro_step * 2 / 3)
    uneven = (1 + UNEVEN) ** math.log2(max(1, gpus / cluster.per_node))
    return (micro_steps * micro_step + waits + optimizer / shards) * uneven


def efficiency(model: Model, gpus: int, tokens: int, micro_steps: int, *how, **named) -> float:
    """Against one GPU that does the micro-steps of all, and so all of the optimizer's work once."""
    alone = update_seconds(model, 1, tokens * gpus, micro_steps * gpus, *how, **named)
    return alone / gpus / update_seconds(model, gpus, tokens, micro_steps, *how, **named)


LLAMA_8B = Model(8.03e9, 1.05e9, 32, 6 * 8.03e9 + 6 * 32 * 4096 * 8192)  # its attention is causal: half of 12 L C T


def against_published() -> None:
    print("torchtitan, Llama 3.1 8B, 16,384 tokens a GPU, FSDP on H100s, 400 Gb/s a GPU: 128 against 8")
    print("| | tokens/s a GPU on 8, published | on 128, published | kept | predicted |")
    print("| --- " * 5 + "|")
    for name, eight, many in (("eager", 5762, 5605), ("compiled", 6667, 6514), ("fp8", 8532, 8380)):
        mfu = eight * LLAMA_8B.flop_per_token / (PEAK_TFLOPS["H100"] * 1e12)
        few, all_ = (update_seconds(LLAMA_8B, n, 16384, 1, FAST, "fsdp", mfu=mfu) for n in (8, 128))
        print(f"| {name} | {eight:,} | {many:,} | {many / eight:.1%} | {few / all_:.1%} |")
    with torch.device("meta"):
        gpt2 = Model.of(GPT(GPTConfig(1024, 50257, 12, 12, 768, bias=False)))
    muon = update_seconds(gpt2, 8, 65536, 1)
    adam = update_seconds(Model(gpt2.parameters, gpt2.embedding, 12, gpt2.flop_per_token), 8, 65536, 1)
    print("\nmodded-nanogpt, 124M, 8 x H100, 524,288 tokens an update: published 138.6 ms with Adam, 142.0 with Muon;")
    print(f"predicted {adam * 1e3:.1f} and {muon * 1e3:.1f}, of which exchange and its wait", end=" ")
    print(f"{1e3 * (adam - update_seconds(Model(gpt2.parameters, 0, 12, gpt2.flop_per_token), 1, 65536, 1)):.1f} ms")


# Measured

SIZES = {  # layers, heads, width, T, sequences of a micro-step, vocabulary, micro-steps of a process
    "baby": (4, 4, 128, 64, 12, 65, 1),
    "shake": (6, 6, 384, 256, 4, 65, 1),
    "124M": (12, 12, 768, 256, 1, 50257, 4),
}
ALONE, APART, TOGETHER = "one process", "two, each by itself", "two that exchange"


@dataclass(frozen=True)
class ScaleConfig:
    sizes: tuple[str, ...] = ()
    """baby, shake, 124M; by default all three"""
    micro_steps: PositiveInt | None = None
    """of an update, in each process, in place of the size's own"""
    rounds: PositiveInt = 5
    """turns of each"""
    turn_seconds: Positive = 2.0
    """a turn lasts about as long"""
    predict: bool = False
    """no measurement: the prediction against published figures"""


def worker(size: str, micro_steps: int, environment: dict, tokens: str, pipe) -> None:
    """A process: for each number of updates that it is sent, the seconds of one; for 0, those of an exchange."""
    os.environ |= environment
    dist = connect("cpu")
    torch.set_num_threads(1)
    n_layer, n_head, n_embd, T, sequences, vocab_size, _ = SIZES[size]
    shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=T)
    accumulation = micro_steps * dist.world_size
    config = TrainConfig(**shape, batch_size=sequences, gradient_accumulation_steps=accumulation, optimizer="adamw")
    raw_model = GPT(GPTConfig(vocab_size=vocab_size, bias=False, **shape))
    model = wrap(raw_model, dist)
    optimizers = make_optimizers(raw_model, config.optimizer, config.learning_rate, 0.1, (0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    data = Tokens([np.memmap(tokens, np.uint16, "r")])
    batches = TrainBatches(data, T, sequences * accumulation, seed=0)
    gradients = torch.zeros(sum(p.numel() for p in raw_model.parameters()))
    count = 0
    while (n := pipe.recv()) is not None:
        dist.sum(0)  # both start together
        started = time.perf_counter()
        for _ in range(n):
            train_step(model, optimizers, scaler, batches, count := count + 1, config, dist)
        if n == 0 and dist.world_size > 1:
            torch.distributed.all_reduce(gradients)
        pipe.send((time.perf_counter() - started) / max(n, 1))
    dist.close()


class Team:
    """One process, or two; `turn` makes all of them do so many updates at the same time."""

    def __init__(self, kind: str, size: str, micro_steps: int, tokens: str):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes, world = [], [], 1 + (kind == TOGETHER)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(1 + (kind != ALONE)):
            names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
            values = (rank, rank, world, world, port) if world > 1 else (0, 0, 1, 1, port)
            environment = {k: str(v) for k, v in zip(names, values)} | {"MASTER_ADDR": "127.0.0.1"}
            here, there = context.Pipe()
            arguments = (size, micro_steps, environment, tokens, there)
            self.processes.append(context.Process(target=worker, args=arguments, daemon=True))
            self.pipes.append(here)
            self.processes[-1].start()

    def turn(self, updates: int | None) -> float:
        for pipe in self.pipes:
            pipe.send(updates)
        if updates is None:
            return sum(process.join() or 0.0 for process in self.processes)
        return statistics.mean(pipe.recv() for pipe in self.pipes)


def measure(size: str, config: ScaleConfig, tokens: str) -> None:
    micro_steps = config.micro_steps or SIZES[size][-1]
    teams = {kind: Team(kind, size, micro_steps, tokens) for kind in (ALONE, APART, TOGETHER)}
    times, exchanges = {kind: [] for kind in teams}, []
    counts = {}
    for kind, team in teams.items():
        team.turn(1)
        counts[kind] = max(1, round(config.turn_seconds / team.turn(1)))
    for _ in range(config.rounds):
        for kind, team in teams.items():
            times[kind].append(team.turn(counts[kind]))
        exchanges.append(teams[TOGETHER].turn(0))
    for team in teams.values():
        team.turn(None)
    alone, apart, together = (statistics.median(times[kind]) for kind in teams)
    exchange, each = statistics.median(exchanges), SIZES[size][3] * SIZES[size][4] * micro_steps
    spread = [alone / seconds for seconds in times[TOGETHER]]
    print(
        f"| {size} | {micro_steps} x {each // micro_steps:,} | {alone * 1e3:.1f} | {apart * 1e3:.1f} "
        f"| {together * 1e3:.1f} | {exchange * 1e3:.1f} | {alone / apart:.0%} | **{alone / together:.0%}** "
        f"({min(spread):.0%} to {max(spread):.0%}) | {alone / (apart + exchange):.0%} |",
        flush=True,
    )


def main() -> None:
    config, _ = load_settings(ScaleConfig, positional="sizes")
    if config.predict:
        return against_published()
    for size in config.sizes:
        if size not in SIZES:
            raise UserError(f"there is no size {size}: {', '.join(SIZES)}")
    print(
        f"| size | micro-steps x tokens of a process | {ALONE}, ms | {APART} | {TOGETHER} | an exchange, "
        "alone | efficiency without exchange | efficiency | predicted: by itself + exchange |"
    )
    print("| --- " * 9 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for size in config.sizes or SIZES:
            tokens = Path(folder) / "train.bin"
            np.random.default_rng(0).integers(0, SIZES[size][5], 2_000_000).astype(np.uint16).tofile(tokens)
            measure(size, config, str(tokens))


if __name__ == "__main__":
    run_script(main)
