"""Tokens per second of sampling: ours, transformers', nanoGPT's and llama.cpp's, against what memory allows.

python bench/sample.py --nanogpt=PATH --trained=out-quickstart/best       # PATH: a checkout of nanoGPT

A model of GPT-2's shape with random weights, the same for all, in a process of its own for each contestant;
they take turns, round by round, and the medians count, of the time of a whole text (its prompt too) and of a
token. What other processes took of the processors during a turn is printed, for such a turn says little.
llama.cpp takes part where `llama_cpp` and `gguf` can be imported. The limit is the time to read the matrices
once, at the speed at which this machine reads memory, measured each round. With `trained`, the loss of a text
by that model in each precision.
"""

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from plaingpt.decoder import Decoder

from model import GPT, GPTConfig
from plaingpt.checkpoint import load_model, save_model
from plaingpt.console import note, run_script
from plaingpt.distributed import connect
from plaingpt.generate import Batch, Sampling
from plaingpt.settings import PositiveInt, load_settings
from plaingpt.tokenizer import gpt2
from tools.to_gguf import write_gguf

PROMPT = list(range(1000, 1016))
PRECISIONS = {  # (dtype, int8), bytes of a weight
    "fp32": (torch.float32, False, 4),
    "bf16": (torch.bfloat16, False, 2),
    "fp16": (torch.float16, False, 2),
    "int8": (torch.float32, True, 1),
}
CONTESTANTS = ("ours-fp16", "llama.cpp-bf16", "ours-bf16", "llama.cpp-fp16", "ours-int8", "llama.cpp-int8",
               "ours-fp32", "llama.cpp-fp32", "transformers-fp32", "transformers-bf16", "nanogpt-fp32")  # fmt: skip
GGUF = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
BATCHED = ("ours", "transformers")  # the others write one text at a time
Clock = Callable[[], None]  # called at each token
Write = Callable[[int, int, Clock], list[int]]  # (texts, tokens of each) to the first text


@dataclass(frozen=True)
class BenchConfig:
    contestants: str = ",".join(CONTESTANTS)
    """separated by commas"""
    nanogpt: str | None = None
    """a checkout of nanoGPT"""
    trained: str | None = None
    """a trained model's directory, for the loss in each precision"""
    text: str = os.__file__
    """the text whose loss it is"""
    tokens: PositiveInt = 256
    """to write after 16; an eighth of it by nanoGPT, to its advantage: it reads all of them for each"""
    batch_tokens: PositiveInt = 64
    """of each of several texts"""
    sequences: PositiveInt = 10
    """texts at once"""
    rounds: PositiveInt = 2
    """turns of each contestant"""
    n_layer: PositiveInt = 12
    """of the model"""
    n_embd: PositiveInt = 768
    """its width, in heads of 64"""


def ours(folder: str, precision: str) -> Write:
    connect("cpu")  # as sample.py does: it tunes the process, the others' stay as Python starts them
    decoder = Decoder(load_model(folder)[0], *PRECISIONS[precision][:2])

    def write(texts: int, tokens: int, clock: Clock) -> list[int]:
        batch = Batch(decoder, [PROMPT] * texts, tokens, Sampling(temperature=0), [None] * texts)
        for _ in range(tokens):
            batch.step()
            clock()
        return batch.texts[0][len(PROMPT) :]

    return write


def transformers(folder: str, precision: str) -> Write:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=PRECISIONS[precision][0]).eval()

    def write(texts: int, tokens: int, clock: Clock) -> list[int]:
        # a streamer is told the prompt, then each token; several texts are not streamed
        streamer = SimpleNamespace(put=lambda _: clock(), end=lambda: None) if texts == 1 else None
        ids, end = torch.tensor([PROMPT] * texts), 50256
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=end,
                min_new_tokens=tokens, max_new_tokens=tokens, streamer=streamer,
            )  # fmt: skip
        return found[0, len(PROMPT) :].tolist()

    return write


