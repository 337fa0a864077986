"""Ways to damage a folder, for the property tests and for bench/faults.py.

A damage is a name and a number: the same number gives the same damage. Checksums may be kept, rewritten or removed
afterwards, so that the checks behind them are tested, too; but not where only a run reads what it has written.
"""

import json
import os
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from plaingpt.checkpoint import save_model
from plaingpt.files import SUMS, sha256

CHECKPOINT = [
    "config.json", "generation_config.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json",
    "tokenizer_config.json", "training.json", "SHA256SUMS",
]  # fmt: skip
DATA_SET = ["meta.json", "tokenizer.json", "train.bin", "val.bin", "SHA256SUMS"]
BYTES = ("truncate", "empty", "flip", "noise", "delete", "directory", "link out", "swap", "no permission")
TENSORS = ("nan", "extra tensor", "missing tensor", "other shape", "other type", "renamed tensor")
VALUES = ("drop key", "replace value", "format version")
SUMS_AFTER = ("kept", "rewritten", "removed")
OF_RUNS = ("training.json", "optimizer.safetensors")
STRANGE = [
    None, True, False, -1, 0, 1, 3, 2**40, 10**30, 0.5, 4.0, 1e300, -1e300,  float("nan"), float("inf"), "", "two",
    "../../etc/passwd", "\x00", "n" * 300, "\x1b[31m", [], {}, [[]], [1, 2], {"a": 1}, "float16", "<u2", "object",
]  # fmt: skip


def ways(path: Path) -> tuple[str, ...]:
    """The kinds of damage that apply to a file."""
    more = {".safetensors": TENSORS, ".json": VALUES}.get(path.suffix, ())
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0  # root may read everything
    return tuple(way for way in BYTES if way != "no permission" or not is_root) + more


def damage(path: Path, way: str, number: int, sums: str = "kept") -> None:
    """Damage one file, then keep, rewrite or remove SHA256SUMS beside it."""
    rng = random.Random(number)
    content = bytearray(path.read_bytes())
    if way in TENSORS:
        _damage_tensors(path, way, rng)
    elif way in VALUES:
        _damage_values(path, way, rng)
    elif way == "truncate":
        path.write_bytes(content[: rng.randrange(max(1, len(content)))])
    elif way == "empty":
        path.write_bytes(b"")
    elif way == "flip":
        for _ in range(rng.choice([1, 1, 5])):
            # the header, in the first bytes, is most sensitive
            content[rng.randrange(len(content) if rng.random() < 0.5 else min(200, len(content)))] ^= (
                1 << rng.randrange(8)
            )
        path.write_bytes(content)
    elif way == "noise":
        path.write_bytes(rng.randbytes(rng.choice([1, len(content)])))
    elif way == "swap":
        other = rng.choice([other for other in sorted(path.parent.iterdir()) if other.is_file() and other != path])
        path.write_bytes(other.read_bytes())
    elif way == "no permission":
        path.chmod(0)
    else:
        moved = path.parent.parent / f"{path.name}.moved"
        path.rename(moved)
        if way == "directory":
            path.mkdir()
        elif way == "link out":
            path.symlink_to(moved)
    lines = path.parent / SUMS
    sums = "kept" if path.name in OF_RUNS else sums
    if sums != "kept" and path != lines:
        lines.unlink(missing_ok=True)
    if sums == "rewritten" and path != lines and way not in ("directory", "link out", "no permission"):
        names = sorted(p.name for p in path.parent.iterdir() if p.is_file() and p.suffix != ".bin")
        lines.write_text("".join(f"{sha256(path.parent / name)}  {name}\n" for name in names))


def _damage_tensors(path: Path, way: str, rng: random.Random) -> None:
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    if way == "nan":
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), float("-inf")])
    elif way == "extra tensor":
        tensors[rng.choice(["", name + ".more", "h.9.ln_1.weight", "../x", "lm_head"])] = tensor.clone()
    elif way == "missing tensor":
        del tensors[name]
    elif way == "other shape":
        tensors[name] = rng.choice([tensor[None].clone(), tensor.flatten()[:-1].clone(), tensor.new_zeros(0)])
    elif way == "other type":
        tensors[name] = tensor.view(torch.int32).clone()
    else:
        tensors[f"{name}_"] = tensors.pop(name)
    save_file(tensors, path)


def _damage_values(path: Path, way: str, rng: random.Random) -> None:
    content = json.loads(path.read_text())
    if way == "format version":
        content["format_version"] = rng.choice([0, 2, "1", None])
    else:
        holder = content
        while True:  # descend to a random depth
            inner = [
                value for value in (holder.values() if isinstance(holder, dict) else holder) if value and _holds(value)
            ]
            if not inner or rng.random() < 0.5:
                break
            holder = rng.choice(inner)
        key = rng.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        if way == "drop key":
            del holder[key]
        else:
            holder[key] = rng.choice(STRANGE)
    path.write_text(json.dumps(content))


def _holds(value) -> bool:
    return isinstance(value, dict | list)


def restore(folder: Path, sound: Path) -> None:
    """Make `folder` a copy of `sound`, and remove what the damage left beside it."""
    for path in [folder, *folder.parent.glob("*.moved")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.copytree(sound, folder)


def same_model(directory: Path, model, tokenizer, scratch: Path) -> bool:
    """Whether a loaded model has exactly the weights in a directory, but for rows of the embedding without a token."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    save_model(scratch, model, tokenizer)
    ours, theirs = load_file(scratch / "model.safetensors"), load_file(directory / "model.safetensors")
    theirs["wte.weight"] = theirs["wte.weight"][: tokenizer.vocab_size]
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
