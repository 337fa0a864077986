"""From items of text to token files: units of work are encoded by threads, and merged in their order.

Under data/<name>.partial/ every unit leaves its tokens and, last, a small manifest. Whoever goes on later, or works
beside, does the units that have none; merged/ takes them in, and what it has is removed. So a stop at any moment loses
a few seconds of work, and how many processes or machines took part changes nothing in the result.
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
UNIT_FORMAT = 2  # of what is left under .partial: what another version of this file left there begins anew
BATCH_BYTES = 1 << 20  # of text encoded at a time
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
        return json.loads(path.read_bytes())
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


def encode_units(job: Job, mine: Sequence[int], threads: int, merger: "Merger | None" = None) -> None:
    """Encode those of the units `mine` that are not done yet; `merger` puts them together meanwhile."""
    todo = sorted(set(mine).intersection(job.left()))
    if len(todo) < len(mine):
        note(f"going on after {len(mine) - len(todo):,} of {len(mine):,} units of work")
    sizes = {unit: sum(map(size_of, job.units[unit])) for unit in mine}
    options = {"unit": "B", "unit_scale": True}
    if not all(sizes.values()):  # of a data set that is streamed the size is not known: then the bar counts shards
        sizes, options = dict.fromkeys(mine, 1), {"unit": "shard"}
    bar = tqdm(
        total=sum(sizes.values()),
        initial=sum(sizes.values()) - sum(sizes[unit] for unit in todo),
        desc="encoding",
        disable=True if os.environ.get("RANK", "0") != "0" else None,
        **options,
    )
    with bar, contextlib.closing(_in_threads(Encoder(job), todo, threads)) as encoded:
        for unit in encoded:
            bar.update(sizes[unit])
            while merger and merger.add_unit():
                pass


def _in_threads(encoder: "Encoder", todo: list[int], threads: int) -> Iterator[int]:
    """Encode the units `todo` and give each one's number when it is done.

    Reading Parquet, encoding, hashing and writing leave Python's lock to others: threads are enough.
    """
    pool = concurrent.futures.ThreadPoolExecutor(min(threads, len(todo)) or 1)
    try:
        for future in concurrent.futures.as_completed([pool.submit(encoder.encode, unit) for unit in todo]):
            yield future.result()
    finally:
        encoder.stop.set()  # after a failure or Ctrl-C the others leave what they are at
        pool.shutdown(cancel_futures=True)


class Encoder:
    """Encodes units, in any number of threads, until `stop` is set."""

    def __init__(self, job: Job):
        self.job, self.stop = job, threading.Event()
        self.bulk = BulkEncoder(job.tokenizer)

    def encode(self, unit: int) -> int:
        """Write the unit's files, the manifest last; return `unit`."""
        job = self.job
        with contextlib.ExitStack() as stack:
            writers = {split: stack.enter_context(UnitWriter(job, self.bulk, unit, split)) for split in SPLITS}
            for item in job.units[unit]:
                for document in item.documents(job.column, job.bad_files):
                    if self.stop.is_set():
                        return unit
                    for split, text, digest in self.split(document):
                        writers[split].add(text, digest, document.begins)
            figures = {split: writer.close() for split, writer in writers.items()}
        write_json(job.manifest(unit), figures)
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

    def __init__(self, job: Job, bulk: BulkEncoder, unit: int, split: str):
        self.bulk, self.end_of_text, self.dtype = bulk, job.tokenizer.end_of_text, id_dtype(job.tokenizer.vocab_size)
        self.path = job.tokens(unit, split)
        self.records_path = job.records(unit, split) if job.dedup else None
        self.new = self.path.with_suffix(f".{os.getpid()}")
        self.file = open(self.new, "wb")  # noqa: SIM115 (closed on leaving)
        self.figures = {"tokens": 0, "bytes": 0, "documents": 0, "crc32": 0}
        self.records = [np.empty(0, RECORD)]
        self.texts, self.digests, self.waiting, self.begins = [], [], 0, True

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
        self.digests.append(digest[:8])
        self.waiting += len(text)

    def flush(self) -> None:
        """Encode what waits: documents of which only the first may go on with the one before."""
        if not self.texts:
            return
        ids = self.bulk.encode(self.texts).astype(self.dtype)
        if self.records_path:
            records = np.empty(len(self.texts), RECORD)
            records["digest"] = np.frombuffer(b"".join(self.digests), "<u8")
            records["tokens"] = np.diff(np.flatnonzero(ids == self.end_of_text), append=len(ids))
            records["tokens"][0] -= not self.begins
            records["bytes"] = [len(text) for text in self.texts]
            self.records.append(records)
        ids = ids[not self.begins :]
        self.file.write(ids)
        self.figures["crc32"] = zlib.crc32(ids, self.figures["crc32"])
        self.figures["tokens"] += len(ids)
        self.figures["bytes"] += self.waiting
        self.figures["documents"] += len(self.texts) - (not self.begins)
        self.texts, self.digests, self.waiting, self.begins = [], [], 0, True

    def close(self) -> dict:
        self.flush()
        self.file.close()
        if self.records_path:
            np.concatenate(self.records).tofile(self.records_path)
        self.new.replace(self.path)
        return self.figures


