"""Which learning rate is best, for models of several widths and depths, texts and numbers of steps.

OMP_NUM_THREADS=1 python bench/transfer.py --texts=python,shakespeare_char --shapes=64x2,128x4 --steps=200,1000
python bench/transfer.py --report --picture=docs/learning_rate.png   # the results, and the loss at the default rate
python bench/transfer.py --fit           # the law by which --minutes chooses a model, against the results

In each cell, learning rates are tried around `start` until the best has a worse one on either side. Each run is one
line of `results`; runs that are there already are not repeated. Losses do not depend on the machine's load.
"""

import itertools
import json
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from model import GPT, GPTConfig
from plaingpt.batches import EvalBatches
from plaingpt.console import note, run_script
from plaingpt.distributed import connect
from plaingpt.evaluate import evaluate
from plaingpt.settings import PathName, Positive, PositiveInt, load_settings
from plaingpt.tokens import open_data_set
from plaingpt.train_config import muon_learning_rate
from train import Run, TrainConfig, train_step

MEASURED = ("parameters", "tokens", "epochs", "seconds", "val_loss")


@dataclass(frozen=True)
class BenchConfig:
    texts: str = "python"
    """data sets, separated by commas"""
    data_dir: PathName = "data"
    """directory of the prepared data sets"""
    shapes: str = "64x2,128x4"
    """width x depth, separated by commas"""
    steps: str = "200"
    """numbers of steps, separated by commas"""
    batch_size: PositiveInt = 8
    """sequences per step"""
    block_size: PositiveInt = 128
    """tokens per sequence"""
    extra: str = ""
    """other settings of the runs: momentum=0.85,seed=1"""
    start: Positive | None = None
    """first learning rate to try (None: train.py's default)"""
    factor: Positive = 2.0
    """ratio of neighboring learning rates"""
    once: bool = False
    """only try the first learning rate"""
    results: PathName = "transfer.jsonl"
    """file of results, one JSON object per line"""
    report: bool = False
    """train nothing, print the results"""
    picture: PathName | None = None
    """with report: file for a plot of the results"""
    fit: bool = False
    """train nothing, fit the loss law of plaingpt/budget.py to the results"""


