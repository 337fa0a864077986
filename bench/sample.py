"""Tokens per second of sampling: ours, transformers', nanoGPT's and llama.cpp's, compared with memory bandwidth.

python bench/sample.py --nanogpt=PATH        # PATH: a checkout of nanoGPT
python bench/sample.py ours-fp16 ours-bf16 transformers-bf16-compiled --tokens=1000

All sample greedily from the same GPT-2 with random weights, each in a process of its own. They take turns; the table
shows medians over the rounds. A turn includes reading the prompt. The first turn of each, a warm-up, does not count.
CPU only. llama.cpp takes part if `llama_cpp` and `gguf` are installed. The limit is the time to read all matrices once
at the memory bandwidth, which is measured in each round.
"""

import contextlib
import importlib.util
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from common import Worker, nanogpt_model

from model import GPT, GPTConfig
from plaingpt.checkpoint import load_model, save_model
from plaingpt.console import UserError, cores, note, run_script
from plaingpt.distributed import connect
from plaingpt.generate import Batch, Decoder, Sampling
from plaingpt.settings import PathName, PositiveInt, load_settings
from plaingpt.tokenizer import gpt2
from tools.to_gguf import write_gguf

PROMPT = list(range(1000, 1016))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GGUF = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "q8_0": "int8"}
BYTES = {"fp32": 4, "f32": 4, "bf16": 2, "fp16": 2, "f16": 2, "q8_0": 34 / 32}  # per weight
CONTESTANTS = (
    "ours-fp16", "llama.cpp-f16", "ours-bf16", "llama.cpp-bf16", "transformers-bf16", "llama.cpp-q8_0", "ours-fp32",
    "llama.cpp-f32", "transformers-fp32", "nanogpt-fp32",
)  # fmt: skip
OPTIONAL = ("transformers-bf16-compiled", "transformers-fp32-compiled")  # minutes of compiling
Sampler = Callable[[int, int, Callable], list[int]]  # (samples, tokens of each, called at each token) to the first one


@dataclass(frozen=True)
class BenchConfig:
    contestants: tuple[str, ...] = ()
    """default: all but transformers-bf16-compiled and transformers-fp32-compiled"""
    nanogpt: PathName | None = None
    """checkout of nanoGPT"""
    tokens: PositiveInt = 256
    """tokens of a single sample; nanoGPT writes an eighth, because it reads all tokens again for each new one"""
    batch_size: PositiveInt = 10
    """samples generated at once"""
    batch_tokens: PositiveInt = 64
    """tokens of each sample in a batch"""
    rounds: PositiveInt = 3
    """turns of each contestant"""
    n_layer: PositiveInt = 12
    """blocks of the model"""
    n_embd: PositiveInt = 768
    """width of the model; a head has 64 channels"""


@dataclass
class Turn:
    tokens_per_second: float
    """of all samples together, including the time to read the prompt"""
    ms: list[float]
    """of each token after the first, if the contestant reports them"""
    others: float
    """fraction of the machine's CPU time that other processes used"""
    tokens: list[int]
    """of the first sample"""


def make_sampler(name: str, folder: str, checkout: str | None) -> Sampler:
    torch.set_num_threads(cores())
    kind, precision, *compiled = name.split("-")
    if kind == "nanogpt":
        return nanogpt(folder, checkout)
    if kind == "transformers":
        return transformers(folder, DTYPES[precision], bool(compiled))
    return ours(folder, DTYPES[precision]) if kind == "ours" else llama_cpp(folder, precision)


def ours(folder: str, dtype: torch.dtype) -> Sampler:
    connect("cpu")  # as sample.py does; it sets up memory allocation
    decoder = Decoder(load_model(folder)[0], dtype)

    def sample(count: int, tokens: int, on_token: Callable) -> list[int]:
        batch = Batch(decoder, [PROMPT] * count, tokens, Sampling(temperature=0), [torch.Generator()] * count)
        for _ in range(tokens):
            batch.step()
            on_token()
        return batch.texts[0][len(PROMPT) :]

    return sample


