"""Documents from text files of any size, in bounded memory.

An item is one file, a group of small text files, or one shard of a data set. Its batches come in order and are cheap
to read; `Batch.documents()` does the rest of the work, in any thread.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from plaingpt.console import RunFailed, UserError
from plaingpt.text.streams import (
    MAX_RECORD,
    PIECE,
    ReadOptions,
    Recoded,
    checked_text,
    decoded_text,
    last_border,
    note_once,
    open_utf8,
    split_of,
    too_long,
)
from plaingpt.tokenizer import END_OF_TEXT

LARGE = 1 << 24  # bytes: a larger text file is read, split and encoded in pieces
SEPARATOR = END_OF_TEXT.encode()


class File(NamedTuple):
    path: str
    size: int
    modified: int  # nanoseconds

    @classmethod
    def at(cls, path: str) -> "File":
        status = os.stat(path)
        return cls(path, status.st_size, status.st_mtime_ns)

    def check(self) -> None:
        if File.at(self.path) != self:
            raise RunFailed(f"{self.path} was changed while it was read; run again: it is read anew")


class Documents(NamedTuple):
    texts: list[bytes]
    split: str | None = None  # where it is decided already
    begins: bool = True  # False: the one text continues the document before


class Batch(NamedTuple):
    done: int  # bytes of the item read so far, for the progress bar
    documents: Callable[[], Documents]


@dataclass(frozen=True)
class TextFiles:
    """Small text files, one document each, together one batch."""

    files: tuple[File, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        yield Batch(self.size, functools.partial(self._read, options))

    def _read(self, options: ReadOptions) -> Documents:
        texts = []
        for file in self.files:
            with open(file.path, "rb") as opened:
                text = decoded_text(opened.read(), file.path, options) or b""
            texts += _documents_in(text) if options.split_documents else [text]
            file.check()
        return documents_of(texts)


@dataclass(frozen=True)
class OneFile:
    """What the other items that are files have in common."""

    file: File

    @property
    def size(self) -> int:
        return self.file.size


class LargeText(OneFile):
    """A text file of more than LARGE bytes, one document, in pieces that end at safe borders.

    It goes to one split by the hash of its bytes, or its tail goes to validation.
    """

    def digest(self) -> int:
        import xxhash

        with open(self.file.path, "rb") as opened:
            return hashlib.file_digest(opened, xxhash.xxh3_64).intdigest()

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        if options.bad_files == "skip" and not self._is_text(options):
            return
        if options.by_content:
            spans = [(split_of(self.digest(), options.val_fraction), math.inf)]
        else:
            spans = [("train", int(self._utf8_size(options) * (1 - options.val_fraction))), ("val", math.inf)]
        yield from self._pieces(spans, options)

    def _pieces(self, spans: list[tuple[str, float]], options: ReadOptions) -> Iterator[Batch]:
        carry, position = b"", 0  # position: bytes of the text in the pieces before
        with open_utf8(self.file.path, options) as (raw, stream):
            for split, stop in spans:
                documents = Documents([], split)
                while block := stream.read(min(PIECE, max(0, stop - position - len(carry)))):
                    carry += block
                    if cut := last_border(carry):
                        piece, carry = carry[:cut], carry[cut:]
                        yield Batch(raw.tell(), functools.partial(self._check, piece, position, documents, options))
                        documents, position = Documents([], split, begins=False), position + cut
            if carry:
                yield Batch(self.size, functools.partial(self._check, carry, position, documents, options))

    def _check(self, text: bytes, position: int, documents: Documents, options: ReadOptions) -> Documents:
        bad_files = "stop" if options.bad_files == "skip" else options.bad_files  # the file has passed `_is_text`
        text = checked_text(text, self.file.path, bad_files, binary=True, position=position)
        return documents._replace(texts=[text])

    def _is_text(self, options: ReadOptions) -> bool:
        """Whether all of it can be read; a note if not. A piece that is written cannot be left out any more."""
        try:
            for batch in self._pieces([("train", math.inf)], options):
                batch.documents()
        except UserError as error:
            note_once(f"skipped: {str(error).partition('; leave it out')[0]}")
            return False
        return True

    def _utf8_size(self, options: ReadOptions) -> int:
        with open_utf8(self.file.path, options) as (_, stream):
            plain = not isinstance(stream, Recoded)
            return self.size if plain else sum(map(len, iter(lambda: stream.read(PIECE), b"")))


class SplitText(OneFile):
    """A large text file of documents with <|endoftext|> between them."""

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        carry, position = b"", 0
        with open_utf8(self.file.path, options) as (raw, stream):
            while block := stream.read(PIECE):
                carry += block
                if (cut := carry.rfind(SEPARATOR)) >= 0:
                    cut += len(SEPARATOR)
                    yield Batch(raw.tell(), functools.partial(self._read, carry[:cut], position, options))
                    carry, position = carry[cut:], position + cut
                elif len(carry) > MAX_RECORD:
                    raise too_long(f"{self.file.path}, the document at byte {position:,}")
            yield Batch(self.size, functools.partial(self._read, carry, position, options))

    def _read(self, data: bytes, position: int, options: ReadOptions) -> Documents:
        text = checked_text(data, self.file.path, options.bad_files, binary=True, position=position)
        return documents_of(_documents_in(text or b""))


def documents_of(texts: Iterable[bytes | None]) -> Documents:
    return Documents([text for text in texts if text])


def _documents_in(text: bytes) -> list[bytes]:
    return [part.strip(b"\r\n") for part in text.split(SEPARATOR)]