def train_once(config: TrainConfig) -> dict:
    """Train without saves. The loss is that of at most 512 sequences of the validation split."""
    dist = connect(config.device, config.dtype)
    data = open_data_set(Path(config.data_dir) / config.dataset, check=False)
    torch.manual_seed(config.seed)
    shape = dict(block_size=config.block_size, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    model = GPT(GPTConfig(vocab_size=data.tokenizer.vocab_size, dropout=config.dropout, bias=False, **shape))
    eval_batches = EvalBatches(data.val, config.block_size, config.batch_size, 512)
    run, started = Run(config, data.train, model, dist), time.perf_counter()
    for step in range(config.max_iters):
        loss, _ = train_step(run, step)
    loss.item()
    seconds = time.perf_counter() - started
    tokens = config.max_iters * config.tokens_per_step
    return dict(
        parameters=model.num_parameters(),
        tokens=tokens,
        epochs=round(tokens / len(data.train), 3),
        seconds=round(seconds, 2),
        val_loss=round(evaluate(run.model, eval_batches, dist), 5),
    )


def sweep(cell: dict, bench: BenchConfig, done: dict[tuple, float]) -> None:
    """Try learning rates until the best is not at an edge."""
    losses, waiting = {}, [0] if bench.once else [0, 1, -1]
    start = bench.start or muon_learning_rate(cell["n_embd"], cell["max_iters"])
    while waiting:
        power = waiting.pop(0)
        cell["learning_rate"] = float(f"{start * bench.factor**power:.4g}")
        key = tuple(sorted(cell.items()))
        if key not in done:
            found = train_once(TrainConfig(**cell, data_dir=bench.data_dir, gradient_accumulation_steps=1))
            with open(bench.results, "a") as file:
                print(json.dumps(cell | found), file=file)
            note(" ".join(f"{name}={value}" for name, value in (cell | found).items()))
            done[key] = found["val_loss"]
        losses[power] = done[key] if math.isfinite(done[key]) else math.inf
        best = min(losses, key=losses.get)
        if not waiting and not bench.once:
            waiting = [p for p in (best - 1, best + 1) if p not in losses]


def interpolated(losses: dict[float, float], rate: float) -> float:
    """The loss at `rate` on the parabola, over log rate, through the three nearest points that surround it."""
    rates = sorted(losses)
    middle = min(rates[1:-1], key=lambda other: abs(math.log(other / rate)))
    three = rates[rates.index(middle) - 1 : rates.index(middle) + 2]
    curve = np.polyfit(np.log2(three), [losses[other] for other in three], 2)
    return float(np.polyval(curve, math.log2(rate)))


def cells_of(runs: list[dict]) -> dict[tuple, dict[float, float]]:
    """Losses by learning rate for each text, width, depth, number of steps, tokens per step and changed settings."""
    cells = defaultdict(dict)
    for run in runs:
        changed = " ".join(f"{name} {run[name]}" for name in ("momentum", "seed") if name in run)
        key = run["dataset"], run["n_embd"], run["n_layer"], run["max_iters"], run["batch_size"] * run["block_size"]
        cells[*key, changed][run["learning_rate"]] = run["val_loss"]
    return {key: losses for key, losses in cells.items() if len(losses) > 2}


def lowest(losses: dict[float, float]) -> tuple[float, float]:
    """The best learning rate and its loss, interpolated."""
    rate = min(np.geomspace(min(losses), max(losses), 200), key=lambda rate: interpolated(losses, rate))
    return rate, interpolated(losses, rate)


def report(runs: list[dict]) -> None:
    """A row for each cell with at least three learning rates."""
    print("| text | width x depth | steps | tokens/step | | losses by learning rate | best rate | default: % above |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (text, n_embd, n_layer, steps, tokens, changed), losses in cells_of(runs).items():
        (best, loss), default = lowest(losses), muon_learning_rate(n_embd, steps)
        above = 100 * (interpolated(losses, default) / loss - 1)
        listed = ", ".join(f"{rate:.2g}: {losses[rate]:.3f}" for rate in sorted(losses))
        print(f"| {text} | {n_embd} x {n_layer} | {steps} | {tokens} | {changed} | {listed} | {best:.2g} |", end="")
        print(f" {default:g}: {above:.2f} |")


def draw(runs: list[dict], picture: str) -> None:
    """Percent above the best loss of each cell, against the learning rate and against its ratio to the default."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    raw, relative = figure.subplots(1, 2, sharey=True)
    widths = sorted({run["n_embd"] for run in runs})
    named = set()
    for (_, n_embd, _, steps, _, changed), losses in cells_of(runs).items():
        if changed:
            continue
        rates = np.array(sorted(losses))
        above = [100 * (losses[rate] / lowest(losses)[1] - 1) for rate in rates]
        style = dict(color=f"C{widths.index(n_embd)}", marker=".", lw=1)
        raw.plot(rates, above, label=None if n_embd in named else f"width {n_embd}", **style)
        relative.plot(rates / muon_learning_rate(n_embd, steps), above, **style)
        named.add(n_embd)
    for axes, label, first in (raw, "learning rate", 0.001), (relative, "learning rate / default", 0.125):
        axes.set(xscale="log", xlabel=label, ylim=(0, 8))
        axes.set_xticks([first * 2**i for i in range(7)], [f"{first * 2**i:g}" for i in range(7)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    relative.axvline(1, color="black", lw=1, ls=":")
    raw.set_ylabel("loss, % above the best of its sweep")
    raw.legend()
    figure.savefig(picture)


def fit(runs: list[dict]) -> None:
    """L = E + A (N^-ap + (r W^-b)^p)^(1/p): a, b, r and p for all texts, E and A for each; least squares of log L.

    N: millions of parameters in the blocks. W: millions of tokens, repeated ones counted as `predicted_loss` does.
    """
    runs = [run for run in runs if "dropout" not in run]
    texts = sorted({run["dataset"] for run in runs})
    which = np.array([texts.index(run["dataset"]) for run in runs])
    loss, tokens, epochs = (np.array([run[name] for run in runs], float) for name in ("val_loss", "tokens", "epochs"))
    size = np.array([12 * run["n_layer"] * run["n_embd"] ** 2 / 1e6 for run in runs])
    text = tokens / np.maximum(epochs, 1e-3) / 1e6
    worth = np.minimum(tokens / 1e6, text) + text * 5 * (1 - np.exp(-np.maximum(epochs - 1, 0) / 5))

    def residuals(a: float, b: float, r: float, p: float) -> np.ndarray:
        shape, predicted = (size ** (-a * p) + (r * worth**-b) ** p) ** (1 / p), np.empty_like(loss)
        for i in range(len(texts)):
            x, y = shape[which == i] / loss[which == i], 1 / loss[which == i]
            (offset, factor), *_ = np.linalg.lstsq(np.stack([y, x], 1), np.ones_like(x), rcond=None)
            if offset < 0:
                offset, factor = 0.0, x.sum() / (x @ x)
            predicted[which == i] = offset + factor * shape[which == i]
        return predicted / loss - 1

    tried = itertools.product(
        np.arange(0.1, 0.61, 0.02), np.arange(0.1, 0.41, 0.02), np.geomspace(0.7, 8, 16), (1, 1.5, 2, 3, 3.7, 5)
    )
    best = {}
    for a, b, r, p in tried:
        error = np.sqrt(np.mean(residuals(a, b, r, p) ** 2))
        best[p] = min(best.get(p, (math.inf,)), (error, a, b, r))
    for p, (error, a, b, r) in best.items():
        print(f"p={p}: a={a:.2f} b={b:.2f} r={r:.2f}, {100 * error:.2f}% off on average")
    print("| text | width x depth | steps | loss | the law of budget.py |")
    print("| --- | --- | --- | --- | --- |")
    for run, error in zip(runs, residuals(0.18, 0.2, 1.7, 3.7)):
        shape = f"{run['n_embd']} x {run['n_layer']}"
        print(f"| {run['dataset']} | {shape} | {run['max_iters']} | {run['val_loss']:.3f} | {100 * error:+.1f}% |")


def main() -> None:
    bench, _ = load_settings(BenchConfig)
    path = Path(bench.results)
    runs = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if bench.report and bench.picture:
        draw(runs, bench.picture)
    if bench.report or bench.fit:
        return report(runs) if bench.report else fit(runs)
    extra = dict(pair.split("=") for pair in bench.extra.split(",") if pair)
    extra = {name: int(value) if value.isdecimal() else float(value) for name, value in extra.items()}
    done = {tuple(sorted((n, v) for n, v in run.items() if n not in MEASURED)): run["val_loss"] for run in runs}
    for steps, text, shape in itertools.product(*(s.split(",") for s in (bench.steps, bench.texts, bench.shapes))):
        n_embd, n_layer = map(int, shape.split("x"))
        cell = dict(dataset=text, n_embd=n_embd, n_layer=n_layer, n_head=max(1, n_embd // 64), max_iters=int(steps))
        cell |= dict(batch_size=bench.batch_size, block_size=bench.block_size) | extra
        sweep(cell, bench, done)


if __name__ == "__main__":
    run_script(main)
