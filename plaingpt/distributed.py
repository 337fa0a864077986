"""Device, precision and processes: one object for one process or many, on CPU, CUDA or MPS.

dist = connect()  # alone, or in every process that torchrun started
total = dist.sum(1.0)
"""

import concurrent.futures
import contextlib
import dataclasses
import gc
import glob
import os
import re
import shutil
import signal
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as torch_dist

from plaingpt.console import UserError, cores, counted, is_rank_0, note, one_line
from plaingpt.workarounds import rendezvous_store

# Dense half-precision TFLOP/s of matrix products, from the makers' data sheets; the first name that matches counts
PEAK_TFLOPS = {
    "B200": 2250, "H200 NVL": 835, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989,
    "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "V100-PCIE": 112, "V100": 125, "T4": 65, "RTX 5090": 209,
    "RTX 4090": 165, "RTX 3090": 71, "MI300X": 1307,
}  # fmt: skip


@dataclass(frozen=True)
class Distributed:
    device: torch.device
    dtype: torch.dtype
    """precision of matrix products; parameters and optimizer state are float32"""
    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    """processes on this node"""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def peak_flops(self) -> float | None:
        """Half-precision FLOP/s of the GPUs of all processes; None if unknown."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        name = torch.cuda.get_device_name(self.device)
        another = "(?! (Ti|D|Laptop)|.* MIG )"  # GPUs of other speed with the same beginning, and parts of a GPU
        peak = next((tflops for gpu, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{gpu}\b{another}", name)), None)
        return peak * 1e12 * self.world_size if peak else None

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def per_process(self, micro_steps: int) -> int:
        """How many of a step's micro-steps each process computes; UserError if they cannot be divided equally."""
        if micro_steps % self.world_size:
            multiple = (micro_steps // self.world_size + 1) * self.world_size
            raise UserError(
                f"gradient_accumulation_steps={micro_steps} must be a multiple of the number of processes, "
                f"{self.world_size}: it counts the micro-steps of all; give {multiple}, say, and adjust batch_size"
            )
        return micro_steps // self.world_size

    def to_device(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Copies on the device. On CUDA the host does not wait: they go through pinned memory."""
        if self.device.type == "cuda":
            # contiguous: other tensors would be copied through pageable memory, a CPU-GPU sync point
            return [tensor.contiguous().pin_memory().to(self.device, non_blocking=True) for tensor in tensors]
        return [tensor.to(self.device) for tensor in tensors]

    def sum(self, number: float) -> float:
        """The sum of a number over all ranks, through gloo on the CPU: no GPU synchronization. All ranks."""
        return self._reduce(number, torch_dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        """The largest of a number over all ranks. All ranks."""
        return int(self._reduce(number, torch_dist.ReduceOp.MAX))

    def all_equal(self, number: int) -> bool:
        """Whether all ranks have the same number. All ranks."""
        return self.max(number) == -self.max(-number)

    def wait(self, job: Future | None) -> None:
        """Wait until the main process's `job` is done, and raise what it raised there. All ranks.

        They exchange a message every second, so the job may take longer than `timeout`.
        """
        while self.max(bool(job and concurrent.futures.wait([job], timeout=1).not_done)):
            pass
        if job:
            job.result()

    def _reduce(self, number: float, operation) -> float:
        reduced = torch.tensor(number, dtype=torch.float64)
        if self.world_size > 1:
            torch_dist.all_reduce(reduced, operation)
        return reduced.item()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock measures its work."""
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()

    def close(self) -> None:
        if torch_dist.is_initialized():
            gc.unfreeze()
            gc.collect()  # a wrapped model that is still alive keeps the group's threads, and the process would abort
            torch_dist.destroy_process_group()


class StopSignal:
    """The number of the signal that asked the run to stop: SIGTERM, SIGINT, SIGHUP or SIGUSR1; or 0.

    The training loop checks it, saves and stops; Ctrl-C after that stops at once.
    """

    def __init__(self):
        self.number = 0
        for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)  # Windows lacks some
            if number and signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._asked)

    def _asked(self, number: int, frame) -> None:
        self.number = number
        if is_rank_0():
            with contextlib.suppress(OSError):  # the terminal may be gone; os.write, as the signal may interrupt print
                alone = "TORCHELASTIC_RUN_ID" not in os.environ  # otherwise torchrun gets Ctrl-C
                again = b"; Ctrl-C now exits at once" if alone else b""
                os.write(2, b"\nsaving and stopping" + again + b"\n")
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # so that it works even if a collective hangs


