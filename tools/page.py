"""A trained model as one web page: it writes text, and shows what it computes. No server, no network.

python tools/page.py out-quickstart/best --out=model.html

The template, tools/page.html, has all the code. Whatever comes from the model, its tokenizer or its run is added as
compressed base64, so no token or name can become markup or script.
"""

import base64
import functools
import hashlib
import json
import math
import re
import shlex
import struct
import sys
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plaingpt.startup

from model import GPT
from plaingpt.checkpoint import load_model
from plaingpt.console import UserError, note, run_script
from plaingpt.files import existing, new_file, read_json
from plaingpt.metrics import read_metrics
from plaingpt.settings import PathName, load_settings
from plaingpt.text.bulk import of_our_form
from plaingpt.tokenizer import END_OF_TEXT, Tokenizer, byte_symbols

TEMPLATE = Path(__file__).with_name("page.html")
MOST_PARAMETERS = 130_000_000  # GPT-2 124M in 8 bits is a page of about 150 MB, and takes 400 MB of memory to open
SMALL = 20_000_000  # parameters; up to here 16 bits, a page of at most 50 MB
BLOCK = 3 << 20  # bytes of data in one <script>; a multiple of 3, so that base64 has no padding inside


@dataclass(frozen=True)
class PageConfig:
    models: list[PathName] = field(default_factory=list)
    """the model: a directory such as out/best, gpt2 or another GPT-2 on the hub, or nanoGPT's ckpt.pt"""
    out: PathName = "model.html"
    """the file to write"""
    start: str = ""
    """the prompt that the page opens with; empty: the first words that the model writes by itself"""
    bits: Literal["auto", "8", "16"] = "auto"
    """bits per weight; auto: 16 up to 20M parameters, 8 above"""


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scales (rows,), integers (rows, columns)) of a matrix; each row uses the full range of the integers."""
    scale = weight.abs().amax(1).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return scale, (weight / scale[:, None]).round().to(torch.int8 if bits == 8 else torch.int16)


def own_text(model: GPT, first: int | None) -> list[int]:
    """Ids that the model writes itself after `first`, such as end of text: 256 at most."""
    length, generator = min(model.config.block_size, 256), torch.Generator().manual_seed(1337)
    return [first or 0, *model.generate([first or 0], length - 1, 0.8, 200, generator=generator)]


@torch.inference_mode()
def logit_difference(model: GPT, matrices: dict[str, tuple[Tensor, Tensor]], ids: list[int]) -> float:
    """The largest change of any logit by quantization, at any position of `ids`."""
    rounded = model.weights() | {name: scale[:, None] * integers for name, (scale, integers) in matrices.items()}
    idx = torch.tensor([ids])
    return (GPT.from_weights(model.config, rounded)(idx)[0] - model(idx)[0]).abs().max().item()


@torch.inference_mode()
def token_map(wte: Tensor) -> tuple[Tensor, float]:
    """(V, 2) coordinates from -1 to 1 of the tokens on the two principal components of the rows of wte, scaled to unit
    length, and the fraction of the variance that they explain."""
    rows = F.normalize(wte.double())
    rows -= rows.mean(0)
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # smallest first
    points = F.pad(rows @ directions[:, -2:].flip(1), (0, max(0, 2 - wte.size(1))))
    points /= points.abs().amax(0).clamp(min=1e-30)
    return points, (variances[-2:].sum() / variances.sum().clamp(min=1e-30)).item()


def tokenizer_data(tokenizer: Tokenizer, vocab_size: int) -> dict:
    """What the page needs to encode and decode. UserError for a tokenizer that it cannot reproduce."""
    description, ids = json.loads(tokenizer.to_json()), tokenizer.vocabulary()
    if not of_our_form(description):
        raise UserError(
            "the model's tokenizer is neither GPT-2's nor one of plainGPT's: the page cannot encode with it"
        )
    by_id = {i: token for token, i in ids.items()}
    data = {"tokens": [by_id.get(i) for i in range(vocab_size)]}
    data |= {"end_of_text": tokenizer.end_of_text, "end_of_text_is": END_OF_TEXT}
    if description["model"]["type"] == "BPE":
        merges = [m.split(" ") if isinstance(m, str) else m for m in description["model"]["merges"]]
        data["alphabet"] = [byte_symbols()[byte] for byte in range(256)]
        data["merges"] = [[ids[left], ids[right], ids[left + right]] for left, right in merges]
        if description["pre_tokenizer"]["use_regex"]:
            data |= {"letters": code_points(r"\p{L}"), "numbers": code_points(r"\p{N}")}
    return data


@functools.cache
def code_points(kind: str) -> list[tuple[int, int]]:
    """Ranges of a class of characters in the tokenizer's version of Unicode; browsers have other versions."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    runs = pre_tokenizers.Split(Regex(f"{kind}+"), "removed", invert=True).pre_tokenize_str(everything)
    return [(ord(run[0]), ord(run[-1])) for run, _ in runs]


PRIVATE = ("out_dir", "data_dir", "init_from", "eval_only", "dry_run", "wandb_log", "wandb_project", "wandb_run_name")
FIGURES = ("step", "tokens", "seconds", "train_loss", "val_loss", "val_bpb")  # of metrics.jsonl


def public(words: str) -> str:
    """Shell words without the folders of this machine: only the last name of an absolute path."""
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in shlex.split(words))


