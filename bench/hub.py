"""Import and export of GPT-2's four sizes bit for bit, seconds to the first token, and peak memory.

python bench/hub.py                      # 20 GB of disk; --sizes=gpt2 for the smallest only

For each size, a directory of sharded safetensors as `transformers` writes it, with random weights (no network). Round
trip: `load_model`, `save_model`, and each tensor compared with the original. First token: the command
`sample.py --init_from=DIR`, once with the files dropped from the system's cache if possible, then with them cached.
Memory: of that process, as the system counts it every 10 ms: resident (VmHWM: all pages, those of mapped files
included), and anonymous (RssAnon: what only the end of the process releases). "Above a tiny model" subtracts what the
same command takes with a model of one tiny block: Python and torch.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors import safe_open

from model import GPT, GPTConfig
from plaingpt.checkpoint import load_model, save_model
from plaingpt.console import UserError, note, run_script
from plaingpt.settings import PositiveInt, load_settings
from plaingpt.tokenizer import gpt2

SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}


@dataclass(frozen=True)
class BenchConfig:
    sizes: str = ",".join(SIZES)
    """sizes to measure, separated by commas"""
    first_token: str = "gpt2,gpt2-xl"
    """sizes whose first token is timed"""
    dtype: str = "auto"
    """dtype of sample.py"""
    runs: PositiveInt = 3
    """runs of each command"""


def write_as_transformers(directory: Path, size: str) -> int:
    """Write a model of that size in shards; returns the bytes of its weights."""
    directory.mkdir()
    layers, heads, channels = SIZES[size]
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=channels))
    model.save_pretrained(directory, max_shard_size="1GB")
    return sum(parameter.numel() * 4 for parameter in model.parameters())


def tensors(directory: Path) -> dict[str, tuple[Path, str]]:
    """{name: (file, name in the file)} of all tensors in a directory, by OpenAI's names, which have no prefix."""
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name.removeprefix("transformer."): (file, name) for name in opened.keys()}  # noqa: SIM118
    return found


def read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def round_trip(before: Path, after: Path) -> str:
    """Import `before`, export it to `after`, and compare the tensors."""
    after.mkdir()
    model, tokenizer = load_model(before)
    save_model(after, model, tokenizer)
    del model
    old, new = tensors(before), tensors(after)
    assert old.keys() - {"lm_head.weight"} == new.keys(), old.keys() ^ new.keys()
    equal = 0
    for name in new:
        one, other = (read(*found[name]).view(torch.int32) for found in (old, new))
        equal += torch.equal(one, other)
    return f"{equal} of {len(new)} tensors identical"


def drop_from_cache(directory: Path) -> None:
    for path in directory.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_token(directory: Path, dtype: str) -> tuple[float, float, float]:
    """Seconds of the command that writes one token; peak of resident and of anonymous bytes."""
    command = [sys.executable, ROOT / "sample.py", f"--init_from={directory}", "--start=Once", "--max_new_tokens=1"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--device=cpu", f"--dtype={dtype}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    status, peak, anonymous = Path(f"/proc/{process.pid}/status"), 0, 0
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        peak = max(peak, kilobytes(lines, "VmHWM"))
        anonymous = max(anonymous, kilobytes(lines, "RssAnon"))
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    out, err = process.communicate()
    if process.returncode or not out.startswith("Once"):
        raise UserError(f"sample.py failed: {err}")
    return seconds, peak * 1024, anonymous * 1024


def kilobytes(status: dict[str, str], name: str) -> int:
    return int(status.get(name, "0 kB").split()[0])


def main() -> None:
    config, _ = load_settings(BenchConfig)
    sizes, timed = config.sizes.split(","), config.first_token.split(",")
    if unknown := set(sizes + timed) - set(SIZES):
        raise UserError(f"{', '.join(unknown)}: no such size; use {', '.join(SIZES)}")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny").mkdir()
        save_model(folder / "tiny", GPT(GPTConfig(8, 50257, n_layer=1, n_head=1, n_embd=8)), gpt2())
        bare = [first_token(folder / "tiny", config.dtype) for _ in range(config.runs)][-1]
        print(f"a tiny model: {bare[0]:.2f} s, {bare[1] / 1e6:.0f} MB resident, {bare[2] / 1e6:.0f} MB anonymous")
        for size in sizes:
            size_bytes = write_as_transformers(folder / size, size)
            note(f"{size}: written")
            rows.append([size, f"{size_bytes / 1e9:.2f} GB", round_trip(folder / size, folder / "after")])
            shutil.rmtree(folder / "after")
            note(f"{size}: {rows[-1][-1]}")
            if size in timed:
                drop_from_cache(folder / size)
                cold = first_token(folder / size, config.dtype)
                warm = sorted(first_token(folder / size, config.dtype) for _ in range(config.runs))
                seconds, peak, anonymous = warm[len(warm) // 2]
                note(f"{size}: cold {cold[0]:.2f} s, then {[f'{run[0]:.2f}' for run in warm]}")
                rows[-1] += [f"{cold[0]:.2f} s", f"{seconds:.2f} s"]
                for most, start in ((peak, bare[1]), (anonymous, bare[2])):
                    rows[-1] += [f"{most / 1e9:.2f} GB", f"{(most - start) / size_bytes:.2f}"]
            shutil.rmtree(folder / size)
    print("\n| model | fp32 weights | round trip | first token, cold | warm", end=" ")
    print("| peak resident | above a tiny model / weights | peak anonymous | above a tiny model / weights |")
    print("| --- " * 9 + "|")
    for row in rows:
        print("|", " | ".join(row + [""] * (9 - len(row))), "|")


if __name__ == "__main__":
    run_script(main)
