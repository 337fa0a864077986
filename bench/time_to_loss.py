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

from model import IGNORED
from plaingpt.batches import EvalBatches
from plaingpt.checkpoint import load_model
from plaingpt.console import RunFailed, UserError, note, run_script
from plaingpt.settings import load_settings
from plaingpt.tokens import open_data_set
from train import TrainConfig

# nanoGPT's hyper-parameters for Tiny Shakespeare (its config/train_shakespeare_char.py); the schedule ends with the run
THEIRS = dict(learning_rate=1e-3, min_lr=1e-4, beta2=0.99, warmup_iters=100, weight_decay=0.1)
SHAPE = ("n_layer", "n_head", "n_embd", "block_size", "batch_size", "gradient_accumulation_steps", "dropout")


def tokens_of_update(config: TrainConfig) -> int:
    return config.gradient_accumulation_steps * config.batch_size * config.block_size


@dataclass(frozen=True)
class BenchConfig:
    recipe: str = "config/train_shakespeare_cpu.py"
    """ours; its model, data set and tokens are the others' too"""
    nanogpt: str | None = None
    """a checkout of nanoGPT, for its own train.py; without it, its recipe in ours is all there is of it"""
    seeds: str = "1337,1,2"
    """separated by commas; nanoGPT's own train.py runs with the first alone, its seed cannot be set"""
    changes: str = ""
    """flags of all runs, in place of the recipe's settings: --changes="--max_iters=300 --batch_size=8\""""
    quick: str = (
        "--batch_size=24 --max_iters=205 --learning_rate=3e-2 --warmup_iters=4 --momentum=0.8 --beta2=0.95 "
        "--eval_interval=1000 --eval_iters=5 --sample_tokens=0"
    )
    """flags of a further run of ours that is meant to end just below nanoGPT's loss"""
    runs: str = "adamw,ours,short"
    """separated by commas: adamw is nanoGPT's recipe in our train.py, short the `quick` one"""
    kept: str | None = None
    """a JSON file: the runs in it are not run again, and each new one is added, so that a bench cut short goes on"""
    update_ms: str = ""
    """milliseconds of an update of each run, measured alone: then they make the seconds, for runs beside other work"""
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
    loss = whole_loss(load_model(out_dir / "last")[0], config)
    return Run([*points[:-1], (points[-1][0], whole, loss)], whole, loss)


def nanogpt(config: TrainConfig, checkout: str, folder: Path) -> Run:
    """Its train.py, as its README runs it; the points are measured afterwards, from what it saved at each of its own
    evaluations (of 20 random batches of each split)."""
    theirs, data_dir = folder / "nanogpt", Path(config.data_dir) / config.dataset
    shutil.copytree(checkout, theirs, ignore=shutil.ignore_patterns(".git", "data"), dirs_exist_ok=True)
    shutil.copytree(data_dir, theirs / "data/set")
    vocab_size = open_data_set(data_dir).tokenizer.vocab_size
    (theirs / "data/set/meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    estimates, saved = [], theirs / "out-set/ckpt.pt"

    def seen(line: str, seconds: float) -> None:
        if found := re.match(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", line):
            estimates.append((int(found[1]), seconds, float(found[2])))
        elif line.startswith("iter ") and saved.exists():  # the first update after a save
            saved.rename(saved.with_name(f"{estimates[-1][0]}.pt"))

    settings = THEIRS | {name: getattr(config, name) for name in SHAPE}
    settings |= dict(max_iters=config.max_iters, lr_decay_iters=config.max_iters, dataset="set", out_dir="out-set")
    settings |= dict(eval_interval=min(config.eval_interval, config.max_iters), eval_iters=20)
    settings |= dict(log_interval=settings["eval_interval"])
    settings |= dict(always_save_checkpoint=True)
    settings |= dict(device="cuda", compile=True) if torch.cuda.is_available() else dict(device="cpu", compile=False)
    whole = command(["train.py", *flags(settings)], theirs, seen)
    spec = importlib.util.spec_from_file_location("nanogpt_model", theirs / "model.py")
    its = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(its)

    def loss_at(step: int) -> float:
        checkpoint = torch.load(saved.with_name(f"{step}.pt"), map_location="cpu", weights_only=True)
        model = its.GPT(its.GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in checkpoint["model"].items()})
        return whole_loss(model, config)

    points = [(step * tokens_of_update(config), at, loss_at(step) if step else own) for step, at, own in estimates]
    return Run([*points[:-1], (points[-1][0], whole, points[-1][2])], whole, points[-1][2])


def whole_loss(model: torch.nn.Module, config: TrainConfig) -> float:
    """Outside of any clock: over the whole validation split, in float32."""
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


def draw(runs: dict[str, list[Run]], picture: str, clock: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for side, (axes, label) in enumerate(zip(figure.subplots(1, 2, sharey=True), ("tokens", clock))):
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
    changes = config.changes.split()
    recipe, _ = load_settings(TrainConfig, [config.recipe, *changes])
    variants = {
        "adamw": ("nanoGPT's recipe, here", [*changes, *flags(THEIRS), "--optimizer=adamw", "--lr_schedule=cosine"]),
        "ours": ("our recipe", changes),
        "short": ("our recipe, cut short", [*changes, *config.quick.split()]),
    }
    if unknown := set(config.runs.split(",")) - {"", *variants}:
        raise UserError(f"--runs: there is no {', '.join(unknown)}; there are {', '.join(variants)}")
    kept, runs = Path(config.kept) if config.kept else None, {}
    if kept and kept.exists():
        runs = {name: [Run(**run) for run in found] for name, found in json.loads(kept.read_text()).items()}

    def add(name: str, run: Run) -> None:
        runs.setdefault(name, []).append(run)
        note(f"{name}: {run.loss:.4f} in {run.seconds:.1f} s")
        if kept:
            kept.write_text(json.dumps({name: [vars(run) for run in found] for name, found in runs.items()}))

    with tempfile.TemporaryDirectory() as folder:
        if config.nanogpt and "nanoGPT" not in runs:
            add("nanoGPT", nanogpt(recipe, config.nanogpt, Path(folder)))
        for index, seed in enumerate(config.seeds.split(",")):
            for name, settings in (variants[key] for key in config.runs.split(",") if key):
                if len(runs.get(name, [])) == index:
                    add(name, ours(recipe, config.recipe, [*settings, f"--seed={seed}"], Path(folder)))
    if config.update_ms:
        for found, ms in zip(runs.values(), config.update_ms.split(","), strict=True):
            for run in found:
                run.points = [(t, t / tokens_of_update(recipe) * float(ms) / 1000, loss) for t, _, loss in run.points]
                run.seconds = run.points[-1][1]
    tell(runs, statistics.mean(run.loss for run in next(iter(runs.values()))))
    draw(runs, config.picture, "seconds of the updates alone" if config.update_ms else "seconds, whole command")


if __name__ == "__main__":
    run_script(main)
