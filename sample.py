"""Write text with a trained model: a prompt in, a stream of text out.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
"""

import plaingpt.startup

import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import torch

from plaingpt.batches import derive_seed
from plaingpt.checkpoint import load_model
from plaingpt.console import UserError, escaped, note, run_script
from plaingpt.cpu import has_fp16_products
from plaingpt.distributed import connect
from plaingpt.generate import Batch, Decoder, Sampling
from plaingpt.settings import Fraction, NonNegative, NonNegativeInt, PathName, PositiveInt, load_settings
from plaingpt.tokenizer import TextStream, Tokenizer


@dataclasses.dataclass(frozen=True)
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
    """sample from tokens whose probability is at least this fraction of the highest (0: from all)"""
    stop: str = ""
    """strings that end a sample, separated by |; \\n is a line break, \\| a literal |"""
    seed: NonNegativeInt = 1337
    """random seed"""
    interactive: bool = False
    """read prompts from the terminal"""
    prompts: PathName | None = None
    """file with one prompt per line, instead of start; empty lines are skipped"""
    output: Literal["text", "jsonl"] = "text"
    """jsonl: one JSON object per sample"""
    batch_size: PositiveInt = 16
    """samples generated at once"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the weights (auto: float16 on x86 CPUs, elsewhere as in train.py)"""

    RETIRED: ClassVar = {"compile": "ignored: sampling needs no compilation"}


SAMPLING = [field.name for field in dataclasses.fields(Sampling)]
INTERACTIVE = (*SAMPLING, "num_samples", "max_new_tokens", "stop", "seed", "output")


def main() -> None:
    config, given = load_settings(SampleConfig)
    exclusive = ("start", "prompts", "interactive")
    modes = [f"--{name}" for name in exclusive if name in given and getattr(config, name) not in (None, False)]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} cannot be combined: give one of them")
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        remedy = "for more GPUs, start it once per GPU, each with its own --device=cuda:N and --prompts"
        raise UserError(f"sample.py runs as one process, without torchrun or WORLD_SIZE; {remedy}")
    dist = connect(config.device, config.dtype)
    # first, so that a mistake is reported before a model is downloaded
    starts = read_prompts(config.prompts) if config.prompts else [read_start(config.start)]
    model, tokenizer = load_model(Path(config.out_dir) if config.init_from in (None, "resume") else config.init_from)
    if "start" not in given and not config.prompts and tokenizer.vocabulary().keys().isdisjoint({"\n", "Ċ"}):
        starts = [""]  # made from text without line breaks; Ċ: BPE's \n
    fp16 = dist.device.type == "cpu" and config.dtype == "auto" and has_fp16_products()
    decoder = Decoder(model.to(dist.device), torch.float16 if fp16 else dist.dtype)
    if config.interactive:
        interact(decoder, tokenizer, config)
    else:
        prompts = [encode_prompt(start, tokenizer) for start in starts]
        write_all(decoder, tokenizer, config, [prompt for prompt in prompts for _ in range(config.num_samples)])


def write_all(
    decoder: Decoder, tokenizer: Tokenizer, config: SampleConfig, prompts: list[list[int]], first: int = 0
) -> None:
    """Print a sample of each prompt, each as it is generated. first: the number of the first sample."""
    printable = escaped if sys.stdout.isatty() else str  # terminals obey escape codes
    for i, (sample, pieces) in enumerate(start_samples(decoder, tokenizer, config, prompts, first)):
        if config.output == "jsonl":
            text = "".join(pieces)  # generates the sample; only now are its tokens counted
            record = dict(prompt=sample.prompt, text=text, tokens=sample.tokens, stop_reason=sample.stop_reason)
            print(printable(json.dumps(record, ensure_ascii=False)), flush=True)
            continue
        if i:
            print("---------------")
        for piece in itertools.chain([sample.prompt], pieces):
            print(printable(piece), end="", flush=True)
        print(flush=True)
        if not sample.tokens:
            note(f"sample {first + i + 1} is empty: its first token is the end of text")


def start_samples(
    decoder: Decoder, tokenizer: Tokenizer, config: SampleConfig, prompts: list[list[int]], first: int
) -> Iterator[tuple["Sample", Iterator[str]]]:
    """Yield a sample of each prompt, with an iterator that generates its text. The text depends on the seed and on the
    number of the sample, not on the batch."""
    sampling = Sampling(**{name: getattr(config, name) for name in SAMPLING})
    for start in range(0, len(prompts), config.batch_size):
        together = prompts[start : start + config.batch_size]
        seeds = [derive_seed(config.seed, first + start + i) for i in range(len(together))]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        batch = Batch(decoder, together, config.max_new_tokens, sampling, generators)
        samples = [Sample(prompt, tokenizer, config) for prompt in together]
        for sample in samples:
            yield sample, text_of(sample, samples, batch)
        del batch  # its cache, before the next one is allocated


