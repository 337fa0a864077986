"""Documents from files and Hugging Face data sets, in items of bounded size that can be read apart from one another.

A document is UTF-8 text. A text file is one document; a JSON Lines or Parquet file has one a line or row. The items
depend on the source alone, so that any number of processes can share them.
"""

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from plaingpt.console import RunFailed, UserError, closest, note, one_line
from plaingpt.text import arrow

LARGE = 1 << 24  # bytes: a text file above it is read, split and encoded in parts
PIECE = 1 << 20  # bytes of a large file that are held at a time
WINDOW = 1 << 20  # bytes in which a safe border is looked for
LARGE_TEXT = 1 << 18  # bytes from which on another check of UTF-8 is the faster one
# Across these GPT-2's pattern never has a token, nor has any tokenizer here: before a space between two characters that
# are none, and after a line's end between such. Python's white space includes that of the tokenizers; the surrogates
# stand for bytes of a character that the window cuts.
_INK = r"[^\s\udc80-\udcff]"
SAFE_BORDER = re.compile(f"(?<={_INK})(?= {_INK})|(?<={_INK}\n)(?={_INK})")
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSED = (".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst")
WHOLE = 1 << 62  # the end of a file that cannot be entered in the middle


class Documents(NamedTuple):
    """Some at a time, which costs less than one by one where they are small."""

    texts: list[bytes]
    split: str | None = None  # where that is settled already
    begins: bool = True  # no: the one text goes on with the document before, and no end of text comes between


class File(NamedTuple):
    path: str
    size: int
    modified: int  # in nanoseconds; with the size it tells another state of the file

    @classmethod
    def at(cls, path: str) -> "File":
        status = os.stat(path)
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class TextFile:
    """A text file of at most LARGE bytes: one document."""

    file: File

    def documents(self, column: str, bad_files: str) -> Iterator[Documents]:
        with open(self.file.path, "rb") as opened:
            data = opened.read()
        if text := checked_text(data.removeprefix(codecs.BOM_UTF8), self.file.path, bad_files, binary=True):
            yield Documents([text])


@dataclass(frozen=True)
class TextPart:
    """A part of a large text file: its bytes from the safe border at or after `start` to that at or after `stop`."""

    file: File
    start: int
    stop: int
    split: str
    first: bool  # of the file's parts in this split

    def documents(self, column: str, bad_files: str) -> Iterator[Documents]:
        if bad_files == "skip":
            bad_files = "stop"  # it was text when the parts were made
        if self.first:  # which may have no safe border
            yield Documents([b""], self.split)
        with open(self.file.path, "rb") as opened:
            position, stop = (safe_border(opened, place, self.file.size) for place in (self.start, self.stop))
            while position < stop:
                border = min(stop, safe_border(opened, position + PIECE, self.file.size))
                opened.seek(position)
                data = opened.read(border - position)
                if position == 0:
                    data = data.removeprefix(codecs.BOM_UTF8)
                text = checked_text(data, self.file.path, bad_files, binary=True, position=position)
                yield Documents([text], self.split, begins=False)
                position = border


@dataclass(frozen=True)
class Lines:
    """The lines of a JSON Lines file that begin in [start, stop)."""

    file: File
    start: int
    stop: int

    def documents(self, column: str, bad_files: str) -> Iterator[Documents]:
        with open(self.file.path, "rb") as raw, _decompressed(raw, self.file.path) as file:
            position = self.start
            if position:
                file.seek(position - 1)
                position += len(file.readline()) - 1
            try:
                while position < self.stop:  # a line is read where its last byte before the block's end is
                    block = file.read(min(PIECE, self.stop - position) - 1) + file.readline()
                    if not block:
                        break
                    if (texts := arrow.json_texts(block, column)) is None:
                        texts = self._one_by_one(block, position, column, bad_files)
                    yield Documents([text for text in texts if text])
                    position += len(block)
            except (EOFError, OSError, zlib.error) as error:  # gzip's, zstd's
                if getattr(error, "errno", None):  # the system's, and no fault of the file
                    raise
                raise UserError(f"{self.file.path} cannot be decompressed: {one_line(error)}") from error

    def _one_by_one(self, block: bytes, position: int, column: str, bad_files: str) -> Iterator[bytes | None]:
        for line in io.BytesIO(block):
            where = f"{self.file.path}, the line at byte {position:,}"
            position += len(line)
            if line.strip() and (valid := checked_text(line, where, bad_files)):
                yield _json_text(valid, where, column, bad_files)


@dataclass(frozen=True)
class Rows:
    """Row groups [start, stop) of a Parquet file, which have `size` bytes when they are decompressed."""

    file: File
    start: int
    stop: int
    size: int

    def documents(self, column: str, bad_files: str) -> Iterator[Documents]:
        with arrow.open_parquet(self.file.path) as file:
            arrow.check_column(self.file.path, file.schema_arrow, column)
            groups = range(self.start, self.stop)
            for batch in file.iter_batches(256, groups, columns=[column], use_threads=False):
                yield _documents(batch.column(0), f"{self.file.path}, rows of group {self.start}", bad_files)


