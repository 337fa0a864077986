"""Faults by the hundred: kills, damaged inputs, a disk that fills up at each write, and what a save costs.

python bench/faults.py kills 200      # SIGKILL, at least half of them inside a save, then the same weights?
python bench/faults.py damage 1000    # one file of a checkpoint or data set damaged: the right result or one line?
python bench/faults.py disk           # a small tmpfs, full after 0, 1, 2 ... pages and files (needs root to mount)
python bench/faults.py stall          # 124M parameters: what the training loop waits for

Runs are real runs of train.py in processes of their own, forked from one that has imported everything.
"""

import argparse
import contextlib
import io
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import torch
from damage import CHECKPOINT, DATA_SET, SUMS_AFTER, damage, restore, same_model, ways
from safetensors.torch import load_file

import prepare_data
import train
from model import GPT, GPTConfig
from plaingpt.checkpoint import load_model
from plaingpt.console import run_script
from plaingpt.distributed import Distributed
from plaingpt.files import existing
from plaingpt.metrics import Metrics
from plaingpt.optimizer import apply_gradients, make_optimizers
from plaingpt.run_state import NEW_RUN, Saver, load_training
from plaingpt.tokenizer import make_tokenizer

TINY = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, dropout=0.1,
    optimizer="muon", warmup_iters=5, lr_decay_iters=3000, learning_rate=1e-3, min_lr=1e-4, eval_iters=2,
    log_interval=1, sample_tokens=0, device="cpu", dtype="float32", compile=False, dataset="tiny",
)  # fmt: skip
HERE = Distributed(torch.device("cpu"), torch.float32)
COMPLETE = NEW_RUN | dict(settings={}, derived=[], data="", scaler={})


def forked(main, log: Path, *arguments, **settings) -> int:
    """Start `main` of a script as a process; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    with open(log, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            sys.argv = [f"{main.__module__}.py", *map(str, arguments), *(f"--{k}={v}" for k, v in settings.items())]
            torch.manual_seed(time.time_ns())  # nothing of the random state that was inherited
            run_script(main)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
    os._exit(status)


def wait(pid: int, seconds: float = 60.0) -> int | None:
    """The exit status, negative for a signal; None if it had to be killed after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def run(log: Path, **settings) -> None:
    status = wait(forked(train.main, log, **settings), 600)
    assert status == 0, log.read_text()


def prepare(folder: Path) -> Path:
    rng = random.Random(0)
    text = "".join(rng.choice(["tree ", "sea ", "stone ", "a ", "road\n"]) for _ in range(1500))
    (folder / "tiny.txt").write_text(text)
    made = dict(name="tiny", tokenizer="char", val_fraction=0.1, data_dir=folder / "data")
    assert wait(forked(prepare_data.main, folder / "log", folder / "tiny.txt", **made)) == 0
    return folder / "data"


def ok(work) -> bool:
    """Whether `work` ends without an error in a process of its own."""
    pid = os.fork()
    if pid:
        return wait(pid) == 0
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(BaseException):
        work()
        os._exit(0)
    os._exit(1)


