"""Faults between two hosts, simulated by network namespaces with a torchrun each: how soon training continues.

python bench/hosts.py                  # each fault ten times; needs root and iproute2
python bench/hosts.py host cut --times=3

Each run must end with exactly the weights, optimizer state and losses of an undisturbed run.
"""

import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import TINY, flags, made_text, run_main
from hosts import Host, hosts, why_not
from runs import same_run
from test_hosts import REPLACEABLE, RUN

from plaingpt.console import UserError, run_script
from plaingpt.settings import PositiveInt, load_settings

TIMEOUT = 10  # seconds that a process waits for the other
CUT = 1.0


def worker(two: list[Host], start: Callable[[Host], None]) -> None:
    """SIGKILL of the second host's worker; both torchruns restart their workers"""
    two[1].kill(two[1].workers())


def first_worker(two: list[Host], start: Callable[[Host], None]) -> None:
    """SIGKILL of the first host's worker, rank 0, which writes the checkpoints"""
    two[0].kill(two[0].workers())


def host(two: list[Host], start: Callable[[Host], None]) -> None:
    """SIGKILL of every process on the second host; its torchrun is restarted at once"""
    two[1].kill()
    start(two[1])


def first_host(two: list[Host], start: Callable[[Host], None]) -> None:
    """SIGKILL of every process on the first host, which has torchrun's store; both restart once the second ends"""
    two[0].kill()
    two[1].torchruns[-1].wait(120)
    start(two[0])
    start(two[1])


def cut(two: list[Host], start: Callable[[Host], None]) -> None:
    """The second host's link is down for 1 s"""
    two[1].link("down")
    time.sleep(CUT)
    two[1].link("up")


def long_cut(two: list[Host], start: Callable[[Host], None]) -> None:
    """The second host's link is down for twice the timeout; a torchrun that has ended is then restarted"""
    two[1].link("down")
    time.sleep(2 * TIMEOUT)
    two[1].link("up")
    for one in two:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.torchruns[-1].wait(1)
            start(one)


FAULTS = {f.__name__.replace("_", "-"): f for f in (worker, first_worker, host, first_host, cut, long_cut)}


@dataclass(frozen=True)
class HostsConfig:
    faults: tuple[str, ...] = ()
    """worker, first-worker, host, first-host, cut, long-cut (default: all)"""
    times: PositiveInt = 10
    """repetitions of each fault"""


def trial(fault: Callable | None, folder: Path, arguments: list[str]) -> float:
    """Run once, with the fault after step 12 of 32; seconds from the start of the fault to the next logged step."""
    seconds = 0.0
    with hosts(folder) as two:

        def start(one: Host) -> None:
            one.torchruns.append(one.torchrun(ROOT / "train.py", *arguments, **REPLACEABLE))

        for one in two:
            one.torchruns = []
            start(one)
        if fault:
            two[0].wait_for("step 12/", two[0].torchruns[-1])
            began = time.monotonic()
            written = len(two[0].log.read_text())
            fault(two, start)
            again = r"step \d+/" if fault is cut else r"2 x cpu.*step \d+/"
            two[0].wait_for(again, two[0].torchruns[-1], after=written)
            seconds = time.monotonic() - began
        statuses = [one.torchruns[-1].wait(120) for one in two]
        assert statuses == [0, 0], (statuses, *(one.log.read_text() for one in two))
    return seconds


def main() -> None:
    config, _ = load_settings(HostsConfig, positional="faults")
    if unknown := set(config.faults) - set(FAULTS):
        raise UserError(f"no fault {unknown.pop()}; there are {', '.join(FAULTS)}")
    if reason := why_not():
        raise UserError(reason)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.txt").write_text(made_text(4000))
        made = dict(name="tiny", tokenizer="char", val_fraction=0.1, data_dir=folder)
        with contextlib.redirect_stderr(io.StringIO()):
            run_main("prepare_data", folder / "tiny.txt", *flags(**made))

        def arguments(out: str) -> list[str]:
            return flags(**(TINY | RUN | dict(data_dir=folder, out_dir=folder / out, timeout=TIMEOUT)))

        trial(None, folder, arguments("straight"))
        print("| fault | same result | seconds until the next step: median, longest |")
        print("| --- | --- | --- |")
        for name in config.faults or FAULTS:
            times, same = [], 0
            for i in range(config.times):
                out = f"{name}-{i}"
                try:
                    times.append(trial(FAULTS[name], folder, arguments(out)))
                    same += same_run(folder / out, folder / "straight")
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    print(f"{out}: {error}", file=sys.stderr)
            spans = f"{statistics.median(times):.1f}, {max(times):.1f}" if times else ""
            print(f"| {FAULTS[name].__doc__} | {same} of {config.times} | {spans} |", flush=True)


if __name__ == "__main__":
    run_script(main)
