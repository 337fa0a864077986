"""One pass in order: batches of texts are read, encoded by a pool of threads, and written to shards in their order.

A small file records the progress: the position in the input, and the length of the output fsynced up to it. To
continue, the output is truncated to that length and reading resumes there, so interruptions do not change the result.
"""

import collections
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from tqdm import tqdm

from plaingpt.console import RunFailed, note
from plaingpt.files import json_or_empty, new_file, sha256
from plaingpt.text import streams
from plaingpt.text.bulk import BulkEncoder
from plaingpt.text.config import PrepareConfig
from plaingpt.text.readers import SEPARATOR, File, HubShard, Text, text_size
from plaingpt.text.streams import character_boundary, note_once
from plaingpt.tokenizer import Tokenizer
from plaingpt.tokens import SPLITS, id_dtype

SAVE_TOKENS = 1 << 25  # ids between two saves of the progress: about a second's work of gigatoken


@dataclass
class Batch:
    """Texts that are encoded together."""

    position: tuple[int, int] = (0, 0)  # (input, texts of it that have been read) after the batch
    done: int = 0  # bytes of the input that have been read
    size: int = 0
    splits: dict[str, list[bytes]] = field(default_factory=lambda: collections.defaultdict(list))
    continued: set[str] = field(default_factory=set)  # splits whose first text continues a document of the batch before

    def add(self, text: Text, train_end: int) -> None:
        """Add a document, or a piece of one. The first `train_end` bytes of the document are for training, the rest for
        validation."""
        cut = character_boundary(text.data, min(max(train_end - text.start, 0), len(text.data)))
        # The data of each split, and whether its part of the document began in an earlier piece
        pieces = {"train": (text.data[:cut], text.start > 0), "val": (text.data[cut:], text.start > train_end)}
        for split, (data, continues) in pieces.items():
            if data:
                self.splits[split].append(data)
                if continues:
                    self.continued.add(split)
        self.size += len(text.data)


