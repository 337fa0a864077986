"""Several hosts on one machine: network namespaces, joined by a bridge in a namespace of its own.

Each host has an address, sees only its own and the other hosts' network, and shares the disk. It needs Linux, root
and iproute2. Nothing is changed outside the namespaces, whose names carry the id of the process that made them.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT, child_environment

PREFIX = "plaingpt-"
ENDPOINT = "10.77.0.1:29500"  # on the first host, which therefore holds torchrun's store
# Dead after 3 s without a sign of life, where torchrun waits 15; a store that does not answer fails after 10, not 60
QUICK = "keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=10"


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


def why_not() -> str | None:
    """Why there can be no namespaces here, or None."""
    name = f"{PREFIX}{os.getpid()}-trial"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "bridge", "type", "bridge")
    except FileNotFoundError:
        return "there is no `ip` (iproute2)"
    except subprocess.SubprocessError as error:
        return f"network namespaces are not permitted: {(error.stderr or str(error)).strip()}"
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            remove(os.getpid())
    return None


class Host:
    def __init__(self, name: str, number: int, log: Path):
        self.name, self.address, self.log = name, f"10.77.0.{number + 1}", log

    def torchrun(self, *command: object, nodes: int = 2, max_restarts: int = 3, **environment: str) -> subprocess.Popen:
        """Start torchrun with one worker here, as the scheduler of a cluster would; what it says goes on in the log."""
        options = [f"--nnodes={nodes}", "--nproc_per_node=1", f"--max_restarts={max_restarts}"]
        options += ["--rdzv_backend=c10d", f"--rdzv_endpoint={ENDPOINT}", f"--local_addr={self.address}"]
        options += [f"--rdzv_conf={QUICK},is_host={int(self.address in ENDPOINT)}", "--monitor_interval=0.1"]
        inside = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        environment = child_environment(GLOO_SOCKET_IFNAME="eth0", **environment)
        with open(self.log, "a") as log:
            return subprocess.Popen(
                [*inside, *options, *map(str, command)], env=environment, cwd=ROOT, stderr=log, stdout=log
            )

    def processes(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def workers(self) -> list[int]:
        """The processes that torchrun started."""
        here = self.processes()
        return [pid for pid in here if parent(pid) in here]

    def kill(self, pids: list[int] | None = None) -> None:
        """SIGKILL of the given processes here, or of all of them at once, as if the host lost its power."""
        for pid in self.processes() if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def link(self, state: str) -> None:
        """`up` or `down`: the cable."""
        ip("-n", self.name, "link", "set", "eth0", state)

    def wait_for(self, pattern: str, process: subprocess.Popen, seconds: float = 75, after: int = 0) -> None:
        """Until the log has the pattern, behind its first `after` characters; fails where `process` ends before, or
        the time is up."""
        end = time.monotonic() + seconds
        while not re.search(pattern, (text := self.log.read_text())[after:], re.DOTALL):
            assert process.poll() is None, f"ended with {process.returncode}\n{text}"
            assert time.monotonic() < end, f"no {pattern} after {seconds} s\n{text}"
            time.sleep(0.02)


def parent(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@contextlib.contextmanager
def hosts(folder: Path, count: int = 2) -> Iterator[list[Host]]:
    """That many hosts; their logs are in `folder`. Whatever runs on them in the end is killed."""
    clean()
    switch = f"{PREFIX}{os.getpid()}-switch"
    made = [Host(f"{PREFIX}{os.getpid()}-{n}", n, folder / f"host-{n}.log") for n in range(count)]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for n, host in enumerate(made):
            host.log.write_text("")
            ip("netns", "add", host.name)
            ip("-n", switch, "link", "add", f"port{n}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("-n", switch, "link", "set", f"port{n}", "master", "bridge", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host.name, "link", "set", device, "up")
            # The kernel gives a silent connection up after 3 s, not after a quarter of an hour: torchrun waits for that
            ip("netns", "exec", host.name, "sh", "-c", "echo 3 > /proc/sys/net/ipv4/tcp_retries2")
        yield made
    finally:
        remove(os.getpid())


def clean() -> None:
    """Remove what a run left that was killed itself."""
    owners = {int(owner) for owner in re.findall(rf"^{PREFIX}(\d+)-", ip("netns", "list"), re.MULTILINE)}
    for owner in owners:
        if not Path(f"/proc/{owner}").exists():
            remove(owner)


def remove(owner: int) -> None:
    for name in re.findall(rf"^{PREFIX}{owner}-\w+", ip("netns", "list"), re.MULTILINE):
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "del", name)
