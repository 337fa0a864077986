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
from plaingpt.files import existing, json_or_empty
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
    source = json_or_empty((existing(directory) or directory) / "meta.json").get("source")
    found = f"from {source!s:.300}; checksums and ids are correct" if source else "no checksums; ids are correct"
    note(f"{directory}: {found}")
    for split in SPLITS:
        describe(split, getattr(data, split), data.tokenizer)


def describe(split: str, tokens: Tokens, tokenizer: Tokenizer) -> None:
    starts, position = [np.zeros(1, np.int64)], 0
    for ids in tokens.all():
        starts.append(np.flatnonzero(ids == tokenizer.end_of_text) + position + 1)
        position += len(ids)
    starts = np.concatenate(starts)
    lengths = np.diff(starts, append=position + 1) - 1  # without end of text
    documents = np.flatnonzero(lengths)  # end of text may stand before the first document, too
    n_bytes = f", {counted(tokens.n_bytes, 'byte')}" if tokens.n_bytes else ""  # unknown for nanoGPT's data sets
    note(f"{split}: {counted(len(documents), 'document')}, {counted(len(tokens), 'token')}{n_bytes}")
    for n in np.linspace(0, len(documents) - 1, min(SAMPLES, len(documents))).astype(int):
        i = documents[n]
        (ids,) = tokens.windows(starts[i : i + 1], min(int(lengths[i]), SAMPLE_TOKENS))
        text = repr(tokenizer.decode(ids.tolist()))
        note(f"  document {n + 1:,}, {counted(lengths[i], 'token')}: {text}{' …' if len(ids) < lengths[i] else ''}")


if __name__ == "__main__":
    run_script(main)
