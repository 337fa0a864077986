"""The table of docs/scaling.md: what the recipes need and take. Nothing is trained.

python docs/scale.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from config.settings import load_settings
from model import GPT, GPTConfig
from plan import CARDS, hours, memory, tokens_per_update
from train import TrainConfig

RECIPES = ("train_gpt2", "train_gpt2_medium", "train_gpt2_large", "train_gpt2_xl")


def table() -> str:
    cards = [f"{n} x {card}" for card in CARDS for n in (1, 8)]
    lines = [
        f"| recipe | parameters | updates | tokens | memory a GPU | {' | '.join(cards)} |",
        "| --- " * (5 + len(cards)) + "|",
    ]
    for recipe in RECIPES:
        config, _ = load_settings(TrainConfig, [str(ROOT / "config" / f"{recipe}.py")])
        shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size=50257, **shape))
        need = sum(memory(model, config).values())
        spans = [
            f"{hours(model, config, card, n):,.1f} h" if need < size * 1e9 else "too little memory"
            for card, size in CARDS.items()
            for n in (1, 8)
        ]
        lines.append(
            f"| `{recipe}.py` | {model.num_parameters() / 1e6:,.0f}M | {config.max_iters:,} "
            f"| {config.max_iters * tokens_per_update(config) / 1e9:.1f}B | {need / 1e9:.0f} GB | {' | '.join(spans)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