@dataclass(frozen=True)
class Shard:
    """Shard `index` of a Hugging Face data set, streamed or already on disk; `name` says which data set it is."""

    name: str
    index: int
    shards: int
    dataset: Any = None  # not part of its name

    def __repr__(self) -> str:
        return f"Shard({self.name!r}, {self.index}, {self.shards})"

    def documents(self, column: str, bad_files: str) -> Iterator[Documents]:
        shard = self.dataset.shard(num_shards=self.shards, index=self.index)
        where = f"{self.name}, shard {self.index}"
        try:
            for table in shard.with_format("arrow").iter(batch_size=256):
                arrow.check_column(self.name, table.schema, column)
                yield _documents(table.column(column), where, bad_files)
        except UserError:
            raise
        except Exception as error:  # of any library below: network, server, file format
            raise RunFailed(f"{where} cannot be read: {one_line(error)}; run again to go on") from error


Item = TextFile | TextPart | Lines | Rows | Shard


def check_state(item: Item) -> None:
    """RunFailed where the file is not as it was when its items were made: they would not fit together."""
    if not isinstance(item, Shard) and File.at(item.file.path) != item.file:
        raise RunFailed(f"{item.file.path} was changed while it was read; run again: it is read anew")


def checked_text(data: bytes, where: str, bad_files: str, binary: bool = False, position: int = 0) -> bytes | None:
    """`data` if it is UTF-8 (with `binary`: without NUL), else by `bad_files`: replaced, None and a note, or UserError,
    which of "stop" names the flags of prepare_data.py and of "refuse" does not."""
    bad = data.find(b"\0") if binary else -1
    try:
        if not data.isascii() and not (len(data) > LARGE_TEXT and arrow.is_utf8(data)):
            data.decode()
    except UnicodeDecodeError as error:
        bad = error.start if bad == -1 else min(bad, error.start)
    if bad == -1:
        return data
    if bad_files == "replace":
        return data.decode(errors="replace").encode()
    problem = f"{where} is not UTF-8 text (byte 0x{data[bad]:02x} at {position + bad:,})"
    if bad_files == "skip":
        note(f"skipped: {problem}")
        return None
    remedy = "; leave it out: --bad_files=skip, or write U+FFFD for it: --bad_files=replace"
    raise UserError(problem + (remedy if bad_files == "stop" else ""))


def _json_text(line: bytes, where: str, column: str, bad_files: str) -> bytes | None:
    try:
        row = json.loads(line)
        text = row[column]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}, is not JSON: {one_line(error)}") from error
    except (KeyError, TypeError) as error:
        columns = row if isinstance(row, dict) else {}
        remedy = f"name the --column: {', '.join(columns)[:300]}" if columns else "a line has to be a JSON object"
        raise UserError(f"{where}, has no {column!r}{closest(column, columns)}; {remedy}") from error
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{where}: {column!r} is no text; name the --column")
    return checked_text(text.encode("utf-8", "surrogatepass"), where, bad_files)


def _documents(column: Any, where: str, bad_files: str) -> Documents:
    """Those of a column of Arrow."""
    texts, valid = arrow.column_texts(column)
    if not valid:
        texts = [text and checked_text(text, where, bad_files) for text in texts]
    return Documents([text for text in texts if text])


def safe_border(file: IO[bytes], position: int, size: int) -> int:
    """The first byte at or after `position` where a text may be cut without changing its tokens.

    In WINDOW bytes there may be none, as in a text without spaces: then the next character's first byte.
    """
    if position <= 0 or position >= size:
        return max(0, min(position, size))
    before = min(position, 4)
    for window_size in (1 << 10, WINDOW):  # mostly one is near
        file.seek(position - before)
        data = file.read(window_size)
        window = data.decode("utf-8", "surrogateescape")
        for border in SAFE_BORDER.finditer(window):
            offset = len(window[: border.start()].encode("utf-8", "surrogateescape"))
            if offset >= before:
                return position - before + offset
        if len(data) < window_size:
            return size  # the rest has none
    while before < len(data) and data[before] & 0xC0 == 0x80:
        before, position = before + 1, position + 1
    return position


def split_of(digest: int, val_fraction: float) -> str:
    """The split of a document, by the XXH3 (64 bits) of its text: order and growth of the source change nothing."""
    return "val" if digest < val_fraction * 2**64 else "train"


def _decompressed(file: IO[bytes], path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.open(file)
    if path.endswith(".zst"):
        return io.BufferedReader(arrow.zstd_stream(file), PIECE)
    return file


def size_of(item: Item) -> int:
    """Bytes that reading the item takes, 0 where that is not known before."""
    if isinstance(item, Shard):
        return 0
    if isinstance(item, Rows):
        return item.size
    if isinstance(item, TextPart) or (isinstance(item, Lines) and item.stop < WHOLE):
        return item.stop - item.start
    return item.file.size