class Merger:
    """Puts the units' tokens together, in their order, while others are still encoded, and removes what it has.

    Where copies are to be left out all units have to be there before.
    """

    def __init__(self, job: Job):
        self.job, self.dtype = job, id_dtype(job.tokenizer.vocab_size)
        self.buffer = np.empty(BATCH_BYTES, self.dtype)
        self.firsts = {split: _firsts(job, split) for split in SPLITS} if job.dedup else None
        nothing = {split: {"tokens": 0, "bytes": 0, "documents": 0, "files": []} for split in SPLITS}
        self.progress = read_json(job.progress) or nothing | {"units": 0}
        job.merged.mkdir(exist_ok=True)
        try:
            self.writers = {
                split: ShardWriter(job.merged, split, self.dtype, job.shard_tokens, self.progress[split]["files"])
                for split in SPLITS
            }
        except ValueError as error:  # a loss of power, say
            job.progress.unlink()
            raise RunFailed(f"{error}; run again: it is made anew") from error

    def add_unit(self) -> bool:
        """Add the next unit, if it is there; whether it was."""
        job, unit = self.job, self.progress["units"]
        if (manifest := read_json(job.manifest(unit))) is None:
            return False
        for split in SPLITS:
            self._add(split, unit, manifest[split])
            self.progress[split]["files"] = self.writers[split].state()
        self.progress["units"] += 1
        write_json(job.progress, self.progress)
        for path in (job.manifest(unit), *(job.tokens(unit, split) for split in SPLITS)):
            path.unlink()
        return True

    def _add(self, split: str, unit: int, found: dict) -> None:
        path, figures, checksum, stays = self.job.tokens(unit, split), self.progress[split], 0, None
        if self.firsts:
            records, first = np.fromfile(self.job.records(unit, split), RECORD), self.firsts[split][unit]
            stays = np.repeat(first, records["tokens"].astype(np.int64))
            figures["bytes"] -= int(records["bytes"][~first].sum())
            figures["documents"] -= int((~first).sum())
        figures["bytes"] += found["bytes"]
        figures["documents"] += found["documents"]
        with open(path, "rb") as file:
            while n := file.readinto(self.buffer) // self.dtype.itemsize:
                ids = self.buffer[:n]
                checksum = zlib.crc32(ids, checksum)
                if stays is not None:
                    ids, stays = ids[stays[:n]], stays[n:]
                # end of text stands between documents, not before the first one
                self.writers[split].write(ids if figures["tokens"] else ids[1:])
                figures["tokens"] += len(ids)
        if checksum != found["crc32"]:
            self.job.manifest(unit).unlink()
            raise RunFailed(f"{path} is not as it was written; run again: this part is made anew")

    def close(self) -> dict[str, dict]:
        """Add what is left; return what meta.json says of each split."""
        done, units = self.progress["units"], len(self.job.units)
        for _ in tqdm(
            iter(self.add_unit, False), "merging", units, initial=done, unit="unit", disable=None, leave=False
        ):
            pass
        assert self.progress["units"] == units, "whoever merges has seen all manifests"
        for split, writer in self.writers.items():
            self.progress[split]["tokens"] -= self.progress[split]["tokens"] > 0
            self.progress[split]["files"] = writer.close()
        return {split: self.progress[split] for split in SPLITS}


def _firsts(job: Job, split: str) -> list[np.ndarray]:
    """Of each unit which documents are no copies of one that came before.

    Takes some 50 bytes of memory a document. Digests of 64 bits: of ten million different documents one is taken for
    a copy with a chance of one in 400,000.
    """
    digests = [np.fromfile(job.records(unit, split), RECORD)["digest"] for unit in range(len(job.units))]
    _, first = np.unique(np.concatenate(digests), return_index=True)
    stays = np.zeros(sum(map(len, digests)), bool)
    stays[first] = True
    return np.split(stays, np.cumsum([len(d) for d in digests])[:-1])
