"""Tokens per second of sampling: ours, transformers', nanoGPT's and llama.cpp's, against what memory allows.

python bench/sample.py --nanogpt=PATH --trained=out-quickstart/best       # PATH: a checkout of nanoGPT

A model of GPT-2's shape with random weights, the same for all, in a process of its own for each contestant;
they take turns, round by round, and the medians count. llama.cpp takes part where `llama_cpp` and `gguf`
can be imported. The limit is the time to read the matrices once, at the speed at which this machine
reads memory, measured each round. With `trained`, the loss of a text by that model in each precision.
"""

import importlib.util
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from checkpoint import load_model, save_model
from config.settings import PositiveInt, load_settings, note, run_script
from data.tokenizer import gpt2
from decoder import Decoder
from generate import Batch, Sampling
from model import GPT, GPTConfig

PROMPT = list(range(1000, 1016))
PRECISIONS = {  # (dtype, int8), bytes of a weight
    "fp32": (torch.float32, False, 4),
    "bf16": (torch.bfloat16, False, 2),
    "fp16": (torch.float16, False, 2),
    "int8": (torch.float32, True, 1),
}
CONTESTANTS = ("ours-fp16", "llama.cpp-bf16", "ours-bf16", "llama.cpp-fp16", "ours-int8", "llama.cpp-int8",
               "ours-fp32", "llama.cpp-fp32", "transformers-fp32", "transformers-bf16", "nanogpt-fp32")  # fmt: skip
BATCHED = ("ours", "transformers")  # the others write one text at a time
Write = Callable[[int, int], list[int]]  # (texts, tokens of each) to the first text


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
    """to write after 16; a quarter of it by nanoGPT, to its advantage: it reads all of them for each"""
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


def ours(folder: str, precision: str) -> tuple[Write, Callable]:
    decoder = Decoder(load_model(folder)[0], *PRECISIONS[precision][:2])

    def steps(texts: int, tokens: int) -> tuple[list[int], list[float]]:
        batch = Batch(decoder, [PROMPT] * texts, tokens, Sampling(temperature=0), [None] * texts)
        found, seconds = [], []
        for _ in range(tokens):
            started = time.perf_counter()
            found.append(batch.step()[0][1])
            seconds.append(time.perf_counter() - started)
        return found, seconds

    return lambda texts, tokens: steps(texts, tokens)[0], steps


def transformers(folder: str, precision: str) -> tuple[Write, None]:
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(folder, dtype=PRECISIONS[precision][0]).eval()

    def write(texts: int, tokens: int) -> list[int]:
        ids, end = torch.tensor([PROMPT] * texts), 50256
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=end,
                min_new_tokens=tokens, max_new_tokens=tokens,
            )  # fmt: skip
        return found[0, len(PROMPT) :].tolist()

    return write, None


def nanogpt(folder: str, precision: str, checkout: str) -> tuple[Write, None]:
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    its = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(its)
    model, _ = load_model(folder)
    c = model.config
    other = its.GPT(its.GPTConfig(c.block_size, c.padded_vocab_size, c.n_layer, c.n_head, c.n_embd, 0.0, c.bias)).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return lambda texts, n: other.generate(torch.tensor([PROMPT] * texts), n, top_k=1)[0, len(PROMPT) :].tolist(), None


