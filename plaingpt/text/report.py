"""What a preparation made; and a look at it later: its figures, documents, checksums, and a picture."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np

from plaingpt.console import UserError, counted, note
from plaingpt.tokenizer import Tokenizer
from plaingpt.tokens import SPLITS, DataSet, Tokens, open_data_set

SAMPLES = 3
SAMPLE_TOKENS = 60


def inspect_data_set(directory: Path) -> None:
    """Verify every file, tell what is in them, and draw inspect.png beside them."""
    data = open_data_set(directory, check_all=True)
    meta = directory / "meta.json"
    source = json.loads(meta.read_bytes())["source"] if meta.exists() else None
    note(
        f"{directory}: " + (f"from {source}; checksums and ids are right" if source else "no checksums; ids are right")
    )
    lengths, counts = {}, {}
    for split in SPLITS:
        lengths[split], counts[split] = _measure(getattr(data, split), data.tokenizer)
        _tell(split, getattr(data, split), data.tokenizer, lengths[split], counts[split])
    note(f"drawn: {_draw(directory, data, lengths, counts)}")


def _measure(tokens: Tokens, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each document, without end of text, and how often each id occurs."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    ends, position = [], 0
    for ids in tokens.all():
        counts += np.bincount(ids, minlength=len(counts))
        ends.append(np.flatnonzero(ids == tokenizer.end_of_text) + position)
        position += len(ids)
    borders = np.concatenate([[-1], *ends, [position]])
    return np.diff(borders) - 1, counts


def _tell(split: str, tokens: Tokens, tokenizer: Tokenizer, lengths: np.ndarray, counts: np.ndarray) -> None:
    n_bytes = int(counts @ tokenizer.byte_lengths())
    documents = lengths[lengths > 0]  # where end of text opens every document, an empty one comes before the first
    sizes = counted(len(documents), "document"), counted(len(tokens), "token"), counted(n_bytes, "byte")
    note(f"\n{split}: {', '.join(sizes)}: {n_bytes / max(len(tokens), 1):.2f} bytes a token")
    used = np.count_nonzero(counts)
    note(f"  {used:,} of {len(counts):,} ids of the vocabulary occur ({used / len(counts):.1%})")
    if not len(documents):
        return
    starts = np.cumsum(lengths + 1) - lengths - 1
    note(f"  tokens a document: mean {documents.mean():,.0f}, median {np.median(documents):,.0f}")
    shown = np.flatnonzero(lengths > 0)
    shown = shown[np.linspace(0, len(shown) - 1, min(SAMPLES, len(shown))).astype(int)]
    extremes = {"shortest": np.where(lengths > 0, lengths, lengths.max() + 1).argmin(), "longest": lengths.argmax()}
    for name, i in [*extremes.items(), *((f"document {i + 1:,}", i) for i in shown)]:
        ids = np.empty(min(int(lengths[i]), SAMPLE_TOKENS), np.int64)
        tokens.read(int(starts[i]), ids)
        text = repr(tokenizer.decode(ids.tolist()))
        note(f"  {name}, {counted(lengths[i], 'token')}: {text}{' …' if len(ids) < lengths[i] else ' (ends here)'}")


def _draw(directory: Path, data: DataSet, lengths: dict, counts: dict) -> Path:
    from matplotlib.figure import Figure  # slow to import, and needed here alone

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_length, by_rank = figure.subplots(1, 2)
    longest = max(2, *(int(length.max()) for length in lengths.values()))
    bins = np.unique(np.geomspace(1, longest + 1, 60).astype(int))
    for split in SPLITS:
        by_length.hist(lengths[split][lengths[split] > 0], bins=bins, histtype="step", label=split)
        frequencies = np.sort(counts[split])[::-1]
        by_rank.plot(np.arange(1, len(frequencies) + 1), frequencies / max(frequencies.sum(), 1), label=split)
    by_length.set(xscale="log", yscale="log", xlabel="tokens of a document", ylabel="documents")
    by_rank.set(xscale="log", yscale="log", xlabel="rank of an id", ylabel="share of the tokens")
    for axes in (by_length, by_rank):
        axes.legend()
    path = directory / "inspect.png"
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:  # another user's data set, say
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


RECIPES = {"python": "quickstart", "shakespeare_char": "train_shakespeare_cpu"}  # which name the data set themselves


def say_what_was_made(directory: Path, meta: dict, seconds: float) -> None:
    """A preparation's last lines; under torchrun too whoever merged says them, not rank 0."""
    lines = []
    for split, figures in meta["splits"].items():
        tokens, documents = counted(figures["tokens"], "token"), counted(figures["documents"], "document")
        files = f" in {len(figures['files'])} files" if len(figures["files"]) > 1 else ""
        lines.append(f"{split}: {tokens} of {figures['bytes'] / figures['tokens']:.2f} bytes, {documents}{files}")
    size = sum(figures["bytes"] for figures in meta["splits"].values())
    rate = f"{size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"
    lines.append(f"{directory}: {rate if size > 1e5 else f'{size:,} bytes'}, vocabulary of {meta['vocab_size']:,}")
    recipe = "train_gpt2" if meta["splits"]["train"]["tokens"] > 1e8 else "quickstart"
    place = "" if directory.parent == Path("data") else f" --data_dir={shlex.quote(str(directory.parent))}"
    name = directory.name
    if name in RECIPES and not place:
        lines.append(f"next: python train.py config/{RECIPES[name]}.py")
    else:
        lines.append(f"next: python train.py config/{recipe}.py --dataset={name}{place} --out_dir=out-{name}")
    print("\n".join(lines), file=sys.stderr)
