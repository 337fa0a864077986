"""Tokens per second of the entire command, with start-up, evaluation and saves: train.py's and nanoGPT's.

python bench/whole_run.py --nanogpt=PATH        # PATH: a checkout of nanoGPT, in which data/ is writable

The commands take turns on the same random tokens, model and evaluations. Of ours, the speed before and after the first
save is compared too: a background thread must not slow training down.
"""

import json
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

import numpy as np

from plaingpt.console import run_script
from plaingpt.settings import PathName, PositiveInt, load_settings

SIZES = {  # layers, heads, width, context, sequences, vocabulary, steps
    "baby": (4, 4, 128, 64, 12, 65, 2000),
    "shake": (6, 6, 384, 256, 16, 65, 60),
    "124M": (12, 12, 768, 1024, 1, 50257, 16),
}


@dataclass(frozen=True)
class BenchConfig:
    sizes: tuple[str, ...] = ()
    """baby, shake, 124M (default: all)"""
    nanogpt: PathName | None = None
    """checkout of nanoGPT"""
    rounds: PositiveInt = 3
    """runs of each command"""


def settings_of(size: str) -> tuple[dict[str, object], int]:
    *shape, vocab_size, steps = SIZES[size]
    names = ("n_layer", "n_head", "n_embd", "block_size", "batch_size")
    settings = dict(zip(names, shape)) | dict(gradient_accumulation_steps=1, dropout=0.0, device="cpu", compile=False)
    settings |= dict(max_iters=steps, lr_decay_iters=steps, warmup_iters=1, learning_rate=1e-3, min_lr=1e-4)
    return settings | dict(eval_interval=steps // 4, eval_iters=2, log_interval=max(1, steps // 40)), vocab_size


def run(script: Path, settings: dict[str, object]) -> float:
    flags = [f"--{name}={value}" for name, value in settings.items()]
    started = time.perf_counter()
    subprocess.run([sys.executable, str(script), *flags], cwd=script.parent, capture_output=True, check=True)
    return time.perf_counter() - started


def speeds(out_dir: Path, first_save: int) -> tuple[float, float]:
    """Median tokens/s of the log lines before and after the first save."""
    records = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [(record["step"], record["tokens_per_second"]) for record in records if "train_loss" in record][1:]
    before, after = ([speed for step, speed in logged if (step <= first_save) == first] for first in (True, False))
    return statistics.median(before), statistics.median(after)


def bench(size: str, config: BenchConfig, folder: Path) -> None:
    settings, vocab_size = settings_of(size)
    ids = np.random.default_rng(0).integers(0, vocab_size, 1_000_000).astype(np.uint16)
    places = {"plainGPT": folder / "data" / size}
    if config.nanogpt:
        places["nanoGPT"] = Path(config.nanogpt) / "data" / "bench"
    for place in places.values():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        ids.tofile(place / "train.bin")
        ids[:100_000].tofile(place / "val.bin")
    out_dir, seconds, ratios = folder / "out", {name: [] for name in (*places, "plainGPT, AdamW")}, []
    ours = settings | dict(out_dir=out_dir, data_dir=folder / "data", dataset=size, sample_tokens=0)
    theirs = settings | dict(dataset="bench", out_dir="out-bench", always_save_checkpoint=True, dtype="float32")
    for _ in range(config.rounds):
        for name in seconds:
            shutil.rmtree(out_dir, ignore_errors=True)
            if name == "nanoGPT":
                seconds[name].append(run(Path(config.nanogpt) / "train.py", theirs))
                continue
            optimizer = "adamw" if "AdamW" in name else "muon"
            seconds[name].append(run(ROOT / "train.py", ours | dict(optimizer=optimizer)))
            before, after = speeds(out_dir, settings["eval_interval"])
            ratios.append(after / before)
    tokens = settings["max_iters"] * settings["batch_size"] * settings["block_size"]
    for name, found in seconds.items():
        whole = statistics.median(found)
        print(f"| {size} | {name} | {whole:.1f} | {tokens / whole:,.0f} |")
    print(f"| {size} | speed after the first save / before | {statistics.median(ratios):.3f} | |", flush=True)


def main() -> None:
    config, _ = load_settings(BenchConfig, positional="sizes")
    print("| size | command | seconds | tokens/s |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for size in config.sizes or SIZES:
            bench(size, config, Path(folder))


if __name__ == "__main__":
    run_script(main)