def connect(device: str = "auto", dtype: str = "auto", timeout: float = 600) -> Distributed:
    """Choose device and precision, and join the other processes if torchrun started any.

    timeout: seconds that a process waits for another before it fails.
    """
    # torchrun sets these; other launchers may not set LOCAL_WORLD_SIZE
    rank, local_rank = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK"))
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} and WORLD_SIZE={world_size} in the environment: start processes with torchrun")
    chosen = _choose_device(device, local_rank, world_size)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.allow_tf32 = True
    if world_size > 1:
        wait = timedelta(seconds=timeout)
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        store = rendezvous_store(wait)
        torch_dist.init_process_group(backend, timeout=wait, store=store, rank=rank, world_size=world_size)
    dist = Distributed(chosen, _choose_dtype(dtype, chosen), rank, world_size)
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or 0) or dist.max(local_rank) + 1
    dist = dataclasses.replace(dist, local_world_size=local_world_size)
    if chosen.type == "cpu" and world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's default
        torch.set_num_threads(max(1, cores() // dist.local_world_size))
    return dist


def _choose_device(name: str, local_rank: int, world_size: int) -> torch.device:
    if name == "auto":
        mps = torch.backends.mps.is_available() and world_size == 1  # several processes cannot share it
        name = "cuda" if torch.cuda.is_available() or _has_gpu() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # torchrun gives each process a GPU of its own
            device = torch.device("cuda", local_rank if world_size > 1 else device.index or 0)
            torch.cuda.init()  # says what is wrong: no CUDA build of torch, an old driver
            if device.index >= torch.cuda.device_count():
                found = counted(torch.cuda.device_count(), "GPU")
                raise RuntimeError(f"no GPU {device.index}; torch finds {found}, and each process needs its own")
            _check_capability(device)
        elif device.type != "cpu" and (device.type != "mps" or world_size > 1):
            raise RuntimeError("not supported" + (" with several processes" if device.type == "mps" else ""))
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={name}: {one_line(error)}; use cpu, cuda, cuda:1 or mps") from error
    return device


def _has_gpu() -> bool:
    """Whether there is an NVIDIA GPU and a CUDA build of torch, even if they do not work together (an old driver).
    Prints a note if only the build is missing."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    driver = shutil.which("nvidia-smi") if os.name == "nt" else glob.glob("/dev/nvidia[0-9]*")
    found = bool(driver) and not hidden
    if found and not torch.version.cuda:
        note("the NVIDIA GPU is not used: this torch is built for CPUs only; docs/machines.md says how to replace it")
    return found and torch.version.cuda is not None


def _check_capability(device: torch.device) -> None:
    """Refuse a GPU that this build of torch has no kernels for."""
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(arch.partition("_")[2].rstrip("af")) for arch in torch.cuda.get_arch_list() if not torch.version.hip]
    if built and 10 * major + minor < min(built):
        raise UserError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) is too old for torch "
            f"{torch.__version__}, which has kernels for {min(built) / 10} and above; for 5.0 and above, install a "
            f"build for CUDA 12.6 (pip install torch=={torch.__version__.partition('+')[0]}+cu126 "
            "--index-url https://download.pytorch.org/whl/cu126), or use --device=cpu"
        )


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 only where it is fast: emulated, it is slower than float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    cpu = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    # Intel's CPUs without AMX multiply bfloat16 at half the speed of float32, AMD's at twice
    fast = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "Intel" not in cpu.get("cpu_name", ""))
    return torch.bfloat16 if fast else torch.float32