def transformers(folder: str, dtype: torch.dtype, compiled: bool) -> Sampler:
    from transformers import CompileConfig, GPT2LMHeadModel
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        def __init__(self, on_token: Callable):
            self.put, self.end = lambda _: on_token(), lambda: None  # put gets the prompt, too

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    options = {}
    if compiled:
        options = dict(cache_implementation="static", compile_config=CompileConfig())
        options["compile_config"]._compile_all_devices = True  # by default transformers compiles on GPUs only

    def sample(count: int, tokens: int, on_token: Callable) -> list[int]:
        ids = torch.tensor([PROMPT] * count)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=50256, min_new_tokens=tokens,
            max_new_tokens=tokens, streamer=Streamer(on_token) if count == 1 else None, **options,
        )  # fmt: skip
        return found[0, len(PROMPT) :].tolist()

    return sample


def nanogpt(folder: str, checkout: str) -> Sampler:
    module, (model, _) = nanogpt_model(checkout), load_model(folder)
    c = model.config
    shape = module.GPTConfig(c.block_size, c.padded_vocab_size, c.n_layer, c.n_head, c.n_embd, 0.0, c.bias)
    theirs = module.GPT(shape).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)  # without their masks and our padding
    return lambda count, tokens, _: theirs.generate(torch.tensor([PROMPT] * count), tokens, top_k=1)[0, 16:].tolist()


def llama_cpp(folder: str, precision: str) -> Sampler:
    import llama_cpp

    path = Path(folder) / f"{precision}.gguf"
    write_gguf(path, *load_model(folder), GGUF[precision])
    model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=cores(), n_threads_batch=cores(), verbose=False)

    def sample(count: int, tokens: int, on_token: Callable) -> list[int]:
        model.reset()
        found = []
        for token in itertools.islice(model.generate(PROMPT, temp=0.0, repeat_penalty=1.0), tokens):
            found.append(token)
            on_token()
        return found

    return sample


def turn(sampler: Sampler, count: int, tokens: int) -> Turn:
    stamps, busy, own, started = [], busy_seconds(), time.process_time(), time.perf_counter()
    found = sampler(count, tokens, lambda: stamps.append(time.perf_counter()))
    seconds = time.perf_counter() - started
    others = (busy_seconds() - busy - (time.process_time() - own)) / seconds / os.cpu_count()
    ms = [(after - before) * 1e3 for before, after in itertools.pairwise(stamps)]
    return Turn(count * tokens / seconds, ms, others, found)


def busy_seconds() -> float:
    """CPU seconds of all processes since the machine started; nan where the system does not report it."""
    if not os.path.exists("/proc/stat"):
        return float("nan")
    user, nice, system, _idle, _iowait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def memory_bandwidth() -> float:
    """Bytes per second of summing 512 MB with all threads: the best of five."""
    torch.set_num_threads(cores())
    x, seconds = torch.ones(2**27), []
    for _ in range(5):
        started = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - started)
    return x.nbytes / min(seconds)


def first_token(folder: str) -> tuple[float, float]:
    """Seconds of a sample.py command for one token, and its peak memory in MB."""
    started, peak = time.perf_counter(), 0
    flags = [f"--out_dir={folder}", "--start=Once", "--max_new_tokens=1", "--device=cpu"]
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *flags], stdout=subprocess.DEVNULL)
    while process.poll() is None:  # getrusage would include the memory of this process, from which it was forked
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            peak = int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0])  # KB
        time.sleep(0.01)
    assert process.returncode == 0, "sample.py failed"
    return time.perf_counter() - started, peak / 1024


def takes_part(name: str, config: BenchConfig) -> bool:
    if name not in CONTESTANTS + OPTIONAL:
        raise UserError(f"no contestant {name}; there are {', '.join(CONTESTANTS + OPTIONAL)}")
    if name == "nanogpt-fp32":
        return config.nanogpt is not None
    needs = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": ("transformers",)}.get(name.split("-")[0], ())
    return all(importlib.util.find_spec(package) for package in needs)