@dataclass
class Part:
    """The inputs that one process encodes, and its progress. Other processes encode other parts.

    Shard i begins with id i * shard_tokens of its split: the number of ids written says where the next one goes.
    """

    shards: Path  # their directory
    progress: Path
    number: int  # from 1
    inputs: list[File | HubShard]
    config: PrepareConfig
    tokenizer: Tokenizer
    by_content: bool  # a document goes to a split by its hash; False: the tail of each goes to validation

    def __post_init__(self):
        found = json_or_empty(self.progress)
        # `position` does not count skipped texts. So progress is continued only with the same --bad_files, or if it was
        # made with "stop", which skips none.
        if not (found.get("finished") or found.get("bad_files", "none") in ("stop", self.config.bad_files)):
            none = {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}
            found = {"position": (0, 0), "splits": none, "finished": False}
            for shard in self.shards.glob(f"part{self.number}_*.bin"):
                shard.unlink()
        self.position, self.splits, self.finished = tuple(found["position"]), found["splits"], found["finished"]
        self.dtype = id_dtype(self.tokenizer.vocab_size - 1)
        self.open_files: dict[str, IO[bytes]] = {}  # the shards that are being written
        self.unsaved = 0  # ids written since the last save

    def open_shard(self, split: str) -> IO[bytes]:
        """The shard of the next id, cut to the length that was saved."""
        index, filled = divmod(self.splits[split]["tokens"], self.config.shard_tokens)
        shard = open(self.shards / f"part{self.number}_{split}_{index:06}.bin", "ab")  # noqa: SIM115
        if shard.tell() < filled * self.dtype.itemsize:
            self.progress.unlink()
            raise RunFailed(f"{shard.name} was truncated; run the command again: this part starts over")
        shard.truncate(filled * self.dtype.itemsize)
        return shard

    def close_shard(self, split: str) -> None:
        with self.open_files.pop(split) as shard:
            shard.flush()
            os.fsync(shard.fileno())

    def write(self, batch: Batch, encoded: dict[str, np.ndarray]) -> None:
        for split, ids in encoded.items():
            figures, texts = self.splits[split], batch.splits[split]
            if self.number == 1 and not figures["tokens"]:
                ids = ids[1:]  # end of text stands between documents, not before the first one
            figures["bytes"] += sum(map(len, texts))
            figures["documents"] += len(texts) - (split in batch.continued)
            self.unsaved += len(ids)
            while len(ids):
                if split not in self.open_files:
                    self.open_files[split] = self.open_shard(split)
                room = self.config.shard_tokens - figures["tokens"] % self.config.shard_tokens
                fitting, ids = ids[:room], ids[room:]
                self.open_files[split].write(fitting)
                figures["tokens"] += len(fitting)
                if len(fitting) == room:
                    self.close_shard(split)
        self.position = batch.position
        if self.unsaved >= SAVE_TOKENS:
            self.save()

    def save(self) -> None:
        for split in list(self.open_files):
            self.close_shard(split)
        with new_file(self.progress) as file:
            found = {"position": self.position, "splits": self.splits, "finished": self.finished}
            json.dump(found | {"bad_files": self.config.bad_files}, file)
        self.unsaved = 0

    def seal(self, threads: int) -> None:
        """Close the shards and compute their checksums. `job.finish` saves this while it holds the plan's lock, so
        exactly one process finds that all parts are finished."""
        self.save()
        with ThreadPoolExecutor(threads) as pool:
            for split in SPLITS:
                paths = sorted(self.shards.glob(f"part{self.number}_{split}_*.bin"))
                self.splits[split]["files"] = [
                    {"name": path.name, "tokens": path.stat().st_size // self.dtype.itemsize, "sha256": digest}
                    for path, digest in zip(paths, pool.map(sha256, paths))
                ]
        self.finished = True


def encode_part(part: Part, threads: int) -> None:
    """Read, encode and write all inputs of a part, from where an earlier process stopped."""
    if part.position > (0, 0):
        note(f"continuing after {sum(part.splits[split]['tokens'] for split in SPLITS):,} tokens")
    for split in SPLITS:  # truncate the last shard to what was saved, even if nothing is added to it
        if part.splits[split]["tokens"] % part.config.shard_tokens:
            part.open_files[split] = part.open_shard(split)
    in_shards = part.inputs and isinstance(part.inputs[0], HubShard)
    unit = {"unit": "shard"} if in_shards else {"unit": "B", "unit_scale": True}
    bytes_before = list(itertools.accumulate((text_input.size for text_input in part.inputs), initial=0))
    begun = bytes_before[part.position[0]]
    bar = tqdm(total=bytes_before[-1], initial=begun, desc="encoding", disable=None, **unit)  # None: on a terminal
    with bar, contextlib.closing(encoded_batches(part, threads)) as encoded:
        for batch, ids in encoded:
            part.write(batch, ids.result())
            bar.update(bytes_before[batch.position[0]] + batch.done - bar.n)
        bar.update(bar.total - bar.n)
    part.seal(threads)


def encoded_batches(part: Part, threads: int) -> Iterator[tuple[Batch, Future[dict[str, np.ndarray]]]]:
    """Batches in order, each with its ids, while a bounded amount of text after it is encoded."""
    encoder, encoding = BulkEncoder(part.tokenizer), collections.deque()
    pool = ThreadPoolExecutor(threads)  # gigatoken releases the GIL
    try:
        for batch in batches(part):
            encoding.append((batch, pool.submit(encode, batch, part, encoder)))
            while sum(batch.size for batch, _ in encoding) > 16 * threads * streams.PIECE:
                yield encoding.popleft()
        while encoding:
            yield encoding.popleft()
    finally:  # also after a failure or Ctrl-C
        pool.shutdown(cancel_futures=True)


def encode(batch: Batch, part: Part, encoder: BulkEncoder) -> dict[str, np.ndarray]:
    """The ids of each split that gets something, with end of text before each document."""
    encoded = {}
    for split, texts in batch.splits.items():
        if any(b"|" in text and SEPARATOR in text for text in texts):  # one byte is faster to search for
            note_once("<|endoftext|> in the text is encoded as ordinary text; --split_documents splits files at it")
        first = 1 if split in batch.continued else 0  # no end of text before a piece that continues a document
        encoded[split] = encoder.encode(texts)[first:].astype(part.dtype)
    return encoded


def batches(part: Part) -> Iterator[Batch]:
    """Batches of the texts after `part.position`."""
    resumed_at, batch = part.position, Batch()  # part.position moves as batches are written
    for position, text, train_end in divided_texts(part):
        if position > resumed_at:
            # A piece that continues a document begins a batch: only there can a document be `continued`.
            if batch.size and (text.start > 0 or batch.size >= streams.PIECE):
                yield batch
                batch = Batch()
            batch.add(text, train_end)
            batch.position, batch.done = position, text.done
    if batch.size:
        yield batch


def divided_texts(part: Part) -> Iterator[tuple[tuple[int, int], Text, int]]:
    """Each text with the position after it, and how many bytes of its document belong to training.

    Inputs before `part.position` are left out; with dedup, they are read again for the hashes of their documents.
    """
    seen = set()  # 64-bit hashes: with ten million documents, the chance that any is wrongly dropped is 1 in 400,000
    first = 0 if part.config.dedup else part.position[0]
    for i, text_input in enumerate(part.inputs[first:], first):
        for n, text in enumerate(text_input.texts(part.config), 1):
            if text.start == 0:
                digest = xxhash.xxh3_64_intdigest(text.data)
                if part.config.dedup and text.ends:
                    if digest in seen:
                        continue
                    seen.add(digest)
                train_end = training_bytes(part, text_input, text, digest)  # also for the document's later pieces
            yield (i, n), text, train_end


def training_bytes(part: Part, text_input: File | HubShard, text: Text, digest: int) -> int:
    """How many bytes of the document that begins with `text` are for training. The rest is for validation."""
    if part.by_content:  # the hash decides, so order and growth of the source change nothing
        return 0 if digest < part.config.val_fraction * 2**64 else sys.maxsize
    # A large file is read twice: where its tail begins follows from its size in UTF-8.
    if text.ends:
        size = len(text.data)
    elif part.config.bad_files == "stop":  # all of it is valid, or encoding it will fail
        size = text_size(text_input, part.config)
    else:
        size = sum(len(piece.data) for piece in text_input.texts(part.config))
    return int(size * (1 - part.config.val_fraction))
