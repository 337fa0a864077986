"""How soon a validation loss is reached: whole commands, ours and nanoGPT's, on the same data, model and tokens.

python bench/time_to_loss.py --nanogpt=PATH        # PATH: a checkout of nanoGPT; tens of minutes on two cores

Every run is a process of its own and starts from nothing; its seconds are those of the whole command: imports,
evaluations and saves included. The runs take turns, seed by seed. Losses are of the whole validation split.
"""

import importlib.util
import json
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from checkpoint import load_model
from config.settings import PositiveInt, RunFailed, UserError, load_settings, note, run_script
from data.batches import EvalBatches
from data.token_files import open_data_set
from model import IGNORED
from plan import tokens_per_update
from train import TrainConfig

# nanoGPT's hyper-parameters for Tiny Shakespeare (its config/train_shakespeare_char.py); the schedule ends with the run
THEIRS = dict(learning_rate=1e-3, min_lr=1e-4, beta2=0.99, warmup_iters=100, weight_decay=0.1)
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps", "dropout")


@dataclass(frozen=True)
class BenchConfig:
    recipe: str = "config/train_shakespeare_cpu.py"
    """ours; its model, data set and tokens are the others' too"""
    nanogpt: str | None = None
    """a checkout of nanoGPT, for its own train.py; without it, its recipe in ours is all there is of it"""
    seeds: str = "1337,1,2"
    """separated by commas; nanoGPT's own train.py runs with the first alone, its seed cannot be set"""
    max_iters: PositiveInt | None = None
    """updates, in place of the recipe's"""
    quick: str = (
        "--batch_size=24 --max_iters=205 --learning_rate=3e-2 --warmup_iters=4 --momentum=0.8 --beta2=0.95 "
        "--eval_interval=1000 --eval_iters=5 --sample_tokens=0"
    )
    """flags of a further run of ours that is meant to end just below nanoGPT's loss"""
    runs: str = "adamw,ours,short"
    """separated by commas: adamw is nanoGPT's recipe in our train.py, short the `quick` one"""
    picture: str = "time_to_loss.png"
    """where the curves are drawn"""


@dataclass
class Run:
    """A whole command: `points` are (tokens, seconds since the command began, loss of the validation split)."""

    points: list[tuple[int, float, float]]
    seconds: float
    loss: float

    def first_below(self, loss: float) -> tuple[int, float] | None:
        """(tokens, seconds) at the first evaluation that is not above `loss`."""
        return next(((tokens, seconds) for tokens, seconds, found in self.points if found <= loss), None)


def flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def command(arguments: list[str], cwd: Path, seen) -> float:
    """Run Python; `seen(line, seconds since the start)` gets what it prints. Returns the seconds of the whole."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = []
    for line in process.stdout:
        said.append(line)
        seen(line, time.perf_counter() - started)
    if process.wait():
        raise RunFailed(f"{' '.join(arguments)} failed: {''.join(said[-5:])}")
    return time.perf_counter() - started


def ours(config: TrainConfig, recipe: str, settings: list[str], folder: Path) -> Run:
    out_dir, seconds_at = folder / "out", {}
    shutil.rmtree(out_dir, ignore_errors=True)

    def seen(line: str, seconds: float) -> None:
        if found := re.match(r"step (\d+): val_loss", line):
            seconds_at[int(found[1])] = seconds

    whole = command(["train.py", recipe, f"--out_dir={out_dir}", *settings], ROOT, seen)
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    points = [(r["tokens"], seconds_at[r["step"]], r["val_loss"]) for r in records if "val_loss" in r]
    return ended(points, whole, load_model(out_dir / "last")[0], config)


def nanogpt(config: TrainConfig, checkout: str, folder: Path) -> Run:
    """Its train.py, as its README runs it; the points but for the last are its own estimates, of 20 random batches."""
    theirs, data_dir = folder / "nanogpt", Path(config.data_dir) / config.dataset
    shutil.copytree(checkout, theirs, ignore=shutil.ignore_patterns(".git", "data"), dirs_exist_ok=True)
    shutil.copytree(data_dir, theirs / "data/set")
    vocab_size = open_data_set(data_dir).tokenizer.vocab_size
    (theirs / "data/set/meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    points = []

    def seen(line: str, seconds: float) -> None:
        if found := re.match(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", line):
            points.append((int(found[1]) * tokens_per_update(config), seconds, float(found[2])))

    settings = THEIRS | {name: getattr(config, name) for name in SHAPE}
    settings |= dict(max_iters=config.max_iters, lr_decay_iters=config.max_iters, dataset="set", out_dir="out-set")
    settings |= dict(eval_interval=min(config.eval_interval, config.max_iters), eval_iters=20, log_interval=100)
    settings |= dict(always_save_checkpoint=True)
    settings |= dict(device="cuda", compile=True) if torch.cuda.is_available() else dict(device="cpu", compile=False)
    whole = command(["train.py", *flags(settings)], theirs, seen)
    spec = importlib.util.spec_from_file_location("nanogpt_model", theirs / "model.py")
    its = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(its)
    saved = torch.load(theirs / "out-set/ckpt.pt", map_location="cpu", weights_only=True)
    model = its.GPT(its.GPTConfig(**saved["model_args"]))
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()})
    return ended(points, whole, model, config)


def ended(points: list[tuple], seconds: float, model: torch.nn.Module, config: TrainConfig) -> Run:
    """The run with its last loss measured outside of the clock: over the whole validation split, in float32."""
    val = EvalBatches(open_data_set(Path(config.data_dir) / config.dataset).val, config.block_size, 64, 0)
    total, count = 0.0, 0
    model.eval()
    for index in range(len(val)):
        inputs, targets = val.batch(index)
        counted = int((targets != IGNORED).sum())
        with torch.no_grad():
            total += model(inputs, targets)[1].item() * counted
        count += counted
    return Run([*points[:-1], (points[-1][0], seconds, total / count)], seconds, total / count)


def tell(runs: dict[str, list[Run]], target: float) -> None:
    print(f"\n| run | loss at the end, by seed | mean | tokens | seconds | tokens to {target:.3f} | seconds to it |")
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
    for side, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds, whole command"))):
        for i, (name, found) in enumerate(runs.items()):
            for run in found:
                curve = [(point[side], point[2]) for point in run.points[1:]]
                axes.plot(*zip(*curve), color=f"C{i}", marker="o", ms=2, lw=1, label=name if run is found[0] else None)
        axes.set(xlabel=label, ylabel="validation loss (nats a token)" if side == 0 else None)
        axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(picture)


def main() -> None:
    config, _ = load_settings(BenchConfig)
    updates = [f"--max_iters={config.max_iters}"] if config.max_iters else []
    recipe, _ = load_settings(TrainConfig, [config.recipe, *updates])
    variants = {
        "adamw": ("nanoGPT's recipe, here", [*updates, *flags(THEIRS), "--optimizer=adamw", "--lr_schedule=cosine"]),
        "ours": ("our recipe", updates),
        "short": ("our recipe, cut short", config.quick.split()),
    }
    if unknown := set(config.runs.split(",")) - set(variants):
        raise UserError(f"--runs: there is no {', '.join(unknown)}; there are {', '.join(variants)}")
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if config.nanogpt:
            runs["nanoGPT"] = [nanogpt(recipe, config.nanogpt, Path(folder))]
            note(f"nanoGPT: {runs['nanoGPT'][0].loss:.4f} in {runs['nanoGPT'][0].seconds:.1f} s")
        for seed in config.seeds.split(","):
            for name, settings in (variants[key] for key in config.runs.split(",")):
                run = ours(recipe, config.recipe, [*settings, f"--seed={seed}"], Path(folder))
                runs.setdefault(name, []).append(run)
                note(f"{name}, seed {seed}: {run.loss:.4f} in {run.seconds:.1f} s")
    tell(runs, statistics.mean(run.loss for run in next(iter(runs.values()))))
    draw(runs, config.picture)


if __name__ == "__main__":
    run_script(main)
