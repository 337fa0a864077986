"""Hundreds of faults: kills, damaged inputs, loading while a run saves, and full disks.

python bench/faults.py kills 200      # SIGKILL, most of them during a save; are the final weights the same?
python bench/faults.py damage 1000    # damage one file of a checkpoint or data set; right result or one-line error?
python bench/faults.py loads 200      # load a model while it is replaced; is it one of those saved?
python bench/faults.py disk           # save on a tmpfs with room for 0, 1, 2 ... pages and files; needs root

Runs are real runs of train.py in other processes, forked from one that has imported everything.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
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
from plaingpt.checkpoint import load_model, save_model
from plaingpt.console import run_script
from plaingpt.distributed import Distributed
from plaingpt.files import existing, new_directory
from plaingpt.optimizer import apply_gradients, make_optimizers
from plaingpt.run_state import RunState, Saver, load_state
from plaingpt.tokenizer import make_tokenizer

TINY = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=4, gradient_accumulation_steps=2, dropout=0.1,
    optimizer="muon", warmup_iters=5, lr_decay_iters=3000, learning_rate=1e-3, min_lr=1e-4, eval_iters=2,
    log_interval=1, sample_tokens=0, device="cpu", dtype="float32", compile=False, dataset="tiny",
)  # fmt: skip
HERE = Distributed(torch.device("cpu"), torch.float32)


def forked(main, log: Path, *arguments, **settings) -> int:
    """Start `main` of a script as a process; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    with open(log, "w") as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
        try:
            sys.argv = [f"{main.__module__}.py", *map(str, arguments), *(f"--{k}={v}" for k, v in settings.items())]
            torch.manual_seed(time.time_ns())  # a new process would not inherit the random state
            run_script(main)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
    os._exit(status)


def wait(pid: int, seconds: float = 60.0) -> int | None:
    """The exit status, negative for a signal; None if the process had to be killed after that time."""
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
    """Whether `work` succeeds in another process."""
    pid = os.fork()
    if pid:
        return wait(pid) == 0
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(BaseException):
        work()
        os._exit(0)
    os._exit(1)


