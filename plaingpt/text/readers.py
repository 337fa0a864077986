"""Texts from files and Hugging Face data sets, one after another, in bounded memory.

Text files are read in pieces of up to 1 MB, cut where GPT-2's tokenizer and ours begin a token or, if there is no such
place, between two characters. JSON, CSV, TSV and Parquet have one document per row. pyarrow takes a third of a second
to import, so only the functions that need it import it.
"""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from plaingpt.console import RunFailed, UserError, counted, errors_of_library, one_line
from plaingpt.text import streams
from plaingpt.text.config import PrepareConfig
from plaingpt.text.streams import checked, last_boundary, open_utf8, too_long, with_unix_lines
from plaingpt.tokenizer import END_OF_TEXT

SEPARATOR = END_OF_TEXT.encode()
ROWS = 64  # of a Parquet file that are decoded at a time


class NotDocuments(UserError):
    """A JSON or CSV file that may be settings or a table of numbers: in a directory, such files are skipped."""


class Text(NamedTuple):
    """A document, or a piece of one, in valid UTF-8."""

    data: bytes
    done: int  # bytes of the file that have been read, for the progress bar
    start: int = 0  # bytes of its document in earlier pieces; 0: a document begins here
    ends: bool = True  # its document ends here


class File(NamedTuple):
    path: str
    size: int
    modified: int  # nanoseconds

    @classmethod
    def at(cls, path: str) -> "File":
        status = os.stat(path)
        return cls(path, status.st_size, status.st_mtime_ns)

    def texts(self, config: PrepareConfig) -> Iterator[Text]:
        read = READERS.get(kind_of(self.path)) or (split_text if config.split_documents else text_pieces)
        yield from (text for text in read(self, config) if text.data)
        if File.at(self.path) != self:
            raise RunFailed(f"{self.path} was changed while it was read; run again once it is complete")


def text_pieces(file: File, config: PrepareConfig) -> Iterator[Text]:
    """One document, in pieces."""
    with open_utf8(file.path, config) as (raw, stream):
        rest, position, start, ends = b"", 0, 0, False
        while not ends:
            data = rest + stream.read(streams.PIECE - len(rest))
            ends = len(data) < streams.PIECE
            cut = len(data) if ends else last_boundary(data)
            piece, rest = data[:cut], data[cut:]
            if text := with_unix_lines(checked(piece, file.path, config.bad_files, position)):
                yield Text(text, raw.tell(), start, ends)
                start += len(text)
            position += cut


def text_size(file: File, config: PrepareConfig) -> int:
    """Bytes of the document in a text file, if all of it is valid; much faster than `text_pieces`."""
    size, last = 0, b""
    with open_utf8(file.path, config) as (_, stream):
        while block := stream.read(streams.PIECE):
            size += len(with_unix_lines(block)) - (last == b"\r" and block[:1] == b"\n")
            last = block[-1:]
    return size


def split_text(file: File, config: PrepareConfig) -> Iterator[Text]:
    """Documents with <|endoftext|> between them."""
    with open_utf8(file.path, config) as (raw, stream):
        rest, position, ends = b"", 0, False
        while not ends:
            block = stream.read(streams.PIECE)
            ends = not block
            *documents, rest = (rest + block).split(SEPARATOR)
            for document in [*documents, rest] if ends else documents:
                where = f"{file.path}, the document at byte {position:,}"
                text = checked(document, where, config.bad_files, position).strip(b"\r\n")
                yield Text(with_unix_lines(text), raw.tell())
                position += len(document) + len(SEPARATOR)
            if len(rest) > streams.MAX_RECORD:
                raise too_long(f"{file.path}, the document at byte {position:,}")


def json_texts(file: File, config: PrepareConfig) -> Iterator[Text]:
    """JSON Lines, an object, or an array of objects."""
    with open_utf8(file.path, config) as (raw, stream):
        position = 0
        while data := stream.readline(streams.MAX_RECORD):
            is_object = position == 0 and data.strip() == b"{"  # over several lines
            where = f"{file.path}, the line at byte {position:,}"
            if is_object or data.lstrip().startswith(b"["):
                where, data = f"{file.path}, the value at byte {position:,}", data + stream.read(streams.MAX_RECORD)
            position += len(data)
            if len(data) >= streams.MAX_RECORD:
                raise NotDocuments(f"{where} is too long for a document") if is_object else too_long(where)
            if (data := checked(data, where, config.bad_files)).strip():
                try:
                    found = json.loads(data)
                except (ValueError, RecursionError) as error:
                    raise NotDocuments(f"{where}, is not JSON: {one_line(error)}") from error
                for row in found if isinstance(found, list) else [found]:
                    yield Text(checked(_text_of(row, where, config.column), where, config.bad_files), raw.tell())


