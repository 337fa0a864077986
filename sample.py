"""Write text with a trained model: a prompt in, a stream of text out.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
"""

import plaingpt.startup

import collections
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from model import GPT
from plaingpt.batches import mix
from plaingpt.checkpoint import load_model
from plaingpt.console import UserError, note, perplexity, run_script
from plaingpt.cpu import has_fp16_products
from plaingpt.distributed import connect
from plaingpt.evaluate import log_probabilities
from plaingpt.files import existing
from plaingpt.generate import Batch, Decoder, Sampling
from plaingpt.settings import Fraction, NonNegative, NonNegativeInt, PathName, Positive, PositiveInt, load_settings
from plaingpt.text.sources import read_text
from plaingpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    out_dir: PathName = "out"
    """directory of a run (best/ is used, else last/) or of a model"""
    init_from: PathName | None = None
    """model to use instead of out_dir: gpt2 or another GPT-2 on the hub, a model directory, or nanoGPT's ckpt.pt"""
    start: str = "\n"
    """prompt; FILE:path reads it from a file, - from standard input; empty: no prompt"""
    num_samples: PositiveInt = 1
    """samples per prompt"""
    max_new_tokens: PositiveInt = 500
    """maximum tokens per sample; a sample also ends at end of text"""
    temperature: NonNegative = 0.8
    """below 1: more predictable; above 1: more varied; 0: always the most likely token"""
    top_k: NonNegativeInt = 200
    """sample from the k most likely tokens (0: from all)"""
    top_p: Fraction = 1.0
    """sample from the most likely tokens that together have this probability (1: from all)"""
    min_p: Fraction = 0.0
    """sample from tokens at least this many times as likely as the most likely one (0: from all)"""
    repetition_penalty: Positive = 1.0
    """above 1: tokens that are already in the text become less likely"""
    stop: str = ""
    """strings that end a sample, separated by |; \\n is a line break, \\| a literal |"""
    seed: NonNegativeInt = 1337
    """random seed"""
    interactive: bool = False
    """read prompts from the terminal; Ctrl-C stops a sample, Ctrl-D exits"""
    prompts: PathName | None = None
    """file with one prompt per line, instead of start"""
    score: PathName | None = None
    """text file to score instead of generating: prints its loss, perplexity and bits per byte"""
    output: Literal["text", "jsonl"] = "text"
    """jsonl: one JSON object per sample, or with score per token"""
    batch_size: PositiveInt = 16
    """samples generated at once"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the weights (auto: float16 on x86 CPUs, elsewhere as in train.py)"""
    quantize: Literal["none", "int8"] = "none"
    """int8: weights in 8 bits, on x86 CPUs"""

    RETIRED: ClassVar = {"compile": "ignored: sampling needs no compilation"}
    SYNONYMS: ClassVar = {
        "": "start", "prompt": "start", "text": "start", "model": "init_from", "temp": "temperature",
        "length": "max_new_tokens", "max_tokens": "max_new_tokens", "n": "num_samples",
    }  # fmt: skip


WAYS = ("start", "prompts", "interactive", "score")  # of being told what to do: one at a time


def main() -> None:
    config, given = load_settings(SampleConfig)
    ways = [f"--{name}" for name in WAYS if name in given and getattr(config, name) not in (None, False)]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} exclude each other: give one of them")
    model, tokenizer = load_model(find_model(config))
    writer = Writer(make_decoder(model, config), tokenizer, config)
    if config.score:
        score(writer.decoder, tokenizer, config)
    elif config.interactive:
        interact(writer)
    else:
        starts = read_prompts(config.prompts) if config.prompts else [read_start(config.start)]
        wanted = [encode_prompt(start, tokenizer) for start in starts for _ in range(config.num_samples)]
        for first in range(0, len(wanted), config.batch_size):
            end = first + config.batch_size
            writer.write(wanted[first:end], first, last=end >= len(wanted))


def make_decoder(model: GPT, config: SampleConfig) -> Decoder:
    dist = connect(config.device, config.dtype)
    fp16 = dist.device.type == "cpu" and config.dtype == "auto" and has_fp16_products()
    return Decoder(model.to(dist.device), torch.float16 if fp16 else dist.dtype)


class Writer:
    """Writes texts to standard output: the first that is not whole as it comes, the others when it is their turn."""

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, config: SampleConfig):
        self.decoder, self.tokenizer, self.config = decoder, tokenizer, config
        self.sampling = Sampling(
            config.temperature, config.top_k, config.top_p, config.min_p, config.repetition_penalty
        )
        self.stops = [part.replace("\\|", "|").replace("\\n", "\n") for part in re.split(r"(?<!\\)\|", config.stop)]
        self.stops = [stop for stop in self.stops if stop]

    def write(self, prompts: list[list[int]], first: int = 0, last: bool = True) -> None:
        """Go on from these prompts, which are samples number `first` and following of the seed."""
        texts = Texts(self, prompts, first)
        for i, prompt in enumerate(prompts):
            shown = [token for token in prompt if token != self.tokenizer.end_of_text]
            if self.config.output == "jsonl":
                text = "".join(until(self.tokenizer.decode_stream(texts.tokens(i)), self.stops))
                record = {"prompt": self.tokenizer.decode(shown), "text": text, "tokens": texts.counts[i]}
                record |= {"stop_reason": texts.reasons[i], "seconds": round(texts.seconds[i], 3)}
                print(json.dumps(record, ensure_ascii=False), flush=True)
                continue
            print(self.tokenizer.decode(shown), end="", flush=True)
            for piece in until(self.tokenizer.decode_stream(texts.tokens(i)), self.stops):
                print(piece, end="", flush=True)
            print("" if last and i + 1 == len(prompts) else "\n---------------", flush=True)


