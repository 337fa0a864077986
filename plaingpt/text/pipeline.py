"""One pass in order: batches of texts are read, encoded by a pool of threads, and written to shards in their order.

A small file records the progress: the position in the input, and the length of the output fsynced up to it. To
continue, the output is truncated to that length and reading resumes there, so interruptions do not change the result.
"""

import collections
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from tqdm import tqdm

from plaingpt.console import RunFailed, note
from plaingpt.files import fsync, json_or_empty, new_file, sha256
from plaingpt.text import streams
from plaingpt.text.bulk import BulkEncoder
from plaingpt.text.config import PrepareConfig
from plaingpt.text.readers import SEPARATOR, File, Shard
from plaingpt.text.streams import character_boundary, note_once, split_of
from plaingpt.tokenizer import Tokenizer
from plaingpt.tokens import SPLITS, id_dtype

SAVE_TOKENS = 1 << 25  # ids between two saves of the progress: about a second's work of gigatoken


@dataclass
class Batch:
    """Texts that are encoded together."""

    position: tuple[int, int] = (0, 0)  # (input, texts of it that have been read) after the batch
    done: int = 0  # bytes of all inputs that have been read
    size: int = 0
    splits: dict[str, list[bytes]] = field(default_factory=lambda: collections.defaultdict(list))
    continued: set[str] = field(default_factory=set)  # splits whose first text continues a document of the batch before