def _text_of(row: Any, where: str, column: str) -> bytes:
    """The column of a JSON object."""
    if not isinstance(row, dict) or column not in row:
        names = ", ".join(row)[:300] if isinstance(row, dict) else ""
        remedy = f"name the --column: {names}" if names else "write JSON objects with this field"
        raise NotDocuments(f"{where}, has no {column!r}; {remedy}")
    if not isinstance(row[column], str | None):
        raise NotDocuments(f"{where}: {column!r} is not text: name another --column, or write it as text")
    return (row[column] or "").encode("utf-8", "surrogatepass")  # "\ud800" is JSON, but not text


def csv_texts(file: File, config: PrepareConfig) -> Iterator[Text]:
    """CSV or TSV with a header line."""
    column, limit, last = config.column, streams.MAX_RECORD, 0  # last: the line in which the row before ends
    csv.field_size_limit(limit - 1)
    with open_utf8(file.path, config) as (raw, stream):
        lines = iter(lambda: stream.readline(limit).decode("utf-8", "surrogateescape"), "")
        rows = csv.reader(lines, delimiter="\t" if kind_of(file.path) == "tsv" else ",", strict=True)
        try:
            names = next(filter(None, rows), [])
            check_column(file.path, names, column)
            index, last = names.index(column), rows.line_num
            for row in rows:
                where, last = f"{file.path}, line {rows.line_num:,}", rows.line_num
                if not row:
                    continue
                if len(row) <= index or any(row[len(names) :]):
                    problem = f"{counted(len(row), 'column')}, but the header has {len(names):,}"
                    raise UserError(f"{where} has {problem}: put quotes around the text")
                yield Text(checked(row[index].encode("utf-8", "surrogateescape"), where, config.bad_files), raw.tell())
        except csv.Error as error:
            remedy = "close the quotes around a field, and double those inside it"
            raise UserError(f"{file.path}, line {last + 1:,} cannot be read: {one_line(error)}; {remedy}") from error


def parquet_texts(file: File, config: PrepareConfig) -> Iterator[Text]:
    import pyarrow.parquet

    raw = pyarrow.OSFile(os.fsencode(file.path))  # as bytes: pyarrow refuses a str that is not UTF-8
    damaged = errors_of_library(f"{file.path} is not a Parquet file, or is damaged")
    with raw, damaged, pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20) as parquet:
        check_column(file.path, parquet.schema_arrow.names, config.column)
        for group in range(parquet.num_row_groups):
            where, done = f"{file.path}, row group {group}", file.size * (group + 1) // parquet.num_row_groups
            for batch in parquet.iter_batches(ROWS, [group], columns=[config.column], use_threads=False):
                yield from _column_texts(batch.column(0), where, done, config)


def _column_texts(column: Any, where: str, done: int, config: PrepareConfig) -> Iterator[Text]:
    """The values of an Arrow array."""
    if not re.match("(dictionary<values=)?(large_)?(string|binary|null)", str(column.type)):
        problem = f"column {config.column!r} is {column.type}, not text"
        raise UserError(f"{where}: {problem}: name another --column, or write it as text")
    for text in column.cast("large_binary").to_pylist():  # as bytes: to str, text that is not UTF-8 would fail
        yield Text(text and checked(text, f"{where}: a row", config.bad_files), done)


def check_column(where: str, names: Sequence[str], column: str) -> None:
    """UserError unless exactly one of `names` is `column`."""
    if list(names).count(column) != 1:
        problem = "more than one" if column in names else "no"
        one_name = len(names) == 1 and ";" in names[0]
        remedy = "the separator has to be a comma (in .tsv, a tab)" if one_name else "name the --column"
        raise NotDocuments(f"{where} has {problem} column {column!r}; {remedy}: {', '.join(names)[:300]}")


class HubShard(NamedTuple):
    """Shard `number` of a Hugging Face data set, streamed or on disk."""

    name: str
    number: int
    shards: int
    dataset: Any
    size = 1  # its bytes are not known: the progress bar counts shards

    def texts(self, config: PrepareConfig) -> Iterator[Text]:
        where = f"{self.name}, shard {self.number}"
        with errors_of_library(f"{where} cannot be read (run again to continue)", RunFailed):
            shard = self.dataset.shard(num_shards=self.shards, index=self.number)
            for table in shard.with_format("arrow").iter(batch_size=256):
                check_column(self.name, table.column_names, config.column)
                yield from (t for t in _column_texts(table.column(config.column), where, 0, config) if t.data)


READERS = dict.fromkeys(("jsonl", "ndjson", "json"), json_texts) | dict.fromkeys(("csv", "tsv"), csv_texts)
READERS["parquet"] = parquet_texts


def kind_of(path: str) -> str:
    """How a file is read: a key of READERS, or "text"."""
    match = re.search(rf"\.({'|'.join(READERS)})(\.gz|\.zst)?$", path.lower())
    return match[1] if match else "text"