def llama(folder: str, precision: str) -> tuple[Write, None]:
    import llama_cpp

    path = Path(folder) / f"{precision}.gguf"
    write_gguf(path, load_model(folder)[0], precision)
    threads = torch.get_num_threads()
    model = llama_cpp.Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)

    def write(texts: int, tokens: int) -> list[int]:
        model.reset()
        found = []
        for token in model.generate(PROMPT, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == tokens:
                return found

    return write, None


def write_gguf(path: Path, model: GPT, precision: str) -> None:
    """The model in llama.cpp's form, its matrices in `precision`, the vocabulary without its texts."""
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "Q8_0"}[precision])
    c, writer = model.config, gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c.vocab_size)
    names = {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
             "transformer.h": "blk", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
             "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}  # fmt: skip
    for name, weight in model.weights().items():
        matrix = weight.dim() == 2 and "wpe" not in name
        for old, new in names.items():
            name = name.replace(old, new)
        data, its = weight.numpy(), kind if matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(data, its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Contestant:
    """A process of its own with a model in it."""

    def __init__(self, *arguments):
        context = multiprocessing.get_context("spawn")
        self.process = ProcessPoolExecutor(1, context, initializer=prepare, initargs=arguments)

    def __call__(self, job: Callable, *arguments):
        return self.process.submit(job, *arguments).result()


def prepare(name: str, folder: str, checkout: str | None) -> None:
    global write, steps
    torch.set_num_threads(os.cpu_count())
    kind, precision = name.split("-")
    more = [checkout] if kind == "nanogpt" else []
    write, steps = {"ours": ours, "transformers": transformers, "nanogpt": nanogpt, "llama.cpp": llama}[kind](
        folder, precision, *more
    )
    write(1, 4)


def measure(texts: int, tokens: int) -> tuple[float, list[int]]:
    """(tokens a second in all, the first text). The prompt's pass is in it."""
    started = time.perf_counter()
    found = write(texts, tokens)
    return texts * tokens / (time.perf_counter() - started), found


def growth(tokens: int) -> tuple[float, float]:
    """Milliseconds of a token at the start and at the end of a text."""
    seconds = steps(1, tokens)[1][1:]
    return statistics.median(seconds[:64]) * 1e3, statistics.median(seconds[-64:]) * 1e3


def memory_speed() -> float:
    """Bytes a second, by the sum of 512 MB with all threads: the best of five."""
    torch.set_num_threads(os.cpu_count())
    x, seconds = torch.ones(2**27), []
    for _ in range(5):
        started = time.perf_counter()
        x.sum()
        seconds.append(time.perf_counter() - started)
    return x.numel() * 4 / min(seconds)


def startup(folder: str) -> float:
    """Seconds of the whole command that writes one token; the files are in the system's cache."""
    command = [sys.executable, ROOT / "sample.py", f"--out_dir={folder}", "--start=Once", "--max_new_tokens=1"]
    started = time.perf_counter()
    subprocess.run([*command, "--device=cpu"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


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
        contestants = {name: Contestant(name, folder, config.nanogpt) for name in names}
        single, batched, texts, speeds = {name: [] for name in names}, {name: [] for name in names}, {}, []
        for _ in range(config.rounds):
            speeds.append(memory_speed())
            note(f"memory: {speeds[-1] / 1e9:.1f} GB/s")
            for name, run in contestants.items():
                tokens = config.tokens // 4 if name.startswith("nanogpt") else config.tokens
                speed, texts[name] = run(measure, 1, tokens)
                single[name].append(speed)
                note(f"{name}: {speed:.1f} tokens/s")
                if name.startswith(BATCHED):
                    speed, text = run(measure, config.sequences, config.batch_tokens)
                    batched[name].append(speed)
                    note(f"{name}, {config.sequences} texts: {speed:.1f} tokens/s")
                    if name.startswith("ours"):
                        assert text == texts[name][: len(text)], f"{name}: a text among others is not that alone"
        flat = {name: run(growth, 1000) for name, run in contestants.items() if name == "ours-fp16"}
        note(f"growth: {flat}")
        seconds = [startup(folder) for _ in range(3)]
        note(f"startup: {seconds}")
    memory = statistics.median(speeds)
    print(f"\n{matrices / 1e6:.0f}M weights; memory is read at {memory / 1e9:.1f} GB/s, by round:", end=" ")
    print(", ".join(f"{speed / 1e9:.1f}" for speed in speeds))
    print(f"first token of the command: {statistics.median(seconds):.2f} s (the whole process)")
    for name, (start, end) in flat.items():
        print(f"{name}: {start:.2f} ms a token at the start, {end:.2f} at token 1,000: {end / start - 1:+.0%}")
    print(f"\n| tokens/s | 1 text | of the limit | {config.sequences} texts | equal to {names[0]} for |")
    print("| --- " * 5 + "|")
    for name in names:
        speed, size = statistics.median(single[name]), PRECISIONS[name.split("-")[1]][2]
        several = f"{statistics.median(batched[name]):.0f}" if batched[name] else ""
        pairs = list(zip(texts[name], texts[names[0]]))
        equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        share = speed * matrices * size / memory
        print(f"| {name} | {speed:.1f} | {share:.0%} | {several} | {equal} tokens |", flush=True)
    if config.trained:
        model, tokenizer = load_model(config.trained)
        ids = tokenizer.encode(Path(config.text).read_text("utf-8"))
        print(f"\nloss of {len(ids):,} tokens:", end=" ")
        for precision, (dtype, int8, _) in PRECISIONS.items():
            print(f"{precision} {-Decoder(model, dtype, int8).log_probabilities(ids).mean():.5f}", end="; ")
        print()


if __name__ == "__main__":
    run_script(main)
