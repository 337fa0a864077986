"""The units' tokens become token files, in their order, while others are still encoded."""

import threading
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plaingpt.console import RunFailed
from plaingpt.text.job import RECORD, Job, read_json, write_json
from plaingpt.text.shards import ShardWriter
from plaingpt.tokens import SPLITS, id_dtype

BUFFER_TOKENS = 1 << 20
WAITING_TOKENS = 1 << 25  # of units that are kept in memory until their turn comes; others wait on disk
Unit = dict[str, tuple[dict, Iterable[np.ndarray]]]  # of each split the figures, and the ids in parts


class Merger:
    """Puts a job's units together in `job.merged`, and goes on where an earlier one was.

    Where copies are to be left out all units have to be there before.
    """

    def __init__(self, job: Job):
        self.job, self.dtype = job, id_dtype(job.tokenizer.vocab_size)
        self.buffer = np.empty(BUFFER_TOKENS, self.dtype)
        self.lock, self.waiting, self.waiting_tokens = threading.Lock(), {}, 0
        self.whole = True  # no unit is there in part, as after a full disk or Ctrl-C
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

    def keep(self, number: int, unit: Unit) -> bool:
        """Hold the unit until its turn comes; False where too much waits already. In any thread."""
        tokens = sum(figures["tokens"] for figures, _ in unit.values())
        with self.lock:
            if self.waiting_tokens + tokens > WAITING_TOKENS and number != self.progress["units"]:
                return False
            self.waiting[number] = unit
            self.waiting_tokens += tokens
            return True

    def add_units(self) -> None:
        """Add the units that are there, from memory or disk, up to the first that is not."""
        while self.whole and self.add_unit():
            pass

    def add_unit(self) -> bool:
        """Add the next unit if it is there; whether it was."""
        job, number = self.job, self.progress["units"]
        if unit := self.waiting.get(number):
            self._add(unit)
            with self.lock:
                del self.waiting[number]
                self.waiting_tokens -= sum(figures["tokens"] for figures, _ in unit.values())
            return True
        if (figures := read_json(job.manifest(number))) is None:
            return False
        self._add({split: (figures[split], self._read(number, split, figures[split])) for split in SPLITS})
        for path in (job.manifest(number), *(job.tokens(number, split) for split in SPLITS)):
            path.unlink()
        return True

    def _add(self, unit: Unit) -> None:
        self.whole = False
        for split, (figures, parts) in unit.items():
            total = self.progress[split]
            for ids in parts:  # end of text stands between documents, not before the first one
                self.writers[split].write(ids if total["tokens"] else ids[1:])
                total["tokens"] += len(ids)
            total["bytes"] += figures["bytes"]
            total["documents"] += figures["documents"]
            total["files"] = self.writers[split].state()
        self.progress["units"] += 1
        write_json(self.job.progress, self.progress)
        self.whole = True

    def _read(self, unit: int, split: str, figures: dict) -> Iterator[np.ndarray]:
        """The unit's ids in parts, without copies of documents; `figures` is made to tell of these."""
        path, checksum, stays = self.job.tokens(unit, split), 0, None
        if self.firsts:
            records, first = np.fromfile(self.job.records(unit, split), RECORD), self.firsts[split][unit]
            stays = np.repeat(first, records["tokens"].astype(np.int64))
            if len(stays) != figures["tokens"]:
                raise self._damaged(unit, self.job.records(unit, split))
            figures["bytes"] -= int(records["bytes"][~first].sum())
            figures["documents"] -= int((~first).sum())
        with open(path, "rb") as file:
            while n := file.readinto(self.buffer) // self.dtype.itemsize:
                ids = self.buffer[:n]
                checksum = zlib.crc32(ids, checksum)
                if stays is not None:
                    ids, stays = ids[stays[:n]], stays[n:]
                yield ids
        if checksum != figures["crc32"]:
            raise self._damaged(unit, path)

    def _damaged(self, unit: int, path: Path) -> RunFailed:
        self.job.manifest(unit).unlink()
        return RunFailed(f"{path} is not as it was written; run again: this part is made anew")

    def close(self) -> dict[str, dict]:
        """Add what is left; return what meta.json says of each split."""
        done, units, added = self.progress["units"], len(self.job.units), iter(self.add_unit, False)
        for _ in tqdm(added, "merging", units, initial=done, unit="unit", disable=None, leave=False):
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
