"""One pass in order: a thread reads batches of documents, a pool encodes them, and shards are written in their order.

Progress is a small file: how far reading had come, and the length of what was written and fsynced by then. Whoever
goes on cuts the files to that length and reads from there, so a stop at any moment changes nothing in the result.
"""

import collections
import concurrent.futures
import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from plaingpt.console import RunFailed, is_rank_0, note
from plaingpt.files import new_file
from plaingpt.text.bulk import BulkEncoder
from plaingpt.text.readers import SEPARATOR, Batch, Documents, LargeText, OneFile
from plaingpt.text.records import Item, Shard
from plaingpt.text.shards import ShardWriter
from plaingpt.text.streams import ReadOptions, note_once, split_of
from plaingpt.tokenizer import Tokenizer
from plaingpt.tokens import SPLITS, id_dtype

SAVE_TOKENS = 1 << 25  # ids between two saves of the progress, about a second's work


@dataclass(frozen=True)
class Work:
    """What one process has to do. Other processes do other parts."""

    directory: Path  # of the shards
    progress: Path
    part: int  # from 1
    items: list[Item]
    options: ReadOptions
    tokenizer: Tokenizer
    dedup: bool
    shard_tokens: int


def encode_part(work: Work, threads: int) -> None:
    """Read, encode and write all items of `work`, from where an earlier process stopped."""
    output, encode = Output(work), Encoder(work).encode
    if output.finished:
        return
    if output.position > (0, 0):
        note(f"going on after {sum(output.splits[split]['tokens'] for split in SPLITS):,} tokens")
    starts = np.cumsum([0, *(item.size for item in work.items)]).tolist()
    encoded, room, stop = queue.SimpleQueue(), threading.Semaphore(8 * threads), threading.Event()

    def feed() -> None:
        for position, batch in read(work, output.position):
            room.acquire()
            if stop.is_set():
                return
            encoded.put((position, starts[position[0]] + batch.done, pool.submit(encode, batch)))

    with (
        progress_bar(work.items) as bar,
        concurrent.futures.ThreadPoolExecutor(1) as reader,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,  # Arrow, gigatoken and hashing release the GIL
    ):
        feeding = reader.submit(feed)
        feeding.add_done_callback(lambda _: encoded.put(None))
        try:
            while found := encoded.get():
                position, done, batch = found
                output.write(position, batch.result())
                room.release()
                bar.update(done - bar.n)
            feeding.result()  # raises what stopped the reading
        finally:  # also after a failure or Ctrl-C
            stop.set()
            room.release()
            pool.shutdown(cancel_futures=True)
    output.finish()


def progress_bar(items: list[Item]) -> tqdm:
    options = {"unit": "shard"} if items and isinstance(items[0], Shard) else {"unit": "B", "unit_scale": True}
    hidden = None if is_rank_0() else True  # None: where standard error is no terminal
    return tqdm(total=sum(item.size for item in items), desc="encoding", disable=hidden, **options)


Position = tuple[int, int]  # (item, batches of it that are done)


def read(work: Work, start: Position) -> Iterator[tuple[Position, Batch]]:
    """The batches after `start`. Those before are read, not encoded; from the beginning where copies are left out."""
    seen = set() if work.dedup else None  # 64 bits a document: of ten million one is lost with a chance of 1 in 400,000
    for i, item in enumerate(work.items):
        if seen is None and i < start[0]:
            continue
        if seen is not None and isinstance(item, LargeText):
            if (digest := item.digest()) in seen:
                continue
            seen.add(digest)
        for n, batch in enumerate(item.batches(work.options), 1):
            if seen is not None and not isinstance(item, LargeText):
                batch = _without_copies(batch, seen)
            if (i, n) > start:
                yield (i, n), batch
        if isinstance(item, OneFile):
            item.file.check()


