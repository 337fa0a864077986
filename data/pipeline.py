"""From items of text to token files: units of work are encoded by threads, and merged in their order.

Under data/<name>.partial/ every unit leaves its tokens and, last, a small manifest. Whoever goes on later, or works
beside, does the units that have none; when all are there they are merged. So a stop at any moment loses a few
seconds of work, and how many processes or machines took part changes nothing in the result.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config.settings import RunFailed, note
from data.bulk import BulkEncoder
from data.readers import Document, Item, size_of, split_of
from data.token_files import SPLITS, ShardWriter, id_dtype
from data.tokenizer import Tokenizer

UNIT_BYTES = 1 << 23  # of a source: what a thread encodes before it reports
MAX_UNITS = 4096  # of a very large source the units are larger
UNIT_FORMAT = 2  # of what a unit leaves: work that another version of this file left unfinished begins anew
BATCH_BYTES = 1 << 20  # of text encoded at a time
RECORD = np.dtype([("digest", "<u8"), ("tokens", "<u8"), ("bytes", "<u8")])  # what removing a document takes to know


@dataclass(frozen=True)
class Job:
    """What every unit has in common."""

    partial: Path
    val_fraction: float
    by_content: bool  # whole documents go to a split; no: the tail of each goes to validation
    column: str
    bad_files: str
    dedup: bool

    def manifest(self, unit: int) -> Path:
        return self.partial / f"{unit:06}.json"

    def tokens(self, unit: int, split: str) -> Path:
        return self.partial / f"{unit:06}.{split}.bin"

    def records(self, unit: int, split: str) -> Path:
        return self.partial / f"{unit:06}.{split}.documents"


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


def encode_units(
    job: Job,
    units: list[list[Item]],
    mine: Sequence[int],
    encoder: "Encoder",
    threads: int,
    merger: "Merger | None" = None,
) -> None:
    """Encode those of `mine` that are not done yet; `merger` puts them together meanwhile."""
    todo = [unit for unit in mine if not job.manifest(unit).exists()]
    sizes = {unit: sum(map(size_of, units[unit])) for unit in mine}
    done = sum(sizes.values()) - sum(sizes[unit] for unit in todo)
    if len(todo) < len(mine):
        note(f"going on: {len(mine) - len(todo):,} of {len(mine):,} units of work are done already")
    # of a data set that is streamed the size is not known: then the bar counts shards
    known = all(sizes.values())
    options = {"unit": "B", "unit_scale": True} if known else {"unit": "shard"}
    bar = tqdm(
        total=sum(sizes.values()) if known else len(mine),
        initial=done if known else len(mine) - len(todo),
        desc="encoding",
        disable=True if os.environ.get("RANK", "0") != "0" else None,
        **options,
    )
    with bar, contextlib.closing(_in_threads(encoder, units, todo, threads)) as encoded:
        for unit in encoded:
            bar.update(sizes[unit] if known else 1)
            if merger:
                merger.add_units()


def _in_threads(encoder: "Encoder", units: list[list[Item]], todo: list[int], threads: int) -> Iterator[int]:
    """Encode the units `todo` and give each one's number when it is done.

    Reading Parquet, encoding, hashing and writing leave Python's lock to others: threads are enough.
    """
    pool = concurrent.futures.ThreadPoolExecutor(min(threads, len(todo)) or 1)
    try:
        futures = [pool.submit(encoder.encode, unit, units[unit]) for unit in todo]
        for future in concurrent.futures.as_completed(futures):
            yield future.result()
    finally:
        encoder.stop.set()  # after a failure or Ctrl-C the others leave what they are at
        pool.shutdown(cancel_futures=True)


class Encoder:
    """Encodes units, in any number of threads, until `stop` is set."""

    def __init__(self, job: Job, tokenizer: Tokenizer):
        self.job, self.stop = job, threading.Event()
        self.bulk = BulkEncoder(tokenizer)
        self.dtype, self.end_of_text = id_dtype(tokenizer.vocab_size), tokenizer.end_of_text

    def encode(self, unit: int, items: list[Item]) -> int:
        """Write the unit's files, the manifest last; return `unit`."""
        job = self.job
        with contextlib.ExitStack() as stack:
            writers = {split: stack.enter_context(UnitWriter(self, unit, split)) for split in SPLITS}
            for item in items:
                for document in item.documents(job.column, job.bad_files):
                    if self.stop.is_set():
                        return unit
                    for split, text, digest in self.split(document):
                        writers[split].add(text, digest, document.begins)
            figures = {split: writer.close() for split, writer in writers.items()}
        new = job.manifest(unit).with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(figures))
        new.replace(job.manifest(unit))
        return unit

    def split(self, document: Document) -> Iterator[tuple[str, bytes, bytes]]:
        """The document's share in each split: (split, text, digest)."""
        if document.split:
            yield document.split, document.text, os.urandom(8)
            return
        digest = hashlib.sha256(document.text).digest()
        if self.job.by_content:
            yield split_of(digest, self.job.val_fraction), document.text, digest
            return
        text = document.text.decode()
        border = int(len(text) * (1 - self.job.val_fraction))
        for split, part in (("train", text[:border]), ("val", text[border:])):
            if part:
                yield split, part.encode(), digest