def kills(folder: Path, count: int) -> None:
    """Kill a run that saves at every update `count` times; resume each time; compare with an undisturbed run."""
    data_dir, out_dir, rng = prepare(folder), folder / "killed", random.Random(1)
    settings = TINY | dict(data_dir=data_dir, max_iters=10**6)
    found, updates, started = Counter(), 0, time.monotonic()

    def wait_for(pid: int, names: list[str], seconds: float) -> None:
        """Until one of the folders of a save in progress is there, which are gone after it."""
        end = time.monotonic() + seconds
        while not any(os.path.exists(out_dir / name) for name in names) and time.monotonic() < end:
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, (folder / "log").read_text()
            time.sleep(0.0002)

    for i in range(count):
        pid = forked(train.main, folder / "log", **settings, out_dir=out_dir, init_from="auto", eval_interval=1)
        if i % 4 == 0:  # at any moment, start-up included
            time.sleep(rng.uniform(0, 1.5))
        else:  # at any moment of a save
            wait_for(pid, [".best.new", ".last.new"], 30)
            time.sleep(rng.uniform(0, 0.4))
            wait_for(pid, [rng.choice([".best.new", ".last.new", ".last.old"])], 1)
            time.sleep(rng.choice([0, rng.uniform(0, 0.02)]))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == -signal.SIGKILL, (folder / "log").read_text()
        left = sorted(path.name for path in out_dir.glob("*.*") if path.suffix in (".new", ".old"))
        found["inside a save" if left else "outside"] += 1
        found.update(f"left {name}" for name in left)
        for name in ("last", "best"):
            if there := existing(out_dir / name):
                found[f"{name} loads" if ok(lambda there=there: load_model(there)) else f"{name} LOST"] += 1
            elif updates:
                found[f"{name} LOST"] += 1
        if existing(out_dir / "last"):
            step = load_training(out_dir / "last")["step"]
            assert step >= updates, "a later checkpoint was lost"
            updates = step
        if (i + 1) % 20 == 0:
            print(f"{i + 1} kills, update {updates}, {time.monotonic() - started:.0f} s", flush=True)
    last = updates + 3
    run(folder / "log", **settings | dict(max_iters=last), out_dir=out_dir, init_from="auto", eval_interval=1)
    run(folder / "log", **settings | dict(max_iters=last), out_dir=folder / "straight", eval_interval=1000)
    same = [
        (out_dir / "last" / name).read_bytes() == (folder / "straight" / "last" / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    ]
    print(f"{count} kills over {last} updates: {dict(found)}")
    print(f"weights and optimizer state equal those of the undisturbed run bit for bit: {same}")


def damaged(folder: Path, count: int) -> None:
    """Damage one file `count` times; each time resume, train an update and save, and load the model alone."""
    data_dir, sound, rng = prepare(folder), folder / "sound", random.Random(2)
    settings = TINY | dict(max_iters=7)
    run(folder / "log", **settings | dict(max_iters=6), out_dir=sound, eval_interval=3, data_dir=data_dir)
    shutil.copytree(sound, folder / "right")
    run(folder / "log", **settings, out_dir=folder / "right", data_dir=data_dir, init_from="resume")
    expected = load_file(folder / "right" / "last" / "model.safetensors")
    out_dir, data, found = folder / "run" / "out", folder / "work" / "tiny", Counter()
    for i in range(count):
        restore(out_dir, sound)
        restore(data, data_dir / "tiny")
        where = (out_dir / "last", CHECKPOINT) if i % 3 else (data, DATA_SET)
        path = where[0] / rng.choice(where[1])
        way, number, sums = rng.choice(ways(path)), rng.randrange(2**32), rng.choice(SUMS_AFTER)
        damage(path, way, number, sums)
        believed = ok(lambda: same_model(out_dir / "last", *load_model(out_dir / "last"), folder / "scratch") or 1 / 0)
        intact = ok(lambda: same_model(sound / "last", *load_model(out_dir / "last"), folder / "scratch") or 1 / 0)
        status = wait(forked(train.main, folder / "log", out_dir=out_dir, data_dir=data.parent, init_from="resume",
                             max_iters=7, device="cpu"))  # fmt: skip
        text = (folder / "log").read_text()
        if status in (1, 2) and "Traceback" not in text and text.splitlines()[-1].startswith("train.py: "):
            outcome = "refused in one line"
        elif status != 0:
            outcome = "HANG" if status is None else f"TRACEBACK or crash ({status})"
        else:
            ended = load_file(out_dir / "last" / "model.safetensors")
            equal = ended.keys() == expected.keys() and all(torch.equal(ended[n], expected[n]) for n in ended)
            plain = "as if nothing had happened" if equal else "what the files said, sums rewritten or absent"
            outcome = plain if equal or (sums != "kept" and (believed or intact)) else "WRONG RESULT"
        found[outcome] += 1
        if outcome.isupper() or outcome.split()[0].isupper():
            print(f"{i}: {outcome}: {path.name}, {way}, {number}, {sums}\n{text}", flush=True)
        if (i + 1) % 100 == 0:
            print(f"{i + 1}: {dict(found)}", flush=True)
    print(f"{count} damaged inputs: {dict(found)}")


def small_run() -> tuple[GPT, list, object]:
    torch.manual_seed(0)
    tokenizer = make_tokenizer("char", ["trees and stones"], 300)
    model = GPT(GPTConfig(16, tokenizer.vocab_size, 2, 2, 16))
    optimizers = make_optimizers(model, "muon", 0.01, 0.1, (0.9, 0.95))
    update(model, optimizers, 16)
    return model, optimizers, tokenizer


def update(model: GPT, optimizers: list, length: int) -> None:
    ids = torch.randint(model.config.vocab_size, (1, length + 1))
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    apply_gradients(model, optimizers, torch.amp.GradScaler("cpu", enabled=False), 1e-4, 1.0)


def disk(folder: Path) -> None:
    """Save on a tmpfs with room for 0, 1, 2 ... pages, then files, until a save succeeds; and on a read-only one."""
    place, page = folder / "small", os.sysconf("SC_PAGE_SIZE")
    place.mkdir()
    model, optimizers, tokenizer = small_run()
    found = Counter()

    def attempt(kind: str) -> bool:
        """A save of update 2 by a new run of the Saver; whether it succeeded. Either way all has to be whole."""
        saver = Saver(place / "out", model, optimizers, tokenizer, HERE, 3.0, tell=lambda text: None)
        saver.save(COMPLETE | {"step": 2}, val_loss=2.0)
        problem = saver.wait()
        training = load_training(place / "out" / "last")
        load_model(place / "out" / "best")
        assert problem is None or (training["step"] == 1 and "could not be saved" in problem), problem
        assert not list((place / "out").glob("*.new"))
        found[f"{kind}: {'succeeded' if problem is None else 'told, the earlier checkpoint whole'}"] += 1
        return problem is None

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True)
    try:
        saver = Saver(place / "out", model, optimizers, tokenizer, HERE)
        for kind in ("pages", "files"):
            for room in range(1000):
                saver.best_val_loss = math.inf
                saver.save(COMPLETE | {"step": 1}, val_loss=3.0)
                assert saver.wait() is None
                free = os.statvfs(place)
                if kind == "pages":
                    (place / "filler").write_bytes(bytes((free.f_bavail - room) * page))
                else:
                    limit = f"remount,size=16m,nr_inodes={free.f_files - free.f_ffree + room}"
                    subprocess.run(["mount", "-o", limit, place], check=True)
                succeeded = attempt(kind)
                (place / "filler").unlink(missing_ok=True)
                subprocess.run(["mount", "-o", "remount,size=16m,nr_inodes=10000", place], check=True)
                if succeeded:
                    break
        saver.save(COMPLETE | {"step": 1}, val_loss=1.0)
        saver.wait()
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert not attempt("read-only")
    finally:
        subprocess.run(["umount", place], check=True)
    for kind, n in found.items():
        print(f"{kind}: {n}")


