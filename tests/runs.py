"""What several test files need to compare runs and to start them under torchrun."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import torch
from conftest import ROOT, child_environment
from safetensors.torch import load_file
from test_distributed import TORCHRUN

from plaingpt.metrics import read_metrics

TIMES = {"seconds", "tokens_per_second", "mfu", "resumed_from"}
PLAN = {"lr_decay_iters": 6, "warmup_iters": 2, "min_lr": 1e-3}  # given, so that a shorter run has the same one
GETS_WORSE = dict(learning_rate=0.5, warmup_iters=0, grad_clip=0, min_lr=0.5, eval_interval=1, max_iters=30)

# Two processes against one.
TWO = dict(gradient_accumulation_steps=4, batch_size=2, dropout=0.2, max_iters=24, eval_interval=6, optimizer="muon")
TWO |= dict(lr_decay_iters=24, warmup_iters=2, learning_rate=1e-3, min_lr=1e-4)
ROUNDING = 3e-4  # Muon's products are in bfloat16; one batch that is another makes ten times the difference


def records(out_dir: Path) -> list[dict]:
    """What was measured, apart from times and where it was interrupted."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(out_dir / "metrics.jsonl")]


def weights(out_dir: Path, name: str = "last/model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(out_dir / name)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def same_run(left: Path, right: Path) -> bool:
    """Whether two runs ended in the same weights and optimizer state, bit for bit, and measured the same."""
    files = ("last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors")
    same_files = all((left / file).read_bytes() == (right / file).read_bytes() for file in files)
    return same_files and records(left) == records(right)


def torchrun(flags: list, *options: str, script: Path = ROOT / "train.py") -> subprocess.CompletedProcess:
    """Run train.py in two processes."""
    command = [*TORCHRUN, *options, script, *flags]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=child_environment(), start_new_session=True, **pipes)
    watchdog = threading.Timer(600, os.killpg, [process.pid, signal.SIGKILL])  # a hanging run fails its own test only
    watchdog.start()
    try:
        printed = process.communicate()[1]
        return subprocess.CompletedProcess(command, process.returncode, None, printed)
    finally:
        watchdog.cancel()