def nanogpt(folder: str, precision: str, checkout: str) -> Write:
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    its = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(its)
    model, _ = load_model(folder)
    c = model.config
    other = its.GPT(its.GPTConfig(c.block_size, c.padded_vocab_size, c.n_layer, c.n_head, c.n_embd, 0.0, c.bias)).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return lambda texts, n, _: other.generate(torch.tensor([PROMPT] * texts), n, top_k=1)[0, len(PROMPT) :].tolist()


def llama(folder: str, precision: str) -> Write:
    import llama_cpp

    path = Path(folder) / f"{precision}.gguf"
    write_gguf(path, load_model(folder)[0], GGUF[precision])
    threads = torch.get_num_threads()
    model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write(texts: int, tokens: int, clock: Clock) -> list[int]:
        model.reset()
        found = []
        for token in model.generate(PROMPT, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            clock()
            if len(found) == tokens:
                return found

    return write


class Contestant:
    """A process of its own with a model in it."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.process = ProcessPoolExecutor(1, context, initializer=prepare, initargs=arguments)

    def __call__(self, job: Callable, *arguments):
        return self.process.submit(job, *arguments).result()


def prepare(name: str, folder: str, checkout: str | None, sequences: int) -> None:
    global write
    torch.set_num_threads(os.cpu_count())
    kind, precision = name.split("-")
    more = [checkout] if kind == "nanogpt" else []
    make = {"ours": ours, "transformers": transformers, "nanogpt": nanogpt, "llama.cpp": llama}[kind]
    write = make(folder, precision, *more)
    for texts in (1, sequences) if name.startswith(BATCHED) else (1,):
        write(texts, 4, lambda: None)


def measure(texts: int, tokens: int) -> SimpleNamespace:
    """speed: tokens a second in all, the prompt's pass in it; ms: of each token after the first, where they are told;
    others: share of the processors that other processes took; text: the first one."""
    stamps = []
    busy, own, started = busy_seconds(), time.process_time(), time.perf_counter()
    text = write(texts, tokens, lambda: stamps.append(time.perf_counter()))
    seconds = time.perf_counter() - started
    others = (busy_seconds() - busy - (time.process_time() - own)) / seconds / os.cpu_count()
    ms = [(b - a) * 1e3 for a, b in itertools.pairwise(stamps)]
    return SimpleNamespace(speed=texts * tokens / seconds, ms=ms, others=others, text=text)


def busy_seconds() -> float:
    """Processor time of all processes together since the machine started; nan where the system does not tell."""
    if not Path("/proc/stat").exists():
        return float("nan")
    user, nice, system, _idle, _wait, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def memory_speed() -> float:
    """Bytes a second, by the sum of 512 MB with all threads: the best of five."""
    torch.set_num_threads(os.cpu_count())
    x, seconds = torch.ones(2**27), []
    for _ in range(5):
        started = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - started)
    return x.numel() * 4 / min(seconds)


def startup(*flags: str) -> tuple[float, float]:
    """Seconds of the whole command sample.py, and its peak memory in MB; the files are in the system's cache."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", *flags], stdout=subprocess.DEVNULL)
    while process.poll() is None:  # what wait4 tells of the peak has in it the process that this one was forked from
        with contextlib.suppress(OSError, IndexError):  # it has ended
            peak = int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0])  # KB
        time.sleep(0.01)
    assert process.returncode == 0, flags
    return time.perf_counter() - started, peak / 1024


def takes_part(name: str, config: BenchConfig) -> bool:
    if name.startswith("nanogpt"):
        return config.nanogpt is not None
    needs = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": ("transformers",)}.get(name.split("-")[0], ())
    return all(importlib.util.find_spec(package) for package in needs)


