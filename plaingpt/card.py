"""The model card: README.md in a model directory, which the hub shows, and a copy of the run's loss.png.

hf upload OWNER/NAME out/best
"""

import html
import json
import shlex
import shutil
from pathlib import Path

from model import GPT
from plaingpt.metrics import read_metrics

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, plaingpt]
---

# {name}

A GPT-2 trained with plainGPT. Please add the license, the language and the intended use.

| | |
| --- | --- |
{table}

![losses, learning rate, gradient norm and speed](loss.png)

```python
{recipe}
```
"""
LOCAL = ("out_dir", "data_dir", "init_from", "eval_only", "dry_run", "wandb_log", "wandb_project", "wandb_run_name")
FIGURES = ("step", "tokens", "seconds", "train_loss", "val_loss", "val_bpb")  # of metrics.jsonl


def write_card(directory: Path, out_dir: Path, model: GPT, training: dict) -> None:
    """Write README.md into a model directory. training: the content of training.json."""
    settings, c, last = training.get("settings", {}), model.config, {}
    for record in read_metrics(out_dir / "metrics.jsonl"):
        last |= record if record["step"] <= training["step"] else {}
    size = f"{model.num_parameters():,} parameters, n_layer {c.n_layer}, n_head {c.n_head}, n_embd {c.n_embd}"
    rows = {"model": size, "context": f"{c.block_size:,} tokens"}
    rows["started from"] = public(shlex.quote(settings.get("init_from", "scratch")))
    meta = Path(settings.get("data_dir", "")) / settings.get("dataset", "") / "meta.json"
    if meta.is_file():
        data = json.loads(meta.read_bytes())
        rows["data"] = f"{settings['dataset']}, from {public(data['source'])}"
        rows |= {name: f"{s['tokens']:,} tokens, {s['bytes']:,} bytes" for name, s in data["splits"].items()}
        rows["tokenizer"] = f"{data['tokenizer']}, {data['vocab_size']:,} ids"
    rows |= {name: f"{last[name]:,.4f}".removesuffix(".0000") for name in FIGURES if name in last}
    table = [f"| {name} | {_escaped(text)} |" for name, text in rows.items()]
    recipe = [f"{name} = {value!r}" for name, value in settings.items() if name not in LOCAL]
    name, recipe = _escaped(out_dir.resolve().name), "\n".join(recipe).replace("<", "\\x3c")  # no HTML anywhere
    (directory / "README.md").write_text(CARD.format(name=name, table="\n".join(table), recipe=recipe), "utf-8")
    if (out_dir / "loss.png").is_file():
        shutil.copyfile(out_dir / "loss.png", directory / "loss.png")


def public(words: str) -> str:
    """Shell words without the folders of this machine: only the last name of an absolute path."""
    return shlex.join(Path(word).name if Path(word).is_absolute() else word for word in shlex.split(words))


def _escaped(text: str) -> str:
    """Text of unknown origin for one cell of a Markdown table: no HTML, no new cell or line."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;")
