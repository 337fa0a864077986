"""The tables of docs/scaling.md: what the recipes need and take, and what many GPUs keep. Nothing is trained.

python docs/scale.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from bench.scale import FAST, SLOW, Model, efficiency
from model import GPT, GPTConfig
from plaingpt.plan import CARDS, hours, memory, tokens_per_update
from plaingpt.settings import load_settings
from train import TrainConfig

RECIPES = ("train_gpt2", "train_gpt2_medium", "train_gpt2_large", "train_gpt2_xl")


SEQUENCES = 512  # of 1,024 tokens an update, for the many: half a million tokens
MANY = (8, 16, 32, 64, 128, 256, 512)
WAYS = [  # network, cluster, the settings, and what the model of bench/scale.py calls them
    ("400 Gb/s a GPU", FAST, "", dict()),
    ("", FAST, "`--reduce_dtype=bfloat16`", dict(reduce_bytes=2)),
    ("", FAST, "`--sharding=hybrid`", dict(sharding="hybrid")),
    ("", FAST, "`--sharding=fsdp`", dict(sharding="fsdp")),
    ("100 Gb/s a node", SLOW, "", dict()),
    ("", SLOW, "`--reduce_dtype=bfloat16`", dict(reduce_bytes=2)),
]


def meta_model(recipe: str) -> tuple[GPT, TrainConfig]:
    config, _ = load_settings(TrainConfig, [str(ROOT / "config" / f"{recipe}.py")])
    shape = {name: getattr(config, name) for name in ("block_size", "n_layer", "n_head", "n_embd", "bias")}
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=50257, **shape)), config


def kept(model: Model, config: TrainConfig, gpus: int, sequences: int, cluster, how: dict) -> float:
    """Efficiency where each GPU has so many sequences an update, in micro-steps of the recipe's size or less."""
    at_once = min(2 ** (config.batch_size.bit_length() - 1), sequences)
    return efficiency(model, gpus, sequences * config.block_size, sequences // at_once, cluster, **how)


def many() -> str:
    lines = [
        f"| parameters | network | settings | {' | '.join(f'{n} GPUs' for n in MANY)} | 90% of 512 GPUs |",
        "| --- " * (4 + len(MANY)) + "|",
    ]
    for recipe in RECIPES:
        gpt, config = meta_model(recipe)
        model = Model.of(gpt)
        for i, (network, cluster, settings, how) in enumerate(WAYS):
            shares = [kept(model, config, n, SEQUENCES // n, cluster, how) for n in MANY]
            enough = (s for s in (2**k for k in range(11)) if kept(model, config, 512, s, cluster, how) >= 0.9)
            needed = next((f"{s * config.block_size * 512 / 1e6:.1f}M" for s in enough), "none")
            name = "" if i else f"{gpt.num_parameters() / 1e6:,.0f}M"
            cells = " | ".join(f"{share:.0%}" for share in shares)
            lines.append(f"| {name} | {network} | {settings} | {cells} | {needed} |")
    return "\n".join(lines)


def table() -> str:
    cards = [f"{n} x {card}" for card in CARDS for n in (1, 8)]
    lines = [
        f"| recipe | parameters | updates | tokens | memory a GPU | {' | '.join(cards)} |",
        "| --- " * (5 + len(cards)) + "|",
    ]
    for recipe in RECIPES:
        model, config = meta_model(recipe)
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
    print(table(), many(), sep="\n\n")
