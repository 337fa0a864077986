"""From items of text to token files: threads encode the units of a job."""

import concurrent.futures
import contextlib
import os
import threading
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash
from tqdm import tqdm

from plaingpt.console import counted, note
from plaingpt.files import flush
from plaingpt.text.bulk import BulkEncoder
from plaingpt.text.job import RECORD, Job, write_json
from plaingpt.text.merger import Merger
from plaingpt.text.readers import Documents, check_state, size_of, split_of
from plaingpt.tokens import SPLITS, id_dtype

BATCH_BYTES = 1 << 20  # of text encoded at a time
HELD_TOKENS = 1 << 24  # of a unit that stay in memory until it is merged; of a larger one none do


def encode_units(job: Job, mine: Sequence[int], threads: int, merger: Merger | None = None) -> None:
    """Encode those of the units `mine` that are not done yet; `merger` puts them together meanwhile."""
    todo = sorted(set(mine).intersection(job.left()))
    if len(todo) < len(mine):
        note(f"going on after {len(mine) - len(todo):,} of {counted(len(mine), 'unit')} of work")
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
    encoder = Encoder(job, merger)
    # reading Parquet, encoding, hashing and writing leave Python's lock to others: threads are enough
    pool = concurrent.futures.ThreadPoolExecutor(min(threads, len(todo)) or 1)
    try:
        with bar:
            for ended in concurrent.futures.as_completed([pool.submit(encoder.encode, unit) for unit in todo]):
                bar.update(sizes[ended.result()])
                if merger:
                    merger.add_units()
    finally:
        encoder.stop.set()  # after a failure or Ctrl-C the others leave what they are at
        pool.shutdown(cancel_futures=True)
        if merger:
            merger.add_units()  # what is done is not done again


class Encoder:
    """Encodes units, in any number of threads, until `stop` is set."""

    def __init__(self, job: Job, merger: Merger | None):
        self.job, self.merger, self.stop = job, merger, threading.Event()
        self.bulk = BulkEncoder(job.tokenizer)

    def encode(self, unit: int) -> int:
        """Encode the unit and have it merged, or write its files, the manifest last; return `unit`."""
        job = self.job
        with contextlib.ExitStack() as stack:
            writers = {split: stack.enter_context(UnitWriter(job, self.bulk, unit, split)) for split in SPLITS}
            for item in job.units[unit]:
                for documents in item.documents(job.column, job.bad_files):
                    if self.stop.is_set():
                        return unit
                    for split, text, digest in self.shares(documents):
                        writers[split].add(text, digest, documents.begins)
                check_state(item)
            for writer in writers.values():
                writer.flush()
            if self.merger and not any(writer.file for writer in writers.values()):
                held = {split: (writer.figures, writer.held) for split, writer in writers.items()}
                if self.merger.keep(unit, held):
                    return unit
            figures = {split: writer.close() for split, writer in writers.items()}
        write_json(job.manifest(unit), figures)
        return unit

    def shares(self, documents: Documents) -> Iterator[tuple[str, bytes, int]]:
        """What of the documents goes to which split: (split, text, digest)."""
        if documents.split:
            for text in documents.texts:
                yield documents.split, text, int.from_bytes(os.urandom(8))
            return
        for text in documents.texts:
            digest = xxhash.xxh3_64_intdigest(text)
            if self.job.by_content:
                yield split_of(digest, self.job.val_fraction), text, digest
            else:
                characters = text.decode()
                border = int(len(characters) * (1 - self.job.val_fraction))
                for split, part in (("train", characters[:border]), ("val", characters[border:])):
                    if part:
                        yield split, part.encode(), digest


class UnitWriter:
    """One split of one unit: documents in, a file of ids out, end of text before each document that begins."""

    def __init__(self, job: Job, bulk: BulkEncoder, unit: int, split: str):
        self.bulk, self.end_of_text, self.dtype = bulk, job.tokenizer.end_of_text, id_dtype(job.tokenizer.vocab_size)
        self.path = job.tokens(unit, split)
        self.records_path = job.records(unit, split) if job.dedup else None
        self.new = self.path.with_suffix(f".{os.getpid()}")
        self.file, self.held = None, []
        self.figures = {"tokens": 0, "bytes": 0, "documents": 0, "crc32": 0}
        self.records = [np.empty(0, RECORD)]
        self.texts, self.digests, self.waiting, self.begins = [], [], 0, True

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, *_) -> None:
        if self.file:
            self.file.close()
            self.new.unlink(missing_ok=True)  # still there after a failure only

    def add(self, text: bytes, digest: int, begins: bool) -> None:
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
        ids = self.bulk.encode(self.texts).astype(self.dtype)
        if self.records_path:
            records = np.empty(len(self.texts), RECORD)
            records["digest"] = self.digests
            records["tokens"] = np.diff(np.flatnonzero(ids == self.end_of_text), append=len(ids))
            records["tokens"][0] -= not self.begins
            records["bytes"] = [len(text) for text in self.texts]
            self.records.append(records)
        self.held.append(ids[not self.begins :])
        self.figures["tokens"] += len(self.held[-1])
        self.figures["bytes"] += self.waiting
        self.figures["documents"] += len(self.texts) - (not self.begins)
        self.texts, self.digests, self.waiting, self.begins = [], [], 0, True
        if sum(map(len, self.held)) > HELD_TOKENS:
            self.write()

    def write(self) -> None:
        self.file = self.file or open(self.new, "wb")  # noqa: SIM115 (closed on leaving)
        for ids in self.held:
            self.file.write(ids)
            self.figures["crc32"] = zlib.crc32(ids, self.figures["crc32"])
        self.held = []

    def close(self) -> dict:
        self.write()
        self.file.close()
        if self.records_path:
            np.concatenate(self.records).tofile(self.records_path)
            flush(self.records_path)  # what stays of any unit hangs on it, and no checksum of it is kept
        self.new.replace(self.path)
        return self.figures
