"""Time to a validation loss: entire commands, ours and nanoGPT's, on the same data, model and tokens.

python bench/time_to_loss.py --nanogpt=PATH        # PATH: a checkout of nanoGPT; tens of minutes on two cores

Each run is a command of its own, from scratch; its seconds include imports, evaluations and saves. The runs take turns,
seed by seed. Final losses are over the entire validation split.
"""

import json
import pickle
import re
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from common import as_flags, copy_nanogpt, nanogpt_model, timed_command

from model import IGNORED
from plaingpt.batches import EvalBatches
from plaingpt.checkpoint import load_model
from plaingpt.console import UserError, note, run_script
from plaingpt.metrics import read_metrics
from plaingpt.settings import PathName, load_settings
from plaingpt.tokens import open_data_set
from train import TrainConfig

# nanoGPT's config/train_shakespeare_char.py; the learning rate decays until the end of the run
THEIRS = dict(learning_rate=1e-3, min_lr=1e-4, beta2=0.99, warmup_iters=100, weight_decay=0.1)
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps", "dropout")


def step_tokens(config: TrainConfig) -> int:
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


@dataclass(frozen=True)
class BenchConfig:
    recipe: PathName = "config/train_shakespeare_cpu.py"
    """our recipe; all runs use its model, data set and number of tokens"""
    nanogpt: PathName | None = None
    """checkout of nanoGPT; without it, nanoGPT's recipe runs in our train.py only"""
    seeds: str = "1337,1,2"
    """separated by commas; nanoGPT's train.py has a fixed seed and runs once"""
    changes: str = ""
    """flags of all runs, which change the recipe: --changes="--max_iters=300 --batch_size=8\""""
    quick: str = (
        "--batch_size=24 --max_iters=205 --learning_rate=3e-2 --warmup_iters=4 --momentum=0.8 --beta2=0.95 "
        "--eval_interval=1000 --eval_iters=5 --sample_tokens=0"
    )
    """flags of the run `short`, which should end just below nanoGPT's loss"""
    runs: str = "adamw,ours,short"
    """separated by commas; adamw: nanoGPT's recipe in our train.py; short: our recipe with the flags of `quick`"""
    cache: PathName | None = None
    """JSON file of finished runs, which are not repeated; an interrupted benchmark continues from it"""
    picture: PathName = "time_to_loss.png"
    """file for the curves"""


@dataclass
class Run:
    """A command. points: tokens, seconds since its start, and validation loss, at each evaluation."""

    points: list[tuple[int, float, float]]
    seconds: float
    loss: float

    def first_below(self, loss: float) -> tuple[int, float] | None:
        """(tokens, seconds) at the first evaluation with at most this loss."""
        return next(((tokens, seconds) for tokens, seconds, found in self.points if found <= loss), None)


def ours(config: TrainConfig, recipe: str, settings: list[str], folder: Path) -> Run:
    out_dir, seconds_at = folder / "out", {}
    shutil.rmtree(out_dir, ignore_errors=True)

    def on_line(line: str, seconds: float) -> None:
        if found := re.match(r"step (\d+): val_loss", line):
            seconds_at[int(found[1])] = seconds

    seconds = timed_command(ROOT / "train.py", [recipe, f"--out_dir={out_dir}", *settings], on_line)
    records = read_metrics(out_dir / "metrics.jsonl")
    points = [(r["tokens"], seconds_at[r["step"]], r["val_loss"]) for r in records if "val_loss" in r]
    loss = full_loss(load_model(out_dir / "last")[0], config)
    return Run([*points[:-1], (points[-1][0], seconds, loss)], seconds, loss)


def nanogpt(config: TrainConfig, checkout: str, folder: Path) -> Run:
    """nanoGPT's train.py. It evaluates on 20 random batches per split; losses are measured afterwards, from the
    checkpoints that it saves at these points."""
    theirs, data_dir = copy_nanogpt(checkout, folder), Path(config.data_dir) / config.dataset
    shutil.copytree(data_dir, theirs / "data/set")
    vocab_size = open_data_set(data_dir).tokenizer.vocab_size
    (theirs / "data/set/meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    estimates, saved = [], theirs / "out-set/ckpt.pt"

    def on_line(line: str, seconds: float) -> None:
        if found := re.match(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", line):
            estimates.append((int(found[1]), seconds, float(found[2])))
        elif line.startswith("iter ") and saved.exists():  # the first step after a save
            saved.rename(saved.with_name(f"{estimates[-1][0]}.pt"))

    interval = min(config.eval_interval, config.max_iters)
    settings = THEIRS | {name: getattr(config, name) for name in SHAPE}
    settings |= dict(max_iters=config.max_iters, lr_decay_iters=config.max_iters, dataset="set", out_dir="out-set")
    settings |= dict(eval_interval=interval, eval_iters=20, log_interval=interval, always_save_checkpoint=True)
    settings |= dict(device="cuda", compile=True) if torch.cuda.is_available() else dict(device="cpu", compile=False)
    seconds = timed_command(theirs / "train.py", as_flags(settings), on_line)
    module = nanogpt_model(theirs)

    def loss_at(step: int) -> float:
        checkpoint = torch.load(saved.with_name(f"{step}.pt"), map_location="cpu", weights_only=True)
        model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()})
        return full_loss(model, config)

    points = [(step * step_tokens(config), at, loss_at(step) if step else first) for step, at, first in estimates]
    return Run([*points[:-1], (points[-1][0], seconds, points[-1][2])], seconds, points[-1][2])


