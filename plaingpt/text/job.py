"""What is to be prepared, in units of work, and how far it is: what every process that takes part sees.

Under data/<name>.partial/ merged/ has the units that are put together. A unit whose turn has not come yet leaves its
tokens on disk and, last, a small manifest. Whoever goes on later, or works beside, does the others. So a stop at any
moment loses the units that were at work, mostly some seconds each (a compressed file or a shard of the hub is one),
or that waited in memory for the one before (merger.py), and how many processes or machines took part changes
nothing in the result.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plaingpt.text.readers import Item, size_of
from plaingpt.tokenizer import Tokenizer

UNIT_BYTES = 1 << 23  # of a source: what a thread encodes before it reports
MAX_UNITS = 4096  # of a very large source the units are larger
UNIT_FORMAT = 3  # of what is left under .partial: what another version of this file left there begins anew
RECORD = np.dtype([("digest", "<u8"), ("tokens", "<u8"), ("bytes", "<u8")])  # what removing a document takes to know


@dataclass(frozen=True)
class Job:
    """What is to be done, the same for every process that takes part, and what has been done of it."""

    partial: Path
    digest: str
    units: list[list[Item]]
    tokenizer: Tokenizer
    kind: str  # what meta.json calls the tokenizer
    val_fraction: float
    by_content: bool  # whole documents go to a split; no: the tail of each goes to validation
    column: str
    bad_files: str
    dedup: bool
    shard_tokens: int

    def manifest(self, unit: int) -> Path:
        return self.partial / f"{unit:06}.json"

    def tokens(self, unit: int, split: str) -> Path:
        return self.partial / f"{unit:06}.{split}.bin"

    def records(self, unit: int, split: str) -> Path:
        return self.partial / f"{unit:06}.{split}.documents"

    @property
    def merged(self) -> Path:
        """Where the units are put together."""
        return self.partial / "merged"

    @property
    def progress(self) -> Path:
        """What `merged` has: the number of units, and of each split the figures and files."""
        return self.partial / "merged.json"

    def left(self) -> list[int]:
        """The units that are still to be encoded."""
        merged = (read_json(self.progress) or {"units": 0})["units"]
        return [unit for unit in range(merged, len(self.units)) if read_json(self.manifest(unit)) is None]


def read_json(path: Path) -> dict | None:
    """What the file says; None where it is missing, or was left empty or in part by a loss of power."""
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: dict) -> None:
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(json.dumps(content))
    new.replace(path)


def make_units(items: Iterable[Item], unit_bytes: int) -> list[list[Item]]:
    """Neighbouring items together until they have `unit_bytes`."""
    units, size = [], unit_bytes
    for item in items:
        if size >= unit_bytes or not size_of(item):
            units.append([])
            size = 0
        units[-1].append(item)
        size += size_of(item) or unit_bytes
    return units
