"""train.py, stopped by signals, with one process and with two under torchrun."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, child_environment, run_main
from runs import PLAN, ROUNDING, TWO, largest_difference, records, same_run, torchrun, weights

from plaingpt.batches import EvalBatches, TrainBatches
from plaingpt.budget import Deadline
from plaingpt.distributed import StopSignal
from plaingpt.run_state import load_state


class Stopping:
    """`function`, in whose call number `call` this process gets a signal, and which is called `calls` times at most."""

    def __init__(self, function: Callable, number: int, call: int, calls: int):
        self.function, self.number, self.call, self.left = function, number, call, calls

    def __call__(self, *arguments):
        self.call, self.left = self.call - 1, self.left - 1
        if self.call == 0:
            os.kill(os.getpid(), self.number)
        assert self.left >= 0, "the run went on"
        return self.function(*arguments)


def test_a_stopped_run_saves_and_goes_on_exactly(tmp_path, train, resume, tiny_flags):
    settings = dict(eval_interval=10**6, sample_tokens=0, dropout=0.1, warmup_iters=0, lr_decay_iters=10**6, min_lr=0)
    flags = tiny_flags(tmp_path / "run", max_iters=10**6, **settings)
    command = [sys.executable, ROOT / "train.py", *flags]
    process = subprocess.Popen(command, cwd=tmp_path, env=child_environment(), stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        assert process.wait(600) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert "stopped by SIGTERM" in rest
    step = load_state(tmp_path / "run" / "last")[0].step
    assert step >= 3
    resume(tmp_path / "run", max_iters=step + 2)
    train(tmp_path / "straight", max_iters=step + 2, **settings)
    assert largest_difference(weights(tmp_path / "run"), weights(tmp_path / "straight")) == 0


@pytest.mark.parametrize("steps", [2, 4])
def test_a_stop_within_an_evaluation_saves_at_once_and_the_resumed_run_evaluates_again(
    tmp_path, tiny_flags, train, resume, monkeypatch, steps
):
    """The last evaluation, too: a run is complete with it."""
    settings = dict(eval_interval=2, max_iters=4, sample_tokens=0, learning_rate=1e-4) | PLAN
    train(tmp_path / "straight", **settings)
    stopping = Stopping(EvalBatches.batch, signal.SIGTERM, call=steps + 1, calls=steps + 1)  # two batches an evaluation
    with monkeypatch.context() as patch:
        patch.setattr(EvalBatches, "batch", lambda *arguments: stopping(*arguments))
        ended = run_main("train", *tiny_flags(tmp_path / "run", **settings))
    assert ended.status == 128 + signal.SIGTERM, ended.err
    assert f"stopped by SIGTERM after step {steps}, saved" in ended.err
    evaluated = [record["step"] for record in records(tmp_path / "run") if "val_loss" in record]
    assert evaluated == list(range(0, steps, 2))
    resume(tmp_path / "run")
    assert [record["step"] for record in records(tmp_path / "run") if "val_loss" in record] == [0, 2, 4]
    for name in ("last", "best"):
        path = f"{name}/model.safetensors"
        assert largest_difference(weights(tmp_path / "run", path), weights(tmp_path / "straight", path)) == 0


@pytest.mark.parametrize("steps", [0, 2])
def test_a_stop_is_heard_within_a_long_step_and_leaves_no_half_of_it(tmp_path, tiny_flags, train, monkeypatch, steps):
    settings = dict(gradient_accumulation_steps=8, sample_tokens=0, eval_interval=100, max_iters=4) | PLAN
    train(tmp_path / "straight", **settings)
    if steps:
        train(tmp_path / "run", **settings | {"max_iters": steps})
    stopping = Stopping(TrainBatches.micro_batch, signal.SIGINT, call=3, calls=4)
    with monkeypatch.context() as patch:
        patch.setattr(TrainBatches, "micro_batch", lambda *arguments: stopping(*arguments))
        ended = run_main("train", *tiny_flags(tmp_path / "run", **settings, init_from="auto"))
    assert ended.status == 128 + signal.SIGINT, ended.err
    assert f"stopped by SIGINT after step {steps}" in ended.err
    assert (tmp_path / "run" / "last").exists() == (steps > 0)
    train(tmp_path / "run", **settings, init_from="auto")
    assert largest_difference(weights(tmp_path / "run"), weights(tmp_path / "straight")) == 0


def test_a_run_that_is_stopped_before_its_first_step_leaves_last_and_a_recipe(tmp_path, tiny_flags, train, monkeypatch):
    train(tmp_path / "run", max_iters=4, eval_interval=9, keep_every=2)
    flags = [f"--{name}={value}" for name, value in dict(out_dir=tmp_path / "run", sample_tokens=0).items()]
    back = [*flags, "--init_from=resume:step-000002", next(f for f in tiny_flags("") if f.startswith("--data_dir"))]
    timed = [*tiny_flags(tmp_path / "new", minutes=1), "--n_embd=16"]
    timed = [flag for flag in timed if not flag.startswith(("--max_iters", "--warmup_iters", "--lr_decay_iters"))]
    for arguments in (back, timed):
        stopping = Stopping(Deadline.corrected, signal.SIGINT, call=1, calls=2)
        with monkeypatch.context() as patch:
            patch.setattr(Deadline, "corrected", lambda *arguments, stopping=stopping: stopping(*arguments))
            ended = run_main("train", *arguments)
        assert ended.status == 128 + signal.SIGINT and "nothing new to save" in ended.err, ended.err
    assert load_state(tmp_path / "run" / "last")[0].step == 4
    assert (tmp_path / "new" / "recipe.py").exists()


def test_ctrl_c_after_another_signal_leaves_at_once():
    code = "import os, signal; from plaingpt.distributed import StopSignal; stop = StopSignal()\n"
    code += "os.kill(os.getpid(), signal.SIGUSR1); print(stop.number == signal.SIGUSR1, flush=True)\n"
    code += "os.kill(os.getpid(), signal.SIGINT); print('still here')"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "True\n")
    assert ended.stderr == "\nsaving and stopping; Ctrl-C now exits at once\n"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
def test_a_closed_terminal_stops_a_run_except_under_nohup(capfd):
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in names}
    try:
        for handler, number in ((signal.SIG_IGN, 0), (signal.SIG_DFL, signal.SIGHUP)):
            signal.signal(signal.SIGHUP, handler)
            stop = StopSignal()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.number == number
    finally:
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)
    assert capfd.readouterr().err.startswith("\nsaving and stopping")


def signalled(path: Path, step: int, name: str) -> Path:
    """A script that is train.py, but the second process sends itself a signal before that step, unless restarted."""
    path.write_text(f"""
