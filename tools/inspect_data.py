"""Verify the checksums of a prepared data set and print figures and some documents.

python tools/inspect_data.py data/books
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plaingpt.startup

import numpy as np

from plaingpt.console import UserError, counted, note, run_script
from plaingpt.files import json_or_empty
from plaingpt.settings import PathName, load_settings
from plaingpt.tokenizer import Tokenizer
from plaingpt.tokens import SPLITS, Tokens, open_data_set

SAMPLES = 3
SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class InspectConfig:
    data_sets: tuple[PathName, ...] = ()
    """directories of prepared data sets"""


def main() -> None:
    config, _ = load_settings(InspectConfig, positional="data_sets")
    if not config.data_sets:
        raise UserError("name a data set: python tools/inspect_data.py data/books")
    for name in config.data_sets:
        is_path = Path(name).exists() or Path(name).name != name
        inspect(Path(name) if is_path else Path("data", name))  # a name, as train.py's --dataset


def inspect(directory: Path) -> None:
    data = open_data_set(directory, check_all=True)
    source = json_or_empty(directory / "meta.json").get("source")
    found = f"from {source}; checksums and ids are correct" if source else "no checksums; ids are correct"
    note(f"{directory}: {found}")
    for split in SPLITS:
        describe(split, getattr(data, split), data.tokenizer)


def measure(tokens: Tokens, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each document, without end of text, and how often each id occurs."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    ends, position = [], 0
    for ids in tokens.all():
        counts += np.bincount(ids, minlength=len(counts))
        ends.append(np.flatnonzero(ids == tokenizer.end_of_text) + position)
        position += len(ids)
    boundaries = np.concatenate([[-1], *ends, [position]])
    return np.diff(boundaries) - 1, counts


def describe(split: str, tokens: Tokens, tokenizer: Tokenizer) -> None:
    lengths, counts = measure(tokens, tokenizer)
    n_bytes = int(counts @ tokenizer.byte_lengths())
    documents = lengths[lengths > 0]  # end of text may stand before the first document, too
    sizes = counted(len(documents), "document"), counted(len(tokens), "token"), counted(n_bytes, "byte")
    note(f"{split}: {', '.join(sizes)}: {n_bytes / max(len(tokens), 1):.2f} bytes per token")
    used = np.count_nonzero(counts)
    note(f"  {used:,} of {len(counts):,} ids of the vocabulary occur ({used / len(counts):.1%})")
    if not len(documents):
        return
    note(f"  tokens per document: mean {documents.mean():,.0f}, median {np.median(documents):,.0f}")
    starts = np.cumsum(lengths + 1) - lengths - 1
    shown = np.flatnonzero(lengths > 0)
    shown = shown[np.linspace(0, len(shown) - 1, min(SAMPLES, len(shown))).astype(int)]
    extremes = {"shortest": np.where(lengths > 0, lengths, lengths.max() + 1).argmin(), "longest": lengths.argmax()}
    for name, i in [*extremes.items(), *((f"document {i + 1:,}", i) for i in shown)]:
        (ids,) = tokens.windows(starts[i : i + 1], min(int(lengths[i]), SAMPLE_TOKENS))
        text = repr(tokenizer.decode(ids.tolist()))
        note(f"  {name}, {counted(lengths[i], 'token')}: {text}{' …' if len(ids) < lengths[i] else ' (ends here)'}")


if __name__ == "__main__":
    run_script(main)