def compete(names: list[str], config: BenchConfig, folder: str) -> tuple[dict, dict, list[float]]:
    """For each contestant its turns with one sample and with a batch; and the bandwidth in each round."""
    workers = {name: Worker(make_sampler, name, folder, config.nanogpt) for name in names}
    single, batched, bandwidths = {name: [] for name in names}, {name: [] for name in names}, []
    for number in range(config.rounds + 1):
        bandwidths.append(memory_bandwidth())
        note(f"round {number} (0: warm-up): memory {bandwidths[-1] / 1e9:.1f} GB/s")
        for name, worker in workers.items():
            tokens = max(1, config.tokens // 8) if name == "nanogpt-fp32" else config.tokens
            turns = [(single, 1, tokens)]
            if name.startswith(("ours", "transformers")):
                turns.append((batched, config.batch_size, config.batch_tokens))
            for found, count, tokens in turns:
                found[name].append(worker(turn, count, tokens))
                last = found[name][-1]
                note(f"{name} x {count}: {last.tokens_per_second:.1f} tokens/s, other processes {last.others:.0%}")
            if name.startswith("ours"):
                alone, beside = single[name][-1].tokens, batched[name][-1].tokens
                assert all(a == b for a, b in zip(alone, beside)), f"{name}: a sample in a batch differs from it alone"
    for worker in workers.values():
        worker.stop()
    warm = [{name: turns[1:] for name, turns in found.items()} for found in (single, batched)]
    return *warm, bandwidths[1:]


def row(name: str, single: list[Turn], batched: list[Turn], limit: float, reference: list[int]) -> str:
    """limit: tokens/s at the memory bandwidth."""
    speeds, speeds_batched = ([t.tokens_per_second for t in turns] for turns in (single, batched))
    speed, quarter = statistics.median(speeds), max(1, len(single[0].ms) // 4)
    first, last = ([x for t in single for x in t.ms[which]] for which in (slice(quarter), slice(-quarter, None)))
    pairs = list(zip(single[-1].tokens, reference))
    equal = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    cells = [name, f"{speed:.1f}", ", ".join(f"{x:.1f}" for x in speeds), f"{speed / limit:.0%}"]
    cells += [f"{statistics.median(first):.2f}, {statistics.median(last):.2f}" if first else ""]
    cells += [f"{statistics.median(speeds_batched):.0f}" if batched else ""]
    cells += [", ".join(f"{x:.0f}" for x in speeds_batched), f"{max(t.others for t in single + batched):.0%}"]
    return f"| {' | '.join(cells)} | {equal} of {len(pairs)} |"


def main() -> None:
    config, _ = load_settings(BenchConfig, positional="contestants")
    names = [name for name in config.contestants or CONTESTANTS if takes_part(name, config)]
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=config.n_layer, n_head=config.n_embd // 64, n_embd=config.n_embd))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5)  # the most likely token is then clear, whatever the rounding
    matrices = model.num_parameters() - model.transformer.wpe.weight.numel()
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), model, gpt2())
        single, batched, bandwidths = compete(names, config, folder)
        seconds, peak = (statistics.median(found) for found in zip(*(first_token(folder) for _ in range(3))))
    bandwidth = statistics.median(bandwidths)
    print(f"\n{matrices / 1e6:.0f}M weights; memory bandwidth by round:", end=" ")
    print(", ".join(f"{speed / 1e9:.1f}" for speed in bandwidths), "GB/s")
    size = model.num_parameters() * 4 / 2**20
    print(f"sample.py for one token: {seconds:.2f} s, peak memory {peak:.0f} MB; the weights in fp32: {size:.0f} MB")
    print("\n| 1 sample | tokens/s | by round | of the limit | median ms per token, first and last quarter", end=" | ")
    print(f"{config.batch_size} samples, tokens/s | by round | other processes, at most | same as {names[0]} |")
    print("| --- " * 9 + "|")
    for name in names:
        limit = bandwidth / matrices / BYTES[name.split("-")[1]]
        print(row(name, single[name], batched[name], limit, single[names[0]][-1].tokens))


if __name__ == "__main__":
    run_script(main)
