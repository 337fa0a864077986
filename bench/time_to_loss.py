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

from config.settings import PositiveInt, RunFailed, load_settings, note, run_script
from data.batches import EvalBatches
from data.token_files import open_data_set
from distributed import connect
from evaluate import evaluate
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
    quick: str = "--max_iters=320 --learning_rate=1.5e-2 --warmup_iters=10 --eval_interval=1000"
    """flags of a further run of ours that is meant to end just below nanoGPT's loss; empty: none"""
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


def ours(recipe: str, settings: list[str], tokens: int, folder: Path) -> Run:
    """`tokens`: of an update."""
    out_dir, points = folder / "out", []
    shutil.rmtree(out_dir, ignore_errors=True)

    def seen(line: str, seconds: float) -> None:
        if found := re.match(r"step (\d+): val_loss ([\d.]+)", line):
            points.append((int(found[1]) * tokens, seconds, float(found[2])))

    whole = command(["train.py", recipe, f"--out_dir={out_dir}", *settings], ROOT, seen)
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return Run(points, whole, [r["val_loss"] for r in records if "val_loss" in r][-1])


def nanogpt(checkout: str, config: TrainConfig, tokens: int, folder: Path) -> Run:
    """Its train.py, as its README runs it on a CPU; its points are its own estimates, the loss at the end is ours to
    measure, with its model over the whole split."""
    theirs, data_dir = folder / "nanogpt", Path(config.data_dir) / config.dataset
    data = open_data_set(data_dir)
    shutil.copytree(checkout, theirs, ignore=shutil.ignore_patterns(".git", "data"), dirs_exist_ok=True)
    (theirs / "data/set").mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        shutil.copy(data_dir / f"{split}.bin", theirs / f"data/set/{split}.bin")
    (theirs / "data/set/meta.pkl").write_bytes(pickle.dumps({"vocab_size": data.tokenizer.vocab_size}))
    points = []

    def seen(line: str, seconds: float) -> None:
        if found := re.match(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)", line):
            points.append((int(found[1]) * tokens, seconds, float(found[2])))

    settings = THEIRS | {name: getattr(config, name) for name in SHAPE}
    settings |= dict(max_iters=config.max_iters, lr_decay_iters=config.max_iters, dataset="set", out_dir="out-set")
    settings |= dict(eval_interval=config.eval_interval, eval_iters=20, log_interval=100, always_save_checkpoint=True)
    settings |= dict(device="cuda", compile=True) if torch.cuda.is_available() else dict(device="cpu", compile=False)
    whole = command(["train.py", *flags(settings)], theirs, seen)
    saved = torch.load(theirs / "out-set/ckpt.pt", map_location="cpu", weights_only=True)
    spec = importlib.util.spec_from_file_location("nanogpt_model", theirs / "model.py")
    its = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(its)
    model = its.GPT(its.GPTConfig(**saved["model_args"]))
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()})
    dist = connect("cpu", "float32")
    batches = EvalBatches(data.val, config.block_size, 64, 0)
    loss = evaluate(lambda_module(model), batches, dist)
    return Run([*points[:-1], (points[-1][0], whole, loss)], whole, loss)


class lambda_module(torch.nn.Module):
    """nanoGPT's model behind our model's signature."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, idx, targets, need_logits=True):
        return self.model(idx, targets)


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
    tokens = recipe.gradient_accumulation_steps * recipe.batch_size * recipe.block_size
    adamw = [*updates, *flags(THEIRS), "--optimizer=adamw", "--lr_schedule=cosine"]
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i, seed in enumerate(config.seeds.split(",")):
            if config.nanogpt and i == 0:
                runs["nanoGPT"] = [nanogpt(config.nanogpt, recipe, tokens, Path(folder))]
            for name, settings in (
                ("nanoGPT's recipe, here", adamw),
                ("our recipe", updates),
                ("our recipe, cut short", config.quick.split()),
            ):
                if settings or name != "our recipe, cut short":
                    run = ours(config.recipe, [*settings, f"--seed={seed}"], tokens, Path(folder))
                    runs.setdefault(name, []).append(run)
                    note(f"{name}, seed {seed}: {run.loss:.4f} in {run.seconds:.1f} s")
    target = statistics.mean(run.loss for run in next(iter(runs.values())))
    tell(runs, target)
    draw(runs, config.picture)


if __name__ == "__main__":
    run_script(main)
