"""The pictures of docs/model.md, from a trained model.

python docs/draw.py --model=out-shakespeare-cpu/best
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from plaingpt.checkpoint import load_model


def cosine(rows: torch.Tensor) -> torch.Tensor:
    """(N, C) to the (N, N) cosines of the angles between rows, the mean row taken off first."""
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    return rows @ rows.T


def picture(name: str, values: torch.Tensor, title: str, labels: list[str] | None = None) -> None:
    figure = Figure(figsize=(6.4, 5.6) if labels is None else (8.4, 7.4), layout="constrained")
    axes = figure.subplots()
    figure.colorbar(axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1), label="cosine")
    axes.set_title(title)
    if labels:
        axes.set_xticks(range(len(labels)), labels, fontsize=7)
        axes.set_yticks(range(len(labels)), labels, fontsize=7)
    FigureCanvasAgg(figure).print_png(str(Path(__file__).parent / name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="out-shakespeare-cpu/best")
    model, tokenizer = load_model(parser.parse_args().model)
    weights = model.weights()
    picture("wpe.png", cosine(weights["transformer.wpe.weight"]), "wpe: how alike two positions are")
    size = tokenizer.vocab_size - 1
    similarity = cosine(weights["transformer.wte.weight"][:size])
    names = [repr(tokenizer.decode([i]))[1:-1] for i in range(size)]
    if size <= 128:
        picture("wte.png", similarity, "wte: how alike two tokens are", names)
    similarity.fill_diagonal_(-1)
    for i, row in enumerate(similarity):
        print(names[i], "->", "  ".join(f"{names[j]} {row[j]:.2f}" for j in row.topk(4).indices.tolist()))


if __name__ == "__main__":
    main()
