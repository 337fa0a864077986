"""Tokens per second of entire commands, including start-up, evaluations and saves: our train.py and nanoGPT's.

python bench/whole_run.py --nanogpt=PATH        # PATH: a checkout of nanoGPT; about 7 minutes per round on two cores

The commands take turns, with the same tokens, model, steps, saves and number of evaluation batches. For ours, the
logged speed before and after the first save is compared, too: saving in the background must not slow training down.
"""

import pickle
import random
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from common import SIZES, VOCAB_SIZES, as_flags, copy_nanogpt, timed_command

from plaingpt.console import run_script
from plaingpt.metrics import read_metrics
from plaingpt.settings import PathName, PositiveInt, Range, load_settings

STEPS = {"baby": 900, "shake": 24, "124M": 12}  # saved after each third
OPTIMIZERS = {"plainGPT": "muon", "plainGPT, AdamW": "adamw"}


@dataclass(frozen=True)
class BenchConfig:
    sizes: tuple[Literal[tuple(SIZES)], ...] = ()
    """baby, shake, 124M (default: all)"""
    nanogpt: PathName | None = None
    """checkout of nanoGPT"""
    rounds: PositiveInt = 3
    """runs of each command"""
    steps: Annotated[int, Range("at least 6", lambda n: 6 <= n < 2**63)] | None = None
    """training steps, a multiple of 3 (default: 900, 24 and 12)"""


def prepare(size: str, folder: Path) -> None:
    """Write folder/<size>, a data set of random tokens with the size's vocabulary."""
    if VOCAB_SIZES[size] == 50257:  # read as GPT-2 tokens
        (folder / size).mkdir(parents=True)
        ids = np.random.default_rng(0).integers(0, 50257, 1_000_000).astype(np.uint16)
        ids.tofile(folder / size / "train.bin")
        ids[:100_000].tofile(folder / size / "val.bin")
        return
    characters = [chr(48 + i) for i in range(VOCAB_SIZES[size] - 1)]  # and end of text
    text = folder / "text.txt"
    folder.mkdir(exist_ok=True)
    text.write_text("".join(random.Random(0).choices(characters, k=1_000_000)))
    settings = dict(name=size, tokenizer="char", val_fraction=0.1, data_dir=folder)
    timed_command(ROOT / "prepare_data.py", [str(text), *as_flags(settings)])


def run_settings(size: str, steps: int) -> dict[str, object]:
    settings = SIZES[size] | dict(gradient_accumulation_steps=1, dropout=0.0, device="cpu", compile=False)
    settings |= dict(max_iters=steps, lr_decay_iters=steps, warmup_iters=1, learning_rate=1e-3, min_lr=1e-4)
    return settings | dict(eval_interval=max(1, steps // 3), log_interval=max(1, steps // 40))


def speed_ratio(out_dir: Path, first_save: int) -> float:
    """Median logged tokens/s after the first save, over that before it; the first record, a warm-up, does not count."""
    logged = [record for record in read_metrics(out_dir / "metrics.jsonl") if "train_loss" in record][1:]
    before = [record["tokens_per_second"] for record in logged if record["step"] <= first_save]
    after = [record["tokens_per_second"] for record in logged if record["step"] > first_save]
    return statistics.median(after) / statistics.median(before)


def bench(size: str, config: BenchConfig, checkout: Path | None, folder: Path) -> None:
    steps, data_dir, out_dir = config.steps or STEPS[size], folder / "data", folder / "out"
    settings = run_settings(size, steps)
    ours = settings | dict(out_dir=out_dir, data_dir=data_dir, dataset=size, sample_tokens=0, eval_iters=2)
    # nanoGPT evaluates both splits, so that one batch of each makes two
    theirs = settings | dict(dataset=size, out_dir="out-bench", always_save_checkpoint=True, dtype="float32")
    theirs["eval_iters"] = 1
    prepare(size, data_dir)
    if checkout:
        shutil.copytree(data_dir / size, checkout / "data" / size)
        if size != "124M":  # without meta.pkl nanoGPT uses GPT-2's vocabulary
            (checkout / "data" / size / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": VOCAB_SIZES[size]}))
    seconds, ratios = {name: [] for name in (*OPTIMIZERS, *(["nanoGPT"] if checkout else []))}, []
    for _ in range(config.rounds):
        for name in seconds:
            shutil.rmtree(out_dir, ignore_errors=True)
            if name == "nanoGPT":
                seconds[name].append(timed_command(checkout / "train.py", as_flags(theirs)))
            else:
                flags = as_flags(ours | dict(optimizer=OPTIMIZERS[name]))
                seconds[name].append(timed_command(ROOT / "train.py", flags))
                ratios.append(speed_ratio(out_dir, settings["eval_interval"]))
    speeds = {}
    for name, found in seconds.items():
        made = steps + (name == "nanoGPT")  # nanoGPT makes max_iters + 1 steps
        speeds[name] = made * settings["batch_size"] * settings["block_size"] / statistics.median(found)
    for name, speed in speeds.items():
        times = f"{speed / speeds['nanoGPT']:.2f}" if checkout else ""
        print(f"| {size} | {name} | {statistics.median(seconds[name]):.1f} | {speed:,.0f} | {times} |")
    print(f"| {size} | ours: speed after the first save / before | {statistics.median(ratios):.3f} | | |", flush=True)


def main() -> None:
    config, _ = load_settings(BenchConfig, positional="sizes")
    print("| size | command | seconds | tokens/s | times nanoGPT |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout = copy_nanogpt(config.nanogpt, folder) if config.nanogpt else None
        for size in config.sizes or SIZES:
            bench(size, config, checkout, folder)


if __name__ == "__main__":
    run_script(main)