@dataclass
class Part:
    """What one process has to do, and how far it has come. Other processes do other parts.

    Shard i begins with id i * shard_tokens of its split: the number of ids written says where the next one goes.
    """

    shards: Path  # their directory
    progress: Path
    number: int  # from 1
    inputs: list[File | Shard]
    config: PrepareConfig
    tokenizer: Tokenizer
    by_content: bool  # a document goes to a split by its hash; False: the tail of each goes to validation

    def __post_init__(self):
        found = json_or_empty(self.progress)
        if found.get("bad_files") not in ("stop", self.config.bad_files):
            found = {}  # a text may have had another number
            for shard in self.shards.glob(f"part{self.number}_*.bin"):
                shard.unlink()
        self.dtype, self.open_files, self.unsaved = id_dtype(self.tokenizer.vocab_size - 1), {}, 0
        self.finished = found.get("finished", False)
        self.position = tuple(found.get("position", (0, 0)))
        self.splits = found.get("splits") or {split: {"tokens": 0, "bytes": 0, "documents": 0} for split in SPLITS}

    def open_shard(self, split: str) -> IO[bytes]:
        """The shard of the next id, cut to the length that was saved."""
        index, filled = divmod(self.splits[split]["tokens"], self.config.shard_tokens)
        shard = open(self.shards / f"part{self.number}_{split}_{index:06}.bin", "ab")  # noqa: SIM115
        if shard.tell() < filled * self.dtype.itemsize:
            self.progress.unlink()
            raise RunFailed(f"{shard.name} was cut; run again: this part starts over")
        shard.truncate(filled * self.dtype.itemsize)
        return shard

    def write(self, batch: Batch, encoded: dict[str, np.ndarray]) -> None:
        for split, ids in encoded.items():
            figures, texts = self.splits[split], batch.splits[split]
            if self.number == 1 and not figures["tokens"]:
                ids = ids[1:]  # end of text stands between documents, not before the first one
            figures["bytes"] += sum(map(len, texts))
            figures["documents"] += len(texts) - (split in batch.continued)
            self.unsaved += len(ids)
            while len(ids):
                room = self.config.shard_tokens - figures["tokens"] % self.config.shard_tokens
                fitting, ids = ids[:room], ids[room:]
                self.open_files[split].write(fitting)
                figures["tokens"] += len(fitting)
                if len(fitting) == room:
                    self.open_files[split].close()
                    fsync(Path(self.open_files[split].name))
                    self.open_files[split] = self.open_shard(split)
        self.position = batch.position
        if self.unsaved >= SAVE_TOKENS:
            self.save()

    def save(self) -> None:
        for shard in self.open_files.values():
            shard.flush()
            os.fsync(shard.fileno())
        with new_file(self.progress) as file:
            found = {"position": self.position, "splits": self.splits, "finished": self.finished}
            json.dump(found | {"bad_files": self.config.bad_files}, file)
        self.unsaved = 0

    def seal(self) -> None:
        """Close the shards and compute their checksums; the next `save` says that the part is finished."""
        self.save()
        for split, shard in self.open_files.items():
            shard.close()
            self.splits[split]["files"] = [
                {"name": path.name, "tokens": path.stat().st_size // self.dtype.itemsize, "sha256": sha256(path)}
                for path in sorted(self.shards.glob(f"part{self.number}_{split}_*.bin"))
            ]
        self.open_files, self.finished = {}, True


def encode_part(part: Part, threads: int) -> None:
    """Read, encode and write all inputs of a part, from where an earlier process stopped."""
    part.open_files = {split: part.open_shard(split) for split in SPLITS}
    encoder = BulkEncoder(part.tokenizer)
    if part.position > (0, 0):
        note(f"continuing after {sum(part.splits[split]['tokens'] for split in SPLITS):,} tokens")
    encoding = collections.deque()  # batches and their ids, in order
    unit = {"unit": "shard"} if part.inputs and isinstance(part.inputs[0], Shard) else {"unit": "B", "unit_scale": True}
    total = sum(found.size for found in part.inputs)
    bar = tqdm(total=total, desc="encoding", disable=None, **unit)  # None: only on a terminal

    def write_oldest() -> None:
        batch, ids = encoding.popleft()
        part.write(batch, ids.result())
        bar.update(batch.done - bar.n)

    with bar, ThreadPoolExecutor(threads) as pool:  # gigatoken releases the GIL
        try:
            for batch in batches(part):
                encoding.append((batch, pool.submit(encode, batch, part, encoder)))
                while sum(batch.size for batch, _ in encoding) > 16 * threads * streams.PIECE:
                    write_oldest()
            while encoding:
                write_oldest()
        finally:  # also after a failure or Ctrl-C
            pool.shutdown(cancel_futures=True)
    part.seal()


def batches(part: Part) -> Iterator[Batch]:
    """Batches of the texts after `part.position`. With dedup, earlier texts are read again for their hashes."""
    resumed_at, bytes_before, batch = part.position, 0, Batch()  # part.position moves as batches are written
    seen = set()  # 64-bit hashes: with ten million documents, the chance that any is wrongly dropped is 1 in 400,000
    for i, source in enumerate(part.inputs):
        texts = source.texts(part.config) if part.config.dedup or i >= resumed_at[0] else ()
        for n, text in enumerate(texts, 1):
            if text.begins:
                digest, splits_so_far = xxhash.xxh3_64_intdigest(text.data), set()  # splits that have a piece of it
                # A large file is read twice: where its tail begins follows from its size in UTF-8.
                document = [text] if text.ends or part.by_content else source.texts(part.config)
                size = sum(len(piece.data) for piece in document)
                train_bytes_left = int(size * (1 - part.config.val_fraction))
                if part.config.dedup and text.ends:
                    if digest in seen:
                        continue
                    seen.add(digest)
            if part.by_content:
                by_split = {split_of(digest, part.config.val_fraction): text.data}
            else:
                by_split = divided(text.data, train_bytes_left)
                train_bytes_left -= len(text.data)
            if (i, n) > resumed_at:
                if batch.size and (not text.begins or batch.size >= streams.PIECE):
                    yield batch
                    batch = Batch()
                batch.continued |= by_split.keys() & splits_so_far
                batch.position, batch.done, batch.size = (i, n), bytes_before + text.done, batch.size + len(text.data)
                for name, data in by_split.items():
                    batch.splits[name].append(data)
            splits_so_far |= by_split.keys()
        bytes_before += source.size
    if batch.size:
        yield batch


def divided(text: bytes, boundary: int) -> dict[str, bytes]:
    """A document, or a piece of it, whose tail goes to validation. boundary: may lie before or after the piece."""
    boundary = character_boundary(text, min(max(boundary, 0), len(text)))
    parts = {"train": text[:boundary], "val": text[boundary:]}
    return {split: data for split, data in parts.items() if data}


def encode(batch: Batch, part: Part, encoder: BulkEncoder) -> dict[str, np.ndarray]:
    """The ids of each split that gets something, with end of text before each document."""
    encoded = {}
    for split, texts in batch.splits.items():
        if any(b"|" in text and SEPARATOR in text for text in texts):
            message = "<|endoftext|> occurs in the text and is encoded as ordinary text"
            note_once(f"{message}; --split_documents splits text files at it", message)
        encoded[split] = encoder.encode(texts)[int(split in batch.continued) :].astype(part.dtype)
    return encoded
