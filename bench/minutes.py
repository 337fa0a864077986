"""Does `train.py --minutes` choose well and finish in time? Each run is the command that a user would type.

python bench/minutes.py --texts=python,shakespeare_char --minutes=1 --shapes=auto,2x128,4x128,3x256
python bench/minutes.py --texts=python --minutes=1 --search=20
python bench/minutes.py config/quickstart.py --texts=python --shapes=

Losses are in bits per byte of the entire validation split, of `best`. Run it on a quiet machine.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plaingpt.console import note, run_script
from plaingpt.settings import NonNegativeInt, PathName, Positive, load_settings
from plaingpt.tokens import open_data_set


@dataclass(frozen=True)
class BenchConfig:
    texts: str = "python"
    """data sets, separated by commas"""
    data_dir: PathName = "data"
    """directory of the prepared data sets"""
    minutes: Positive = 1.0
    """time of each run"""
    shapes: str = "auto"
    """layers x width, separated by commas; auto: what --minutes chooses"""
    search: NonNegativeInt = 0
    """runs with random shapes, learning rates and batches"""
    recipes: tuple[PathName, ...] = ()
    """recipes to train to their end as well"""
    extra: str = ""
    """other flags of train.py"""
    results: PathName = "minutes.jsonl"
    """file of results, one JSON object per line"""


def run(text: str, named: str, flags: list[str], bench: BenchConfig) -> None:
    """Train, evaluate, and write a line of results."""
    train = [sys.executable, str(ROOT / "train.py")]
    where = [f"--dataset={text}", f"--data_dir={Path(bench.data_dir).resolve()}"]
    with tempfile.TemporaryDirectory() as folder:
        command = [*train, *flags, *where, f"--out_dir={folder}/out", "--init_from=scratch", *bench.extra.split()]
        started = time.monotonic()
        subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - started
        best = [f"--init_from={folder}/out/best", "--eval_only", "--eval_iters=0", "--batch_size=16"]
        found = subprocess.run([*train, *where, *best], cwd=ROOT, stderr=subprocess.PIPE, text=True, check=True).stderr
        settings = json.loads(Path(folder, "out", "last", "training.json").read_text())["settings"]
    data = open_data_set(Path(bench.data_dir) / text, check=False)
    names = ("n_layer", "n_embd", "block_size", "batch_size", "max_iters", "learning_rate")
    shape = {name: settings[name] for name in names}
    tokens = settings["max_iters"] * settings["batch_size"] * settings["gradient_accumulation_steps"]
    result = dict(text=text, run=named, minutes=bench.minutes, seconds=round(seconds, 1)) | shape
    result |= dict(epochs=round(tokens * settings["block_size"] / len(data.train), 2), extra=bench.extra)
    result |= dict(bits_per_byte=float(re.search(r"([\d.]+) bits per byte", found)[1]))
    note(json.dumps(result))
    with open(bench.results, "a") as file:
        print(json.dumps(result), file=file)


def main() -> None:
    bench, _ = load_settings(BenchConfig)
    for text in bench.texts.split(","):
        for recipe in bench.recipes:
            run(text, recipe, [recipe], bench)
        for shape in filter(None, bench.shapes.split(",")):
            n_layer, _, n_embd = shape.partition("x")
            given = [] if shape == "auto" else [f"--n_layer={n_layer}", f"--n_embd={n_embd}"]
            run(text, shape, [*given, f"--minutes={bench.minutes}"], bench)
        rng = random.Random(0)
        for i in range(bench.search):
            run(text, f"random {i}", [*random_flags(rng), f"--minutes={bench.minutes}"], bench)


def random_flags(rng: random.Random) -> list[str]:
    """Around what people train for a few minutes on a CPU."""
    drawn = {
        "n_layer": rng.choice([1, 2, 3, 4]),
        "n_embd": rng.choice([64, 96, 128, 160, 192, 256]),
        "learning_rate": f"{0.002 * 10 ** rng.random():.2g}",
        "block_size": rng.choice([64, 128, 256]),
        "batch_size": rng.choice([8, 16, 32]),
    }
    return [f"--{name}={value}" for name, value in drawn.items()] + ["--gradient_accumulation_steps=1"]


if __name__ == "__main__":
    run_script(main)