class Sample:
    """One sample as it is generated: its text ends before the first stop string."""

    def __init__(self, prompt: list[int], tokenizer: Tokenizer, config: SampleConfig):
        self.end_of_text, self.max_tokens = tokenizer.end_of_text, config.max_new_tokens
        self.prompt = tokenizer.decode(token for token in prompt if token != tokenizer.end_of_text)
        self.stream = TextStream(tokenizer)
        parts = re.split(r"(?<!\\)\|", config.stop)
        self.stops = [part.replace("\\|", "|").replace("\\n", "\n") for part in parts if part]
        self.text, self.tokens, self.stop_reason = "", 0, None
        self.final = 0  # length of the text that is certain: no stop string can begin before this

    def add(self, token: int) -> None:
        if token == self.end_of_text:
            self.stop_reason = "end_of_text"
        else:
            self.tokens += 1
            self.text += self.stream.add(token)
            if self.tokens == self.max_tokens:
                self.stop_reason = "length"
        text = self.text + self.stream.rest()
        if found := [(at + len(stop), at) for stop in self.stops if (at := text.find(stop, self.final)) >= 0]:
            _, start = min(found)  # of the stop string that ends first
            text, self.stop_reason = text[:start], "stop"
        if self.stop_reason:
            self.text, self.final = text, len(text)
        else:
            undecided = max(map(len, self.stops), default=1) - 1  # characters that may begin a stop string
            self.final = max(self.final, len(self.text) - undecided)


def text_of(sample: Sample, samples: list[Sample], batch: Batch) -> Iterator[str]:
    """The text of a sample, each piece as soon as it is final. The other samples of its batch grow meanwhile."""
    shown = 0
    while True:
        yield sample.text[shown : sample.final]
        shown = sample.final
        if sample.stop_reason:
            return
        for i, token in batch.step():
            samples[i].add(token)
            if samples[i].stop_reason:
                batch.end(i)


def interact(decoder: Decoder, tokenizer: Tokenizer, config: SampleConfig) -> None:
    """Sample from one prompt after another. A line such as `/temperature 0.7` changes a setting."""
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 (gives `input` line editing and history)
    leave = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"
    note(f"type a prompt, or /temperature 0.7 to change a setting; Ctrl-C stops a sample, {leave} exits")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    number = 0  # of the next sample
    while True:
        try:
            if not terminal:  # where `input` would print its prompt among the samples
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if terminal else "")
            if command := re.fullmatch(r"/([a-zA-Z][^ =/]*)(?:[ =](.*))?", line):  # and not `// comment` or a path
                name, text = command[1], command[2] or ""
                if name not in INTERACTIVE:
                    raise UserError(f"/{name} cannot be changed here; these settings can: {', '.join(INTERACTIVE)}")
                changed, _ = load_settings(SampleConfig, [f"--{name}={text.strip()}"])
                config = dataclasses.replace(config, **{name: getattr(changed, name)})
                number = 0 if name == "seed" else number
            else:
                prompts = [encode_prompt(line, tokenizer)] * config.num_samples
                first, number = number, number + config.num_samples
                write_all(decoder, tokenizer, config, prompts, first)
        except EOFError:
            return
        except UserError as error:
            note(str(error))
        except KeyboardInterrupt:
            print(flush=True)


def read_text(path: str) -> str:
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def read_prompts(path: str) -> list[str]:
    prompts = [line for line in read_text(path).split("\n") if line]
    if not prompts:
        raise UserError(f"{path} contains no prompt; write one per line")
    return prompts


def read_start(start: str) -> str:
    if start == "-":
        return sys.stdin.buffer.read().decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    if start.startswith("FILE:"):
        return read_text(os.path.expanduser(start.removeprefix("FILE:")))
    return start


def encode_prompt(start: str, tokenizer: Tokenizer) -> list[int]:
    prompt = tokenizer.encode(start, special=True)
    if not prompt and tokenizer.end_of_text is None:
        raise UserError("this tokenizer has no end-of-text token, so the prompt cannot be empty")
    return prompt or [tokenizer.end_of_text]


if __name__ == "__main__":
    run_script(main, less_memory="--batch_size or model")