class UnitWriter:
    """One split of one unit: documents in, a file of ids out, end of text before each document that begins."""

    def __init__(self, encoder: Encoder, unit: int, split: str):
        self.encoder = encoder
        self.path, self.records = encoder.job.tokens(unit, split), encoder.job.records(unit, split)
        self.new = self.path.with_suffix(f".{os.getpid()}")
        self.file = open(self.new, "wb")  # noqa: SIM115 (closed on leaving)
        self.checksum = 0
        self.texts, self.digests, self.begins, self.waiting = [], [], True, 0
        self.figures = {"tokens": 0, "bytes": 0, "documents": 0}
        self.recorded = []

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self.new.unlink(missing_ok=True)  # still there after a failure only

    def add(self, text: bytes, digest: bytes, begins: bool) -> None:
        if self.waiting >= BATCH_BYTES or not begins:
            self.flush()
            self.begins = begins
        self.texts.append(text)
        self.digests.append(digest)
        self.waiting += len(text)

    def flush(self) -> None:
        """Encode what waits: documents of which only the first may go on with the one before."""
        if not self.texts:
            return
        encoder = self.encoder
        ids = encoder.bulk.encode(self.texts).astype(encoder.dtype)
        if encoder.job.dedup:
            records = np.empty(len(self.texts), RECORD)
            records["digest"] = np.frombuffer(b"".join(digest[:8] for digest in self.digests), "<u8")
            records["tokens"] = np.diff(np.flatnonzero(ids == encoder.end_of_text), append=len(ids))
            records["tokens"][0] -= not self.begins
            records["bytes"] = [len(text) for text in self.texts]
            self.recorded.append(records)
        ids = ids[not self.begins :]
        self.file.write(ids)
        self.checksum = zlib.crc32(ids, self.checksum)
        self.figures["tokens"] += len(ids)
        self.figures["bytes"] += self.waiting
        self.figures["documents"] += len(self.texts) - (not self.begins)
        self.texts, self.digests, self.begins, self.waiting = [], [], True, 0

    def close(self) -> dict:
        self.flush()
        self.file.close()
        if self.encoder.job.dedup:
            records = np.concatenate(self.recorded) if self.recorded else np.empty(0, RECORD)
            records.tofile(self.records)
        self.new.replace(self.path)
        return self.figures | {"crc32": self.checksum}


