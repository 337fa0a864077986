"""The machine as the training loop sees it: one frozen object for one process or many, on CPU, CUDA or MPS."""

import concurrent.futures
import contextlib
import gc
import logging
import os
import re
import secrets
import signal
import time
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from plaingpt.console import RunFailed, UserError, cores, one_line
from plaingpt.cpu import keep_freed_memory

# Dense half-precision matrix-product limits in TFLOP/s, from the makers' data sheets; the first name that fits counts.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "A100": 312, "L40S": 362,
    "L4": 121, "A10": 125, "V100": 125, "T4": 65, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
}  # fmt: skip


@dataclass(frozen=True)
class Distributed:
    device: torch.device
    dtype: torch.dtype
    """what matrix products are computed in; parameters and optimizer state are float32"""
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s of all processes' cards at their half-precision limit, or None where that limit is not known."""
        known = self.device.type == "cuda" and self.dtype != torch.float32
        name = torch.cuda.get_device_name(self.device) if known else ""
        peak = next((tflops for card, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{card}\b", name)), None)
        return peak * 1e12 * self.world_size if peak else None

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def share(self, micro_steps: int) -> int:
        """How many of an update's micro-steps are each process's."""
        if micro_steps % self.world_size:
            raise UserError(
                f"gradient_accumulation_steps={micro_steps} must be a multiple of the number of processes, "
                f"{self.world_size}: it counts the micro-steps of all of them"
            )
        return micro_steps // self.world_size

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Copies on the device; on CUDA without waiting, from pinned memory."""
        if self.device.type == "cuda":
            # contiguous: a copy of anything else would go by pageable memory, and wait
            return [tensor.contiguous().pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        return [tensor.to(self.device) for tensor in tensors]

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all ranks. All ranks; through the CPU, so the device is not waited for."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def max(self, *numbers: int) -> list[int]:
        """The largest of each number over all ranks. All ranks, as `sum`."""
        return [int(number) for number in self._reduce(numbers, dist.ReduceOp.MAX)]

    def all_equal(self, number: int) -> bool:
        """Whether the number is the same on all ranks. All ranks."""
        lowest, highest = self.max(-number, number)
        return -lowest == highest

    def wait(self, job: Future | None) -> None:
        """Until the main process's `job` is done; raises what it did. All ranks, who ask one another every second:
        so it may take longer than a process waits for another.
        """
        while self.max(bool(job and concurrent.futures.wait([job], timeout=1).not_done))[0]:
            pass
        if job:
            job.result()

    def _reduce(self, numbers: tuple, operation) -> list:
        if self.world_size == 1:
            return list(numbers)
        totals = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(totals, operation)
        return totals.tolist()

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that a clock tells the truth."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def close(self) -> None:
        if dist.is_initialized():
            gc.unfreeze()
            gc.collect()  # a wrapped model that is still alive holds the group's threads, and the process would abort
            dist.destroy_process_group()


class StopSignal:
    """Which of SIGTERM, SIGINT, SIGHUP and SIGUSR1 (Slurm's warning) asked the run to end, or 0.

    The loop looks at it between updates and saves before it leaves; a second Ctrl-C leaves at once.
    """

    def __init__(self):
        self.number = 0
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows does not have them all
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._asked)

    def _asked(self, number: int, frame) -> None:
        self.number = number
        if os.environ.get("RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal may have gone; and print may be what was interrupted
                os.write(2, b"\nending after this update; Ctrl-C leaves at once\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once, even out of a collective that hangs


def connect(device: str = "auto", dtype: str = "auto", timeout: float = 600) -> Distributed:
    """Join the other processes, if torchrun started any, and choose what was left to the machine.

    timeout: seconds that one waits for another, and then fails.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size, local_world_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    chosen = _choose_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cpu" and world_size > 1:  # torchrun allows each one thread; the cores are there to be shared out
        torch.set_num_threads(max(1, cores() // local_world_size))
        # It warns on every rank that gloo's all-to-all (Muon's, sharded) is an all-gather of which a part is kept.
        logging.getLogger("torch.distributed.tensor._collective_utils").setLevel(logging.ERROR)
    if world_size > 1:
        wait = timedelta(seconds=timeout)
        store, *_ = next(rendezvous("env://", timeout=wait))
        store = dist.PrefixStore(_meet(store, rank, world_size), store)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world_size)
    return Distributed(chosen, _choose_dtype(dtype, chosen), rank, world_size)


def _meet(store: dist.Store, rank: int, world_size: int) -> str:
    """A name for this start of the workers, the same in all of them and never used before.

    torchrun's store outlives its workers, and holds the addresses of those that died: started anew under the same keys
    (torch 2.13 adds no prefix) some connect to the dead, and wait for them. torchrun's count of restarts is no prefix:
    each host has its own. So every other rank says hello with a number drawn anew, and rank 0 answers all of them, the
    dead too, with a name drawn anew, until as many have said that they have it as are alive.
    """
    drawn = secrets.token_hex(8)
    if rank:
        store.set(f"hello/{rank}", drawn)
        try:
            name = store.get(f"answer/{drawn}").decode()
        except dist.DistError as error:
            raise RunFailed(f"process 0 did not answer within {store.timeout}: {one_line(error)}") from error
        store.add(f"have/{name}", 1)
        return name
    end = time.monotonic() + store.timeout.total_seconds()
    while (here := store.add(f"have/{drawn}", 0)) < world_size - 1:
        for other in range(1, world_size):
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", drawn)
        if time.monotonic() > end:
            raise RunFailed(f"only {here + 1} of {world_size} processes came within {store.timeout}")
        time.sleep(0.01)
    return drawn


def _choose_device(name: str, local_rank: int, world_size: int) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1  # several processes cannot share it
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device={name}: there is no such device; use cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        index = local_rank if world_size > 1 else device.index or 0
        if not torch.cuda.is_available():
            raise UserError(f"--device={name}: torch {torch.__version__} finds no CUDA device; use --device=cpu")
        if index >= torch.cuda.device_count():
            raise UserError(f"--device={name}: process {index} has no card, there are {torch.cuda.device_count()}")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device={name}: torch {torch.__version__} finds no Apple GPU; use --device=cpu")
    if device.type not in ("cpu", "mps"):
        raise UserError(f"--device={name}: use cpu, cuda, cuda:1 or mps")
    return device


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bf16 only where the processor has it: emulated, it is slower than fp32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16
    return torch.float32