def kills(folder: Path, count: int) -> None:
    """Kill and resume a run `count` times while it saves after every step; compare it with an undisturbed run."""
    data_dir, out_dir, rng = prepare(folder), folder / "killed", random.Random(1)
    settings = TINY | dict(data_dir=data_dir, max_iters=10**6)
    found, reached, started = Counter(), 0, time.monotonic()

    def wait_for(pid: int, names: list[str], seconds: float) -> None:
        """Wait until a save has made one of these temporary directories."""
        end = time.monotonic() + seconds
        while not any(os.path.exists(out_dir / name) for name in names) and time.monotonic() < end:
            assert os.waitpid(pid, os.WNOHANG)[0] == 0, (folder / "log").read_text()
            time.sleep(0.0002)

    for i in range(count):
        pid = forked(train.main, folder / "log", **settings, out_dir=out_dir, init_from="auto", eval_interval=1)
        if i % 4 == 0:  # at any time, including start-up
            time.sleep(rng.uniform(0, 1.5))
        else:  # during a save
            wait_for(pid, [".best.new", ".last.new"], 60)
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
            elif reached:
                found[f"{name} LOST"] += 1
        if existing(out_dir / "last"):
            step = load_state(out_dir / "last")[0].step
            assert step >= reached, "a later checkpoint was lost"
            reached = step
        if (i + 1) % 20 == 0:
            print(f"{i + 1} kills, step {reached}, {time.monotonic() - started:.0f} s", flush=True)
    last = reached + 3
    run(folder / "log", **settings | dict(max_iters=last), out_dir=out_dir, init_from="auto", eval_interval=1)
    run(folder / "log", **settings | dict(max_iters=last), out_dir=folder / "straight", eval_interval=1000)
    same = [
        (out_dir / "last" / name).read_bytes() == (folder / "straight" / "last" / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
    ]
    print(f"{count} kills over {last} steps: {dict(found)}")
    print(f"weights and optimizer state are identical to those of an undisturbed run: {same}")


def damaged(folder: Path, count: int) -> None:
    """Damage one file `count` times; each time resume, train one step, save, and load the model."""
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
            plain = "the same result" if equal else "the files as damaged, checksums rewritten or removed"
            outcome = plain if equal or (sums != "kept" and (believed or intact)) else "WRONG RESULT"
        found[outcome] += 1
        if outcome.isupper() or outcome.split()[0].isupper():
            print(f"{i}: {outcome}: {path.name}, {way}, {number}, {sums}\n{text}", flush=True)
        if (i + 1) % 100 == 0:
            print(f"{i + 1}: {dict(found)}", flush=True)
    print(f"{count} damaged inputs: {dict(found)}")


def loads(folder: Path, count: int) -> None:
    """Load a model `count` times while another process replaces it: the n-th save writes n into every parameter."""
    tokenizer, stop = make_tokenizer("char", ["trees and stones"], 300), folder / "stop"
    model = GPT(GPTConfig(64, tokenizer.vocab_size, 12, 2, 64))

    def save(number: int) -> None:
        with torch.no_grad(), new_directory(folder / "last") as new:
            for parameter in model.parameters():
                parameter.fill_(number)
            save_model(new, model, tokenizer)

    save(1)
    pid = os.fork()
    if not pid:
        for number in range(2, 10**6):
            save(number)
            if stop.exists():
                os._exit(number % 256)
            time.sleep(0.5)  # a run saves less often than a model can be read twice
    found, longest, started = Counter(), 0.0, time.monotonic()
    for _ in range(count):
        began = time.monotonic()
        weights = load_model(folder / "last")[0].weights()
        numbers = {value for weight in weights.values() for value in weight.unique().tolist()}
        found["of one save" if len(numbers) == 1 else "MIXED"] += 1
        longest = max(longest, time.monotonic() - began)
    stop.touch()
    wait(pid)
    saves = int(load_model(folder / "last")[0].transformer.wpe.weight[0, 0])
    seconds = f"{time.monotonic() - started:.0f} s, the longest {longest:.2f} s"
    print(f"{count} loads beside {saves} saves in {seconds}: {dict(found)}")


def disk(folder: Path) -> None:
    """Save on a tmpfs with room for 0, 1, 2 ... pages, then files, until a save succeeds; then on a read-only one."""
    place, page = folder / "small", os.sysconf("SC_PAGE_SIZE")
    place.mkdir()
    torch.manual_seed(0)
    tokenizer, found = make_tokenizer("char", ["trees and stones"], 300), Counter()
    model = GPT(GPTConfig(16, tokenizer.vocab_size, 2, 2, 16))
    optimizers = make_optimizers(model, "muon", 0.01, 0.1, (0.9, 0.95))
    ids = torch.randint(tokenizer.vocab_size, (1, 17))
    model(ids[:, :-1], ids[:, 1:])[1].backward()
    apply_gradients(list(model.parameters()), optimizers, torch.amp.GradScaler("cpu", enabled=False), 1e-4, 1.0)

    def save(step: int, val_loss: float) -> str | None:
        saver = Saver(place / "out", RunState(step=step), model, optimizers, tokenizer, HERE)
        saver.best = val_loss + 1, step
        with contextlib.redirect_stderr(io.StringIO()):
            saver.save(val_loss)
            return saver.wait()

    def attempt(kind: str) -> bool:
        """Save step 2; returns whether that succeeded. In any case both checkpoints must be complete."""
        problem = save(2, val_loss=2.0)
        step = load_state(place / "out" / "last")[0].step
        load_model(place / "out" / "best")
        assert problem is None or (step == 1 and "could not be saved" in problem), problem
        assert not list((place / "out").glob(".*.new"))
        found[
            f"{kind}: {'succeeded' if problem is None else 'failed with a message, earlier checkpoint complete'}"
        ] += 1
        return problem is None

    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True)
    try:
        for kind in ("pages", "files"):
            for room in range(1000):
                assert save(1, val_loss=3.0) is None
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
        assert save(1, val_loss=1.0) is None
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        assert not attempt("read-only")
    finally:
        subprocess.run(["umount", place], check=True)
    for kind, n in found.items():
        print(f"{kind}: {n}")


def main() -> None:
    work = {"kills": kills, "damage": damaged, "loads": loads, "disk": disk}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=work)
    parser.add_argument("count", type=int, nargs="*", help="number of kills, damages or loads")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        work[arguments.work](Path(folder), *arguments.count)


if __name__ == "__main__":
    run_script(main)