def _without_copies(batch: Batch, seen: set[int]) -> Batch:
    texts = {}
    for text in batch.documents().texts:
        texts.setdefault(xxhash.xxh3_64_intdigest(text), text)
    new = [text for digest, text in texts.items() if digest not in seen]
    seen.update(texts)
    return batch._replace(documents=lambda: Documents(new))


class Encoder:
    """Encodes batches, in any number of threads."""

    def __init__(self, work: Work):
        self.options, self.bulk = work.options, BulkEncoder(work.tokenizer)
        self.dtype = id_dtype(work.tokenizer.vocab_size - 1)
        self.look_for_end_of_text = not work.options.split_documents

    def encode(self, batch: Batch) -> dict[str, tuple[np.ndarray, int, int]]:
        """Of each split that gets something: ids with end of text before each document, bytes, documents."""
        documents = batch.documents()
        if self.look_for_end_of_text and any(b"|" in text and SEPARATOR in text for text in documents.texts):
            note_once(
                "<|endoftext|> occurs in the text and is encoded letter by letter; if it stands between documents, "
                "give --split_documents"
            )
        encoded, begins = {}, documents.begins
        for split, texts in self._splits(documents).items():
            ids = self.bulk.encode(texts)[not begins :].astype(self.dtype)
            encoded[split] = ids, sum(map(len, texts)), len(texts) - (not begins)
        return encoded

    def _splits(self, documents: Documents) -> dict[str, list[bytes]]:
        splits = collections.defaultdict(list)
        if documents.split:
            splits[documents.split] = documents.texts
        elif self.options.by_content:
            for text in documents.texts:
                splits[split_of(xxhash.xxh3_64_intdigest(text), self.options.val_fraction)].append(text)
        else:
            for text in map(bytes.decode, documents.texts):
                border = int(len(text) * (1 - self.options.val_fraction))
                for split, tail in (("train", text[:border]), ("val", text[border:])):
                    if tail:
                        splits[split].append(tail.encode())
        return splits


class Output:
    """The shards of one part, and its progress."""

    def __init__(self, work: Work):
        self.path = work.progress
        dtype = id_dtype(work.tokenizer.vocab_size - 1)
        found = read_json(self.path) or {}
        self.finished = found.get("finished", False)
        self.position = tuple(found.get("position", (0, 0)))
        self.splits = found.get("splits") or {s: {"tokens": 0, "bytes": 0, "documents": 0, "files": []} for s in SPLITS}
        self.first = work.part == 1
        self.unsaved = 0
        if not self.finished:
            try:
                self.writers = {
                    split: ShardWriter(
                        work.directory, f"part{work.part}_{split}", dtype, work.shard_tokens, figures["files"]
                    )
                    for split, figures in self.splits.items()
                }
            except ValueError as error:
                self.path.unlink()
                raise RunFailed(f"{error}; run again: this part is made anew") from error

    def write(self, position: Position, encoded: dict[str, tuple[np.ndarray, int, int]]) -> None:
        for split, (ids, n_bytes, n_documents) in encoded.items():
            figures = self.splits[split]
            if self.first and not figures["tokens"]:
                ids = ids[1:]  # end of text stands between documents, not before the first one
            self.writers[split].write(ids)
            figures["tokens"] += len(ids)
            figures["bytes"] += n_bytes
            figures["documents"] += n_documents
            self.unsaved += len(ids)
        self.position = position
        if self.unsaved >= SAVE_TOKENS:
            self.save({split: writer.saved() for split, writer in self.writers.items()})

    def finish(self) -> None:
        self.finished = True
        self.save({split: writer.close() for split, writer in self.writers.items()})

    def save(self, files: dict[str, list[dict]]) -> None:
        for split, figures in self.splits.items():
            figures["files"] = files[split]
        write_json(self.path, {"position": self.position, "splits": self.splits, "finished": self.finished})
        self.unsaved = 0


def read_json(path: Path) -> dict | None:
    """What the file says; None if it is missing, or was left empty or cut by a loss of power."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: dict) -> None:
    with new_file(path) as file:
        json.dump(content, file)