def stall(folder: Path) -> None:
    """What a save of a GPT-2 of 124M parameters costs the loop, and how much slower updates are while it is written."""
    torch.set_num_threads(2)
    model = GPT(GPTConfig(1024, 50257, 12, 12, 768, bias=False))
    optimizers = make_optimizers(model, "adamw", 6e-4, 0.1, (0.9, 0.95))
    saver = Saver(folder / "out", model, optimizers, make_tokenizer("gpt2", [], 0), HERE)
    metrics = Metrics(folder / "out", active=True)
    for step in range(6000):
        metrics.write(step=10 * step, train_loss=3.0, lr=1e-3, grad_norm=1.0)

    def timed(work, *arguments, **named) -> float:
        started = time.perf_counter()
        work(*arguments, **named)
        return time.perf_counter() - started

    update(model, optimizers, 128)
    alone = [timed(update, model, optimizers, 128) for _ in range(6)]
    stalls, writes, beside = [], [], []
    for step in range(1, 5):
        started = time.perf_counter()
        stalls.append(timed(saver.save, COMPLETE | {"step": step}, val_loss=5.0 - step))
        while not saver._job.done():
            beside.append(timed(update, model, optimizers, 128))
        saver.wait()
        writes.append(time.perf_counter() - started)
    alone += [timed(update, model, optimizers, 128) for _ in range(6)]
    draws = [timed(metrics.draw) for _ in range(3)]
    size = sum(path.stat().st_size for name in ("last", "best") for path in (folder / "out" / name).iterdir())
    for name, seconds in (
        ("save() returns after", stalls),
        (f"last and best, {size / 1e9:.2f} GB, on disk (updates going on beside it)", writes),
        ("an update of 128 tokens, alone", alone),
        ("an update of 128 tokens, beside the writing", beside),
        ("loss.png of 6,000 lines", draws),
    ):
        print(f"{name}: median {statistics.median(seconds):.2f} s of {', '.join(f'{s:.2f}' for s in seconds)}")


def main() -> None:
    work = {"kills": kills, "damage": damaged, "disk": disk, "stall": stall}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=work)
    parser.add_argument("count", type=int, nargs="*", help="of kills and damage: how many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        work[arguments.work](Path(folder), *arguments.count)


if __name__ == "__main__":
    run_script(main)