import os, signal
import train
from plaingpt.console import run_script

train_step = train.train_step

def signalled(run, step, *arguments):
    if (step, run.dist.rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == ({step}, 1, "0"):
        os.kill(os.getpid(), signal.{name})
    return train_step(run, step, *arguments)

train.train_step = signalled
run_script(train.main)
""")
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_flags) -> Path:
    """The folder of an undisturbed run of two processes."""
    out_dir = tmp_path_factory.mktemp("two") / "both"
    ended = torchrun(tiny_flags(out_dir, **TWO))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("step 24/24") == 1
    assert "2 x cpu" in ended.stderr
    return out_dir


def test_two_processes_stop_together_and_any_number_goes_on(tmp_path, tiny_flags, both, resume):
    """One of the two gets the signal, and both stop after the same step: else they would wait for each other."""
    flags = tiny_flags(tmp_path / "two", **TWO)
    ended = torchrun(flags, script=signalled(tmp_path / "script.py", 3, "SIGUSR1"))
    assert "stopped by SIGUSR1 after step 3, saved" in ended.stderr and ended.returncode == 1
    assert load_state(tmp_path / "two" / "last")[0].step == 3
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    resume(tmp_path / "one")
    assert largest_difference(weights(tmp_path / "one"), weights(both)) < ROUNDING
    ended = torchrun([*flags, "--init_from=resume"])
    assert ended.returncode == 0, ended.stderr
    assert same_run(tmp_path / "two", both)


def test_a_run_whose_worker_is_killed_ends_as_an_undisturbed_one(tmp_path, tiny_flags, both):
    flags = tiny_flags(tmp_path / "run", **TWO | {"init_from": "auto"})
    ended = torchrun(flags, "--max_restarts=3", script=signalled(tmp_path / "script.py", 13, "SIGKILL"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("2 x cpu") >= 2, ended.stderr  # it was started again
    assert same_run(tmp_path / "run", both)


def test_a_full_disk_is_reported_and_the_next_save_tried_and_the_last_has_to_succeed(tmp_path, tiny_flags, resume):
    """A limit to the size of files is as good as a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        ended = run_main("train", *tiny_flags(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.status == 1
    printed = [line for line in ended.err.splitlines() if "could not be saved in" in line and line.startswith("step")]
    assert [line.split(" could not be saved")[0] for line in printed[::2]] == ["step 3", "step 6"]
    assert ended.err.splitlines()[-1].startswith("train.py: the last save failed: step 6 could not be saved in ")
    assert records(tmp_path / "run")[-1]["step"] == 6
