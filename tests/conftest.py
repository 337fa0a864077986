"""Shared fixtures: a tiny prepared data set, and the scripts run in this process as if from the command line."""

import contextlib
import gc
import importlib
import io
import json
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from plaingpt.console import run_script

settings.register_profile("no deadline", deadline=None)  # speed belongs in bench/: a machine may be busy
settings.load_profile("no deadline")

ROOT = Path(__file__).resolve().parent.parent

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no pool of processes that import torch

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Run in parallel, they would end last: they take longest.
FIRST = tuple(f"test_{name}.py" for name in ("hosts", "parallel", "resume", "sharding", "stop", "train", "page"))

TINY = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "gradient_accumulation_steps": 1,
    "max_iters": 6, "eval_interval": 3, "eval_iters": 2, "log_interval": 1, "sample_tokens": 4,
    "learning_rate": 1e-2, "device": "cpu", "dtype": "float32", "compile": False, "dataset": "tiny",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


@dataclass
class Ended:
    """What a script left: exit status, standard output, standard error."""

    status: int
    out: str
    err: str


def run_main(name: str, *flags, stdin: str = "") -> Ended:
    """Run a script's `main` in this process as the command line would."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    stops = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
    handlers = {number: signal.getsignal(number) for number in stops}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [f"{name.split('.')[-1]}.py", *map(str, flags)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        torch.seed()  # a new process would not know this one's random state either
        try:
            run_script(importlib.import_module(name).main)
        except SystemExit as end:
            status = end.code or 0
        finally:
            gc.unfreeze()  # this process goes on
            gc.enable()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Ended(status, *texts)


def flags(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def made_text(length: int, seed: int = 0) -> str:
    """Words of a small alphabet in a random order, the same each time."""
    rng = random.Random(seed)
    words = ["tree", "sea", "stone", "a", "road", "and", "east", "north", "rain", "dust"]
    text = ""
    while len(text) < length:
        text += rng.choice(words) + rng.choice([" ", " ", " ", ",\n"])
    return text[:length]


def edit_json(path: Path, **changes) -> None:
    """Change a file of a model or a checkpoint, which has no checksums then."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (path.parent / "SHA256SUMS").unlink(missing_ok=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def child_environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # for models of this size more threads are slower


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Prepared data sets: `tiny` and `other` of characters (not the same ones), `bytes` of emoji."""
    folder = tmp_path_factory.mktemp("prepared")
    texts = {
        "tiny": ("char", made_text(4000)),
        "other": ("char", made_text(4000).upper()),
        "bytes": ("byte", "🙂🎈ß " * 200),
    }
    for name, (kind, text) in texts.items():
        path = folder / f"{name}.txt"
        path.write_text(text, encoding="utf-8")
        ended = run_main("prepare_data", path, *flags(name=name, tokenizer=kind, val_fraction=0.1, data_dir=folder))
        assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="session")
def tiny_flags(data_dir):
    """The flags of a tiny run into `out_dir`, some of them changed."""

    def make(out_dir: Path, **changes) -> list[str]:
        return flags(**(TINY | {"out_dir": out_dir, "data_dir": data_dir} | changes))

    return make


@pytest.fixture(scope="session")
def train(tiny_flags):
    """Run train.py on a tiny model and expect the exit status."""

    def run(out_dir: Path, status: int = 0, **changes) -> Ended:
        ended = run_main("train", *tiny_flags(out_dir, **changes))
        assert ended.status == status, ended.err
        return ended

    return run


@pytest.fixture(scope="session")
def resume(data_dir):
    """Run train.py --init_from=resume with no other settings than the given ones."""

    def run(out_dir: Path, status: int = 0, **changes) -> Ended:
        here = {"out_dir": out_dir, "data_dir": data_dir, "device": "cpu", "dtype": "float32", "init_from": "resume"}
        ended = run_main("train", *flags(**(here | changes)))
        assert ended.status == status, ended.err
        return ended

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, train) -> Path:
    """The folder of a finished tiny run; not to be changed."""
    out_dir = tmp_path_factory.mktemp("runs") / "tiny"
    train(out_dir)
    return out_dir