def run_data(directory: Path, model: GPT) -> dict:
    """Facts, settings and losses of the run that a model directory belongs to, as far as they are known."""
    facts, c = {"parameters": f"{model.num_parameters():,}"}, model.config
    facts["shape"] = f"{c.n_layer} blocks, {c.n_head} heads, {c.n_embd} channels, {c.block_size:,} positions"
    records, last = read_metrics(directory.parent / "metrics.jsonl"), existing(directory.parent / "last")
    if not records or not last or not (last / "training.json").is_file():
        return {"facts": facts, "settings": {}, "records": []}
    settings = read_json(last, "training.json")["settings"]
    meta = Path(settings["data_dir"]) / settings["dataset"]
    if (meta / "meta.json").is_file():
        data = read_json(meta, "meta.json")
        facts |= {"data": f"{settings['dataset']}, from {public(data['source'])}", "tokenizer": data["tokenizer"]}
        facts |= {
            name: f"{split['tokens']:,} tokens, {split['bytes']:,} bytes" for name, split in data["splits"].items()
        }
    figures = {name: value for record in records for name, value in record.items()}
    facts |= {name: f"{figures[name]:,.4f}".removesuffix(".0000") for name in FIGURES if name in figures}
    every = math.ceil(len(records) / 2000)  # of a long run; all evaluations are shown
    shown = [r for i, r in enumerate(records) if i % every == 0 or "val_loss" in r]
    return {
        "facts": facts,
        "settings": {name: value for name, value in settings.items() if name not in PRIVATE},
        "records": [{key: r[key] for key in ("step", "train_loss", "val_loss") if key in r} for r in shown],
    }


def write_page(path: Path, name: str, model: GPT, tokenizer: Tokenizer, bits: int = 16, start: str = "") -> float:
    """Write the page of the model that is called `name` or lies there. Returns its largest `logit_difference`."""
    weights = model.weights()
    matrices = {key: quantize(weight, bits) for key, weight in weights.items() if weight.dim() == 2}
    vectors = {key: weight for key, weight in weights.items() if weight.dim() == 1}
    points, map_share = token_map(weights["transformer.wte.weight"])
    ids = own_text(model, tokenizer.end_of_text)
    tokenizer.encode(start)  # UserError for characters that the model does not know
    directory = (existing(Path(name)) or Path(name)).resolve()
    header = {
        "name": directory.parent.name if directory.name in ("best", "last") else directory.name,
        "config": asdict(model.config),
        "parameters": model.num_parameters(),
        "bits": bits,
        "difference": logit_difference(model, matrices, ids),
        "std": [weights[f"transformer.{table}.weight"].std(correction=0).item() for table in ("wte", "wpe")],
        "map_share": map_share,
        "start": start or tokenizer.decode(ids[1:13]).strip("\ufffd"),
        "tokenizer": tokenizer_data(tokenizer, model.config.vocab_size),
        "run": run_data(directory, model),
        "vectors": [[key, len(vector)] for key, vector in vectors.items()],
        "matrices": [[key, *integers.shape] for key, (_, integers) in matrices.items()],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    floats = [points, *vectors.values(), *(scale for scale, _ in matrices.values())]  # first, so that all is aligned
    rows_of_four = [F.pad(integers, (0, 0, 0, -len(integers) % 4)) for _, integers in matrices.values()]
    numbers = [*(tensor.float() for tensor in floats), *rows_of_four]
    parts = [struct.pack("<I", len(text)), text, *(tensor.contiguous().numpy().tobytes() for tensor in numbers)]
    data = zlib.compress(b"".join(parts), 1)  # higher levels gain nothing on weights
    before, after = with_policy(TEMPLATE.read_text(encoding="utf-8")).split("<!-- data -->")
    with new_file(path) as file:
        file.write(before)
        for first in range(0, len(data), BLOCK):  # the browser needs less memory for several blocks than for one
            block = base64.b64encode(data[first : first + BLOCK]).decode()
            file.write(f'<script type="text/plain" class="data">{block}</script>\n')
        file.write(after)
    return header["difference"]


def with_policy(template: str) -> str:
    """The template with a policy that allows its own script and style, by hash, its worker, and nothing else."""
    policy = "default-src 'none'; connect-src 'none'; base-uri 'none'; form-action 'none'; worker-src blob:"
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        policy += f"; {tag}-src 'sha256-{digest}'"
    return template.replace("{{policy}}", policy)


def main() -> None:
    config, _ = load_settings(PageConfig, positional="models")
    if len(config.models) != 1:
        raise UserError("name one model: python tools/page.py out/best --out=model.html")
    model, tokenizer = load_model(config.models[0])
    millions, most, path = model.num_parameters() / 1e6, MOST_PARAMETERS / 1e6, Path(config.out)
    if millions > most:
        raise UserError(
            f"{millions:,.0f}M parameters, at most {most:.0f}M fit: browsers do not open larger pages reliably"
        )
    bits = (16 if millions <= SMALL / 1e6 else 8) if config.bits == "auto" else int(config.bits)
    note(f"{millions:,.2f}M parameters in {bits} bits: a page of about {millions * bits / 6:,.0f} MB")
    difference = write_page(path, config.models[0], model, tokenizer, bits, config.start)
    size = path.stat().st_size / 1e6
    note(f"wrote {path}: {size:.2f} MB, logits within {difference:.2g} of torch's; open it in a browser")


if __name__ == "__main__":
    run_script(main)