class Merger:
    """Puts the units' tokens together in `directory`, in their order, while others are still encoded.

    Where copies are to be left out all units have to be there before.
    """

    def __init__(self, job: Job, n_units: int, directory: Path, dtype: np.dtype, shard_tokens: int):
        self.job, self.n_units, self.added, self.dtype = job, n_units, 0, dtype
        self.writers = {split: ShardWriter(directory, split, shard_tokens) for split in SPLITS}
        self.figures = {split: dict.fromkeys(("tokens", "bytes", "documents"), 0) for split in SPLITS}
        self.buffer = np.empty(BATCH_BYTES, dtype)
        self.removed = {split: _duplicates(job, n_units, split) if job.dedup else {} for split in SPLITS}

    def add_units(self) -> None:
        """Go on with the units that are there, up to the first that is not."""
        while self.added < self.n_units and self.job.manifest(self.added).exists():
            self._add_unit()

    def _add_unit(self) -> None:
        found = json.loads(self.job.manifest(self.added).read_text())
        for split in SPLITS:
            self._add(split, found[split])
        self.added += 1

    def _add(self, split: str, found: dict) -> None:
        removed, figures = self.removed[split].get(self.added, NOTHING), self.figures[split]
        path, checksum, first = self.job.tokens(self.added, split), 0, 0
        with open(path, "rb") as file:
            while n := file.readinto(self.buffer) // self.dtype.itemsize:
                checksum = zlib.crc32(self.buffer[:n], checksum)
                ids = removed.without(self.buffer[:n], first)
                # end of text stands between documents, not before the first one
                self.writers[split].write(ids if figures["tokens"] else ids[1:])
                figures["tokens"] += len(ids)
                first += n
        figures["bytes"] += found["bytes"] - removed.bytes
        figures["documents"] += found["documents"] - removed.documents
        if checksum != found["crc32"]:
            self.job.manifest(self.added).unlink()
            raise RunFailed(f"{path} is not as it was written; run again: this part is made anew")

    def close(self) -> dict[str, dict]:
        """Add what is left; return what meta.json says of each split."""
        for _ in tqdm(range(self.added, self.n_units), desc="merging", unit="unit", disable=None, leave=False):
            self._add_unit()
        for figures in self.figures.values():
            figures["tokens"] = max(0, figures["tokens"] - 1)
        return {split: self.figures[split] | {"files": self.writers[split].close()} for split in SPLITS}


@dataclass(frozen=True)
class Removed:
    """What is left out of a unit: bytes, documents, and where their ids begin and end."""

    bytes: int = 0
    documents: int = 0
    starts: np.ndarray | None = None
    stops: np.ndarray | None = None

    def without(self, ids: np.ndarray, first: int) -> np.ndarray:
        """`ids`, those from `first` on, without what is left out."""
        if self.starts is None:
            return ids
        borders = np.zeros(len(ids) + 1, np.int64)
        np.add.at(borders, np.clip(self.starts - first, 0, len(ids)), 1)
        np.add.at(borders, np.clip(self.stops - first, 0, len(ids)), -1)
        return ids[np.cumsum(borders)[:-1] == 0]


NOTHING = Removed()


def _duplicates(job: Job, n_units: int, split: str) -> dict[int, Removed]:
    """The documents of each unit that came before.

    Takes some 50 bytes of memory a document. Digests of 64 bits: of ten million different documents one is taken for
    a copy with a chance of one in 400,000.
    """
    records = [np.fromfile(job.records(unit, split), RECORD) for unit in range(n_units)]
    _, first = np.unique(np.concatenate([r["digest"] for r in records]), return_index=True)
    copies = np.ones(sum(map(len, records)), bool)
    copies[first] = False
    removed = {}
    for unit, (of_unit, copy) in enumerate(zip(records, np.split(copies, np.cumsum([len(r) for r in records])[:-1]))):
        if copy.any():
            stops = np.cumsum(of_unit["tokens"])[copy].astype(np.int64)
            tokens = of_unit["tokens"][copy].astype(np.int64)
            removed[unit] = Removed(int(of_unit["bytes"][copy].sum()), int(copy.sum()), stops - tokens, stops)
    return removed
