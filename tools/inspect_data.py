"""What a prepared data set holds: figures, documents, checksums verified, and a picture, inspect.png, in its folder.

python tools/inspect_data.py data/books
"""

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plaingpt.startup

import numpy as np

from plaingpt.console import UserError, counted, note, one_line, run_script
from plaingpt.files import new_file
from plaingpt.settings import PathName, load_settings
from plaingpt.tokenizer import Tokenizer
from plaingpt.tokens import SPLITS, DataSet, Tokens, open_data_set

SAMPLES = 3
SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class InspectConfig:
    data_sets: tuple[PathName, ...] = ()
    """folders of prepared data sets"""


def main() -> None:
    config, _ = load_settings(InspectConfig, positional="data_sets")
    if not config.data_sets:
        raise UserError("name a data set: python tools/inspect_data.py data/books")
    for name in config.data_sets:
        inspect(Path(name))


def inspect(directory: Path) -> None:
    data = open_data_set(directory, check_all=True)
    meta = directory / "meta.json"
    source = json.loads(meta.read_bytes())["source"] if meta.exists() else None
    found = f"from {source}; checksums and ids are right" if source else "no checksums; ids are right"
    note(f"{directory}: {found}")
    lengths, counts = {}, {}
    for split in SPLITS:
        lengths[split], counts[split] = measure(getattr(data, split), data.tokenizer)
        describe(split, getattr(data, split), data.tokenizer, lengths[split], counts[split])
    path = directory / "inspect.png"
    try:
        with new_file(path, "wb") as file:
            file.write(drawn(directory.name, data, lengths, counts))
    except OSError as error:  # another user's data set, for example
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
    note(f"drawn: {path}")


def measure(tokens: Tokens, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each document, without end of text, and how often each id occurs."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    ends, position = [], 0
    for ids in tokens.all():
        counts += np.bincount(ids, minlength=len(counts))
        ends.append(np.flatnonzero(ids == tokenizer.end_of_text) + position)
        position += len(ids)
    borders = np.concatenate([[-1], *ends, [position]])
    return np.diff(borders) - 1, counts


def describe(split: str, tokens: Tokens, tokenizer: Tokenizer, lengths: np.ndarray, counts: np.ndarray) -> None:
    n_bytes = int(counts @ tokenizer.byte_lengths())
    documents = lengths[lengths > 0]  # end of text may stand before the first document, too
    sizes = counted(len(documents), "document"), counted(len(tokens), "token"), counted(n_bytes, "byte")
    note(f"{split}: {', '.join(sizes)}: {n_bytes / max(len(tokens), 1):.2f} bytes a token")
    used = np.count_nonzero(counts)
    note(f"  {used:,} of {len(counts):,} ids of the vocabulary occur ({used / len(counts):.1%})")
    if not len(documents):
        return
    note(f"  tokens a document: mean {documents.mean():,.0f}, median {np.median(documents):,.0f}")
    starts = np.cumsum(lengths + 1) - lengths - 1
    shown = np.flatnonzero(lengths > 0)
    shown = shown[np.linspace(0, len(shown) - 1, min(SAMPLES, len(shown))).astype(int)]
    extremes = {"shortest": np.where(lengths > 0, lengths, lengths.max() + 1).argmin(), "longest": lengths.argmax()}
    for name, i in [*extremes.items(), *((f"document {i + 1:,}", i) for i in shown)]:
        ids = np.empty(min(int(lengths[i]), SAMPLE_TOKENS), np.int64)
        tokens.read(int(starts[i]), ids)
        text = repr(tokenizer.decode(ids.tolist()))
        note(f"  {name}, {counted(lengths[i], 'token')}: {text}{' …' if len(ids) < lengths[i] else ' (ends here)'}")


def drawn(name: str, data: DataSet, lengths: dict, counts: dict) -> bytes:
    """A PNG: how long documents are, and how often ids occur by rank."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_length, by_rank = figure.subplots(1, 2)
    longest = max(2, *(int(length.max()) for length in lengths.values()))
    bins = np.unique(np.geomspace(1, longest + 1, 60).astype(int))
    for split in SPLITS:
        documents = lengths[split][lengths[split] > 0]
        if len(documents):
            by_length.hist(documents, bins=bins, histtype="step", label=f"{split}: {len(documents):,}")
        frequencies = np.sort(counts[split][counts[split] > 0])[::-1]
        by_rank.plot(np.arange(1, len(frequencies) + 1), frequencies / max(frequencies.sum(), 1), label=split)
    by_length.set(xscale="log", xlabel="tokens", ylabel="documents", title="length of documents")
    by_rank.set(
        xscale="log", yscale="log", xlabel="rank of an id", ylabel="share of tokens", title="use of the vocabulary"
    )
    by_length.set_ylim(bottom=0)
    figure.suptitle(f"{name}: {counted(len(data.train), 'token')} for training, {len(data.val):,} for validation")
    for axes in (by_length, by_rank):
        axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()


if __name__ == "__main__":
    run_script(main)