class Texts:
    """Texts of one batch, drawn from as their tokens are asked for; they all advance together."""

    def __init__(self, writer: Writer, prompts: list[list[int]], first: int):
        self.writer, config = writer, writer.config
        generators = [torch.Generator().manual_seed(mix(config.seed, first + i)) for i in range(len(prompts))]
        try:
            self.batch = Batch(writer.decoder, prompts, config.max_new_tokens, writer.sampling, generators)
        except RuntimeError as error:  # torch's, of a CPU and of a card
            texts = f"keys and values of {len(prompts)} texts at once"
            raise UserError(f"no memory for {texts}: use a smaller --batch_size or --max_new_tokens") from error
        self.new = [collections.deque() for _ in prompts]  # tokens that nobody has asked for yet
        self.counts, self.seconds = [0] * len(prompts), [0.0] * len(prompts)
        self.reasons: list[str | None] = [None] * len(prompts)
        self.since = time.perf_counter()

    def tokens(self, i: int) -> Iterator[int]:
        while self.new[i] or self.reasons[i] is None:
            if self.new[i]:
                yield self.new[i].popleft()
            else:
                self.step()

    def step(self) -> None:
        for i, token in self.batch.step():
            if token == self.writer.tokenizer.end_of_text:
                self.reasons[i] = "end_of_text"
            else:
                self.new[i].append(token)
                self.counts[i] += 1
                if self.stopped(i):
                    self.reasons[i] = "stop"
                elif self.counts[i] == self.writer.config.max_new_tokens:
                    self.reasons[i] = "length"
            if self.reasons[i]:
                self.batch.end(i)
                self.seconds[i] = time.perf_counter() - self.since

    def stopped(self, i: int) -> bool:
        """Whether a stop string ends in the newest token. A token is a byte at least, so the last ones are enough."""
        stops = self.writer.stops
        if not stops:
            return False
        enough = min(self.counts[i], 4 + max(len(stop.encode()) for stop in stops))
        tail = self.writer.tokenizer.decode(self.batch.texts[i][-enough:])
        return any(stop in tail for stop in stops)


def until(pieces: Iterable[str], stops: list[str]) -> Iterator[str]:
    """The text before the first stop string; what may be the beginning of one is held back until it is not."""
    held = ""
    for piece in pieces:
        held += piece
        if found := [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]:
            yield held[: min(found)[1]]  # the one that is whole first
            return
        starts = (n for stop in stops for n in range(len(stop) - 1, 0, -1) if held.endswith(stop[:n]))
        free = len(held) - max(starts, default=0)
        if free:
            yield held[:free]
            held = held[free:]
    yield held


def interact(writer: Writer) -> None:
    for i in itertools.count():
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        try:
            writer.write([encode_prompt(line.removesuffix("\n"), writer.tokenizer)], first=i)
        except UserError as error:
            note(str(error))
        except KeyboardInterrupt:
            print(flush=True)


def score(decoder: Decoder, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """How likely a text is: each token after those before it, the first after end of text where there is one."""
    text = read_text(Path(config.score))
    ids = tokenizer.encode(text)
    if tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text, *ids]
    if len(ids) < 2:
        raise UserError(f"{config.score} has no token to score")
    found = log_probabilities(decoder, ids)
    if config.output == "jsonl":
        for token, value in zip(ids[1:], found.tolist()):
            print(json.dumps({"id": token, "text": tokenizer.decode([token]), "log_probability": round(value, 5)}))
        return
    total = -found.double().sum().item()
    n_bytes = len(tokenizer.decode(ids[1:]).encode())
    loss = total / len(found)
    bits = total / math.log(2) / n_bytes
    print(f"loss {loss:.4f}, perplexity {perplexity(loss)}, {bits:.4f} bits per byte; {len(found):,} tokens")


def find_model(config: SampleConfig) -> str | Path:
    if config.init_from not in (None, "resume"):
        return config.init_from
    out_dir = Path(config.out_dir)
    if (out_dir / "config.json").is_file():
        return out_dir
    for name in ("best", "last"):
        if found := existing(out_dir / name):
            return found
    raise UserError(f"{out_dir} has no model; train one first, or name the folder: --out_dir=…")


def read_prompts(path: str) -> list[str]:
    prompts = [line for line in read_text(Path(path)).splitlines() if line]
    if not prompts:
        raise UserError(f"{path} has no prompt in it: one a line")
    return prompts


def read_start(start: str) -> str:
    if start == "-":
        return sys.stdin.buffer.read().decode("utf-8", errors="replace")
    return read_text(Path(start.removeprefix("FILE:"))) if start.startswith("FILE:") else start


def encode_prompt(start: str, tokenizer: Tokenizer) -> list[int]:
    prompt = tokenizer.encode(start, special=True)
    if not prompt and tokenizer.end_of_text is None:
        raise UserError("this tokenizer has no end of text to start from: give a prompt, --start=…")
    return prompt or [tokenizer.end_of_text]


if __name__ == "__main__":
    run_script(main)
