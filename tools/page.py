"""A trained model as one web page: it generates text and shows how. No server, no network.

python tools/page.py out-quickstart/best --out=model.html

The template, tools/page.html, has all the code. Whatever comes from the model or its tokenizer is added as
compressed base64, so no token or name can become markup or script.
"""

import base64
import json
import os
import re
import struct
import sys
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plaingpt.startup

import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPT
from plaingpt.checkpoint import load_model
from plaingpt.console import UserError, note, run_script
from plaingpt.files import new_file
from plaingpt.settings import PathName, load_settings
from plaingpt.tokenizer import END_OF_TEXT, Tokenizer, as_ours, byte_symbols

TEMPLATE = Path(__file__).with_name("page.html")
MOST_MILLIONS = 130  # parameters; GPT-2 124M in 8 bits is a page of about 150 MB
ARRAYS = {torch.int8: "Int8Array", torch.int16: "Int16Array", torch.float32: "Float32Array"}
BLOCK = 3 << 20  # bytes of data in one <script>; a multiple of 3, so that base64 has no padding inside


@dataclass(frozen=True)
class PageConfig:
    models: tuple[PathName, ...] = ()
    """the model: a directory such as out/best, gpt2 or another GPT-2 on the hub, or nanoGPT's ckpt.pt"""
    out: PathName = "model.html"
    """the file to write"""
    start: str = ""
    """the prompt that the page opens with; empty: the first words that the model writes by itself"""


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scales (rows,), integers (rows, columns)) of a matrix; each row uses the full range of the integers."""
    scale = weight.abs().amax(1).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return scale, (weight / scale[:, None]).round().to(torch.int8 if bits == 8 else torch.int16)


@torch.inference_mode()
def token_map(wte: Tensor) -> Tensor:
    """(V, 2) coordinates from -1 to 1: the rows of wte, scaled to unit length, on their two principal components."""
    rows = F.normalize(wte.double())
    rows -= rows.mean(0)
    _, directions = torch.linalg.eigh(rows.T @ rows)  # smallest first
    points = F.pad(rows @ directions[:, -2:].flip(1), (0, max(0, 2 - wte.size(1))))
    return (points / points.abs().amax(0).clamp(min=1e-30)).float()


def tokenizer_data(tokenizer: Tokenizer) -> dict:
    """What the page needs to encode and decode. UserError for a tokenizer that it cannot reproduce."""
    if not (ours := as_ours(json.loads(tokenizer.to_json()))):
        raise UserError("the tokenizer is neither GPT-2's nor one of plainGPT's: the page cannot encode with it")
    ids = tokenizer.vocabulary()
    data = {"tokens": sorted(ids, key=ids.get), "end_of_text": tokenizer.end_of_text, "end_of_text_is": END_OF_TEXT}
    if ours["model"]["type"] == "BPE":
        data["alphabet"] = [byte_symbols()[byte] for byte in range(256)]
        data["merges"] = [[ids[left], ids[right], ids[left + right]] for left, right in ours["model"]["merges"]]
        data["words"] = ours["pre_tokenizer"]["use_regex"]
    return data


def write_page(path: Path, name: str, model: GPT, tokenizer: Tokenizer, bits: int = 16, start: str = "") -> None:
    """Write the page of a model; `name` is its directory or its name."""
    tokenizer.encode(start)  # UserError for characters that the model does not know
    encoding, weights = tokenizer_data(tokenizer), model.weights()
    matrices = {key: quantize(weight, bits) for key, weight in weights.items() if weight.dim() == 2}
    tensors = {"points": token_map(weights["transformer.wte.weight"])} | weights
    for key, (scale, integers) in matrices.items():
        tensors[key] = F.pad(integers, (0, -integers.size(1) % 4))  # so that all tensors are aligned to 4 bytes
        tensors[key.replace("weight", "scale")] = scale
    end, generator = tokenizer.end_of_text, torch.Generator().manual_seed(1337)
    first_words = model.generate([end], 12, 0.8, 200, end_of_text=end, generator=generator)
    place = Path(os.path.abspath(name))
    header = {
        "name": (place.parent if re.fullmatch(r"best|last|step-\d+", place.name) else place).name,
        "config": asdict(model.config),
        "parameters": model.num_parameters(),
        "bits": bits,
        "start": start or tokenizer.decode(first_words).strip("\ufffd"),
        "tokenizer": encoding,
        "tensors": [[key, tensor.numel(), ARRAYS[tensor.dtype]] for key, tensor in tensors.items()],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    numbers = [tensor.contiguous().numpy().tobytes() for tensor in tensors.values()]
    data = zlib.compress(struct.pack("<I", len(text)) + text + b"".join(numbers), 1)  # higher levels gain nothing
    before, after = TEMPLATE.read_text(encoding="utf-8").split("<!-- data -->")
    with new_file(path) as file:
        file.write(before)
        for first in range(0, len(data), BLOCK):  # the browser needs less memory for several blocks than for one
            block = base64.b64encode(data[first : first + BLOCK]).decode()
            file.write(f'<script type="text/plain" class="data">{block}</script>\n')
        file.write(after)


def main() -> None:
    config, _ = load_settings(PageConfig, positional="models")
    if len(config.models) != 1:
        raise UserError("name one model: python tools/page.py out/best --out=model.html")
    model, tokenizer = load_model(config.models[0])
    millions, path = model.num_parameters() / 1e6, Path(config.out)
    if millions > MOST_MILLIONS:
        raise UserError(f"{millions:,.0f}M parameters: browsers do not open pages of models above {MOST_MILLIONS}M")
    bits = 16 if millions <= 20 else 8
    note(f"{millions:,.2f}M parameters in {bits} bits: a page of about {max(1, round(millions * bits / 6)):,} MB")
    write_page(path, config.models[0], model, tokenizer, bits, config.start)
    size = path.stat().st_size / 1e6
    note(f"wrote {path}: {size:.2f} MB; open it in a browser")


if __name__ == "__main__":
    run_script(main)