def full_loss(model: torch.nn.Module, config: TrainConfig) -> float:
    """Over the entire validation split, in float32; not timed."""
    val = EvalBatches(open_data_set(Path(config.data_dir) / config.dataset).val, config.block_size, 64, 0)
    total, count = 0.0, 0
    model.eval()
    for index in range(len(val)):
        inputs, targets = val.batch(index)
        counted = int((targets != IGNORED).sum())
        with torch.no_grad():
            total += model(inputs, targets)[1].item() * counted
        count += counted
    return total / count


def print_table(runs: dict[str, list[Run]], target: float) -> None:
    print(
        f"\n| run | final loss, by seed | mean | tokens | seconds | tokens to {target:.3f} | seconds to {target:.3f} |"
    )
    print("| --- " * 7 + "|")
    for name, found in runs.items():
        losses, first = [run.loss for run in found], [run.first_below(target) for run in found]
        below = [statistics.median(numbers) for numbers in zip(*first)] if all(first) else None
        print(
            f"| {name} | {', '.join(f'{loss:.4f}' for loss in losses)} | {statistics.mean(losses):.4f} "
            f"| {found[0].points[-1][0]:,} | {statistics.median(run.seconds for run in found):.1f} "
            f"| {f'{below[0]:,.0f} | {below[1]:.1f}' if below else '— | —'} |",
            flush=True,
        )


def draw(runs: dict[str, list[Run]], picture: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for side, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"))):
        for i, (name, found) in enumerate(runs.items()):
            for run in found:
                curve = [(point[side], point[2]) for point in run.points[1:]]
                axes.plot(*zip(*curve), color=f"C{i}", marker="o", ms=2, lw=1, label=name if run is found[0] else None)
        axes.set(xlabel=label, ylabel="validation loss" if side == 0 else None)
        axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(picture)


def main() -> None:
    config, _ = load_settings(BenchConfig)
    changes = config.changes.split()
    recipe, _ = load_settings(TrainConfig, [config.recipe, *changes])
    adamw = [*changes, *as_flags(THEIRS), "--optimizer=adamw", "--lr_schedule=cosine"]
    variants = {
        "adamw": ("nanoGPT's recipe in our train.py", adamw),
        "ours": ("our recipe", changes),
        "short": ("our recipe, short", [*changes, *config.quick.split()]),
    }
    if unknown := set(config.runs.split(",")) - {"", *variants}:
        raise UserError(f"--runs: no {', '.join(unknown)}; there are {', '.join(variants)}")
    cache, runs = Path(config.cache) if config.cache else None, {}
    if cache and cache.exists():
        runs = {name: [Run(**run) for run in found] for name, found in json.loads(cache.read_text()).items()}

    def add(name: str, run: Run) -> None:
        runs.setdefault(name, []).append(run)
        note(f"{name}: {run.loss:.4f} in {run.seconds:.1f} s")
        if cache:
            cache.write_text(json.dumps({name: [vars(run) for run in found] for name, found in runs.items()}))

    with tempfile.TemporaryDirectory() as folder:
        if config.nanogpt and "nanoGPT" not in runs:
            add("nanoGPT", nanogpt(recipe, config.nanogpt, Path(folder)))
        for index, seed in enumerate(config.seeds.split(",")):
            for name, settings in (variants[key] for key in config.runs.split(",") if key):
                if len(runs.get(name, [])) == index:
                    add(name, ours(recipe, config.recipe, [*settings, f"--seed={seed}"], Path(folder)))
    print_table(runs, statistics.mean(run.loss for run in next(iter(runs.values()))))
    draw(runs, config.picture)


if __name__ == "__main__":
    run_script(main)
