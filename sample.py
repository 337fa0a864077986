"""Write text with a trained model: a prompt in, a stream of text out.

python sample.py --out_dir=out-shakespeare-char --start="ROMEO:" --num_samples=3
"""

import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from checkpoint import load_model
from config.settings import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    PositiveInt,
    UserError,
    load_settings,
    run_script,
)
from data.batches import mix
from data.sources import read_text
from data.tokenizer import Tokenizer
from distributed import connect
from files import existing


@dataclass(frozen=True)
class SampleConfig:
    out_dir: str = "out"
    """folder of a run (its best model, else its last), or a model directory"""
    init_from: str | None = None
    """instead of out_dir: gpt2 or another GPT-2 on the hub, a model directory, or nanoGPT's ckpt.pt"""
    start: str = "\n"
    """the prompt; FILE:path reads it from a file, - from standard input; empty: from nothing"""
    num_samples: PositiveInt = 1
    """texts to write"""
    max_new_tokens: PositiveInt = 500
    """most tokens of a text; it may end earlier, at end of text"""
    temperature: NonNegative = 0.8
    """below 1 more likely words, above 1 less likely ones; 0: always the likeliest"""
    top_k: NonNegativeInt = 200
    """draw from the k likeliest tokens; 0: from all"""
    top_p: Fraction = 1.0
    """draw from the likeliest tokens that together have this probability; 1: from all"""
    seed: NonNegativeInt = 1337
    """of the drawing"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of matrix products; auto: bfloat16 where the processor has it"""

    RETIRED: ClassVar = {"compile": "not needed"}


def main() -> None:
    config, _ = load_settings(SampleConfig)
    model, tokenizer = load_model(find_model(config))
    prompt = encode_prompt(config.start, tokenizer)
    dist = connect(config.device, config.dtype)
    model.to(dist.device)
    for i in range(config.num_samples):
        generator = torch.Generator().manual_seed(mix(config.seed, i))
        shown = [token for token in prompt if token != tokenizer.end_of_text]
        with dist.autocast():
            new = model.generate(
                prompt,
                config.max_new_tokens,
                config.temperature,
                config.top_k,
                config.top_p,
                tokenizer.end_of_text,
                generator,
            )
            for piece in tokenizer.decode_stream(itertools.chain(shown, new)):
                print(piece, end="", flush=True)
        print("\n---------------" if i + 1 < config.num_samples else "")


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


def encode_prompt(start: str, tokenizer: Tokenizer) -> list[int]:
    if start == "-":
        start = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    elif start.startswith("FILE:"):
        start = read_text(Path(start.removeprefix("FILE:")))
    prompt = tokenizer.encode(start, special=True)
    if not prompt and tokenizer.end_of_text is None:
        raise UserError("this tokenizer has no end of text to start from: give a prompt, --start=…")
    return prompt or [tokenizer.end_of_text]


if __name__ == "__main__":
    run_script(main)