def main() -> None:
    config, _ = load_settings(BenchConfig)
    names = [name for name in config.contestants.split(",") if takes_part(name, config)]
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=config.n_layer, n_head=config.n_embd // 64, n_embd=config.n_embd))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(5)  # the likeliest id is then clear of rounding, and texts can be compared
    matrices = model.num_parameters() - model.config.block_size * model.config.n_embd
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), model, gpt2())
        contestants = {name: Contestant(name, folder, config.nanogpt, config.sequences) for name in names}
        single, batched, speeds = {name: [] for name in names}, {name: [] for name in names}, []
        for _ in range(config.rounds):
            speeds.append(memory_speed())
            note(f"memory: {speeds[-1] / 1e9:.1f} GB/s")
            for name, run in contestants.items():
                turn = run(measure, 1, config.tokens // 8 if name.startswith("nanogpt") else config.tokens)
                single[name].append(turn)
                note(f"{name}: {turn.speed:.1f} tokens/s, others {turn.others:.0%}")
                if name.startswith(BATCHED):
                    several = run(measure, config.sequences, config.batch_tokens)
                    batched[name].append(several)
                    note(f"{name}, {config.sequences} texts: {several.speed:.1f} tokens/s, others {several.others:.0%}")
                    same = several.text == turn.text[: len(several.text)]
                    assert same or not name.startswith("ours"), f"{name}: a text among others is not that alone"
        flat = {name: run(measure, 1, 1000).ms for name, run in contestants.items() if name == "ours-fp16"}
        for run in contestants.values():
            run.process.shutdown()
        empty = startup("--help")
        first = [startup(f"--out_dir={folder}", "--start=Once", "--max_new_tokens=1", "--device=cpu") for _ in range(3)]
        note(f"startup: {empty}, {first}")
    memory = statistics.median(speeds)
    print(f"\n{matrices / 1e6:.0f}M weights; memory is read at {memory / 1e9:.1f} GB/s, by round:", end=" ")
    print(", ".join(f"{speed / 1e9:.1f}" for speed in speeds))
    seconds, peak = (statistics.median(values) for values in zip(*first))
    more, size = peak - empty[1], model.num_parameters() * 4 / 2**20
    print(
        f"the command for one token: {seconds:.2f} s, its --help {empty[0]:.2f} s; peak memory {peak:.0f} MB,", end=" "
    )
    print(f"{more:.0f} above that of --help, {more / size:.2f} times the weights in fp32 ({size:.0f} MB)")
    for name, ms in flat.items():
        start, end = statistics.median(ms[:64]), statistics.median(ms[-64:])
        print(f"{name}: {start:.2f} ms a token at the start, {end:.2f} at token 1,000: {end / start - 1:+.0%}")
    print("\n| 1 text | tokens/s | by round | of the limit | median ms a token | others, at most", end=" | ")
    print(f"{config.sequences} texts, tokens/s in all | by round | equal to {names[0]} for |\n{'| --- ' * 9}|")
    for name in names:
        turns, several, size = single[name], batched[name], PRECISIONS[name.split("-")[1]][2]
        speed = statistics.median(turn.speed for turn in turns)
        ms = [x for turn in turns for x in turn.ms]
        pairs = list(zip(turns[-1].text, single[names[0]][-1].text))
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        cells = [name, f"{speed:.1f}", ", ".join(f"{turn.speed:.1f}" for turn in turns)]
        cells += [f"{speed * matrices * size / memory:.0%}", f"{statistics.median(ms):.2f}" if ms else ""]
        cells += [f"{max(turn.others for turn in turns + several):.0%}"]
        cells += [f"{statistics.median(turn.speed for turn in several):.0f}" if several else ""]
        cells += [", ".join(f"{turn.speed:.0f}" for turn in several), f"{equal} tokens"]
        print("|", " | ".join(cells), "|", flush=True)
    if config.trained:
        model, tokenizer = load_model(config.trained)
        ids = tokenizer.encode(Path(config.text).read_text("utf-8"))
        print(f"\nloss of {len(ids):,} tokens:", end=" ")
        for precision, (dtype, int8, _) in PRECISIONS.items():
            print(f"{precision} {-Decoder(model, dtype, int8).log_probabilities(ids).mean():.5f}", end="; ")
        print()


if __name__ == "__main__":
    run_script(main)
