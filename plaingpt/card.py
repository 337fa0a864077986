"""The model card: README.md in a model directory, which the hub shows, with the curves beside it.

hf upload OWNER/NAME out/best
"""

import json
import shlex
import shutil
from pathlib import Path

from model import GPT, GPTConfig
from plaingpt.console import counted, millions, perplexity
from plaingpt.metrics import read_metrics

HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
- plaingpt
---
"""
USE = """## Use

```python
from transformers import pipeline

print(pipeline("text-generation", model="OWNER/NAME")("The "))
```
"""
FRESH = ("scratch", "auto", "resume")
PRIVATE = (
    "out_dir", "data_dir", "init_from", "eval_only", "dry_run",
    "wandb_log", "wandb_project", "wandb_run_name", "tensorboard_log",
)  # fmt: skip
YOURS = """The license, the language and what the model is good for are yours to add; this file is written anew at the
next save, and a model with an edited one still loads.
"""


def write_card(directory: Path, out_dir: Path, model: GPT, training: dict) -> None:
    """Write README.md into the model directory, and a copy of the run's loss.png where there is one.

    training: what `Saver.save` is told of the run; what it does not say is left out.
    """
    picture = out_dir / "loss.png"
    if picture.is_file():
        shutil.copyfile(picture, directory / picture.name)
    settings, step = training.get("settings", {}), training["step"]
    records = [record for record in read_metrics(out_dir / "metrics.jsonl") if record["step"] <= step]
    rows = data_rows(settings) | training_rows(settings, step, training["seconds"], records)
    recipe = [f"{name} = {value!r}\n" for name, value in settings.items() if name not in PRIVATE]
    table = "".join(f"| {name} | {text} |\n" for name, text in rows.items())
    origin = settings.get("init_from", "scratch")
    start = "" if origin in FRESH else f", from {public(shlex.quote(origin))}"
    parts = [
        f"{HEAD}\n# {out_dir.resolve().name}\n",
        f"{describe(model.config, model.num_parameters())} Trained with plainGPT{start}.",
        f"\n| | |\n| --- | --- |\n{table}",
        "![losses, learning rate, gradient norm and speed](loss.png)\n" if picture.is_file() else "",
        USE,
        "## Settings\n\n```python\n" + "".join(recipe) + "```\n",
        YOURS,
    ]
    (directory / "README.md").write_text("\n".join(part for part in parts if part), encoding="utf-8")


def public(words: str) -> str:
    """Without the folders of this machine: of a path that does not begin here only the last name."""
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in shlex.split(words))


def describe(config: GPTConfig, parameters: int) -> str:
    biases = "with" if config.bias else "without"
    return (
        f"A GPT-2 of {millions(parameters)} parameters: {counted(config.n_layer, 'block')} of "
        f"{counted(config.n_embd, 'channel')}, {counted(config.n_head, 'head')}, "
        f"{counted(config.block_size, 'position')}, {counted(config.vocab_size, 'id')}, {biases} biases."
    )


def data_rows(settings: dict) -> dict[str, str]:
    """What the model was trained on, as the data set's meta.json says it."""
    if "dataset" not in settings:
        return {}
    path = Path(settings["data_dir"]) / settings["dataset"] / "meta.json"
    if not path.is_file():  # prepared by others
        return {"data": settings["dataset"]}
    meta = json.loads(path.read_bytes())
    sizes = [f"{split['tokens']:,} tokens, {split['bytes'] / 1e6:,.1f} MB" for split in meta["splits"].values()]
    return {
        "data": f"{settings['dataset']}, from {public(meta['source'])}",
        "for training, for validation": "; ".join(sizes),
        "tokenizer": f"{meta['tokenizer']}, {meta['vocab_size']:,} ids",
    }


def training_rows(settings: dict, step: int, seconds: float, records: list[dict]) -> dict[str, str]:
    last = {name: value for record in records for name, value in record.items()}
    rows = {"updates": f"{step:,}"}
    if "tokens" in last:
        rows |= {"tokens": f"{last['tokens']:,}", "seconds of training": f"{seconds:,.0f}"}
    if "val_loss" in last:
        bits = f", {last['val_bpb']:.4f} bits per byte" if "val_bpb" in last else ""
        rows["validation loss"] = f"{last['val_loss']:.4f} (perplexity {perplexity(last['val_loss'])}{bits})"
    if "train_loss" in last:
        rows["training loss"] = f"{last['train_loss']:.4f}"
    if settings.get("eval_iters") and "validation loss" in rows:
        rows["validation loss"] += f", over {settings['eval_iters']:,} batches"
    return rows
