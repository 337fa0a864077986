"""What several benchmarks share: model sizes, worker processes, nanoGPT's code."""

import importlib.util
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from plaingpt.console import RunFailed

SIZES = {  # the model and the sequences of a step; nanoGPT's CPU and GPU recipes for Tiny Shakespeare, and GPT-2
    "baby": dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12),
    "shake": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=16),
    "124M": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=1),
}
VOCAB_SIZES = {"baby": 65, "shake": 65, "124M": 50257}


class Worker:
    """A process that calls `make(*arguments)` once, and then jobs with the result."""

    def __init__(self, make: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, context, initializer=_start, initargs=(make, arguments))

    def __call__(self, job: Callable, *arguments) -> Any:
        """job(result of make, *arguments), in the process."""
        return self.pool.submit(_run, job, arguments).result()

    def stop(self) -> None:
        self.pool.shutdown()


def _start(make: Callable, arguments: tuple) -> None:
    global _made
    _made = make(*arguments)


def _run(job: Callable, arguments: tuple) -> Any:
    return job(_made, *arguments)


def timed_command(script: Path, settings: list[str], on_line: Callable[[str, float], None] = lambda *_: None) -> float:
    """Run a script in its folder; returns the seconds. `on_line` gets each printed line and the seconds until then."""
    started, lines = time.perf_counter(), []
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen([sys.executable, "-u", script, *settings], cwd=script.parent, **pipes)
    for line in process.stdout:
        lines.append(line)
        on_line(line, time.perf_counter() - started)
    if process.wait():
        raise RunFailed(f"{script} {' '.join(settings)} failed: {''.join(lines[-5:])}")
    return time.perf_counter() - started


def as_flags(settings: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def copy_nanogpt(checkout: str, folder: Path) -> Path:
    """A copy without data sets, in which runs can write."""
    return shutil.copytree(checkout, folder / "nanogpt", ignore=shutil.ignore_patterns(".git", "data"))


def nanogpt_model(checkout: str | Path) -> ModuleType:
    """nanoGPT's model.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
