"""Documents from files with one a line or row, and from Hugging Face data sets: JSON, CSV, TSV, Parquet."""

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from plaingpt.console import RunFailed, UserError, closest, one_line
from plaingpt.text import arrow
from plaingpt.text.readers import Batch, Documents, OneFile, TextFiles, documents_of
from plaingpt.text.streams import MAX_RECORD, PIECE, ReadOptions, checked_text, open_utf8, too_long


class JsonFile(OneFile):
    """JSON Lines, or an array: one document an object."""

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        position = 0
        with open_utf8(self.file.path, options) as (raw, stream):
            while block := stream.read(PIECE - 1):
                if position == 0 and block.lstrip().startswith(b"["):
                    return (yield Batch(self.size, functools.partial(self._array, self._rest(block, stream), options)))
                block += stream.readline(MAX_RECORD)  # a block ends where a line does
                if len(block) >= MAX_RECORD:
                    raise too_long(f"{self.file.path}, the line after byte {position:,}")
                yield Batch(raw.tell(), functools.partial(self._lines, block, position, options))
                position += len(block)

    def _rest(self, block: bytes, stream: IO[bytes]) -> bytes:
        while len(block) <= MAX_RECORD and (more := stream.read(PIECE)):
            block += more
        if len(block) > MAX_RECORD:
            limit = f"an array of more than {MAX_RECORD >> 20} MB"
            raise UserError(f"{self.file.path} is {limit}: make it JSON Lines: jq -c '.[]' FILE.json > FILE.jsonl")
        return block

    def _array(self, data: bytes, options: ReadOptions) -> Documents:
        where = f"{self.file.path}, the array"
        values = _parsed(checked_text(data, where, options.bad_files) or b"[]", where)
        return documents_of(_text_of(value, f"{where}'s value {i:,}", options) for i, value in enumerate(values, 1))

    def _lines(self, block: bytes, position: int, options: ReadOptions) -> Documents:
        if (texts := arrow.json_texts(block, options.column)) is None:
            texts = []
            for line in io.BytesIO(block):
                where = f"{self.file.path}, the line at byte {position:,}"
                position += len(line)
                if line.strip() and (valid := checked_text(line, where, options.bad_files)):
                    texts.append(_text_of(_parsed(valid, where), where, options))
        return documents_of(texts)


class CsvFile(OneFile):
    """CSV or TSV with a header line: one document a row."""

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        path, tabs = self.file.path, kind_of(self.file.path) == "TSV"
        csv.field_size_limit(MAX_RECORD - 1)
        with open_utf8(path, options) as (raw, stream):
            lines = (s.decode("utf-8", "surrogateescape") for s in iter(lambda: stream.readline(MAX_RECORD), b""))
            rows = csv.reader(lines, delimiter="\t" if tabs else ",")
            try:
                names = next(rows, [])
                arrow.check_names(path, names, options.column)
                texts = self._texts(rows, names.index(options.column), options)
                yield from (Batch(raw.tell(), batch) for batch in _grouped(texts, len, documents_of))
            except csv.Error as error:
                raise UserError(f"{path}, line {rows.line_num:,} cannot be read: {one_line(error)}") from error

    def _texts(self, rows: Iterator[list[str]], index: int, options: ReadOptions) -> Iterator[bytes]:
        for row in rows:
            where = f"{self.file.path}, line {rows.line_num:,}"
            if 0 < len(row) <= index:
                raise UserError(f"{where}: {len(row)} columns, {options.column!r} is column {index + 1}")
            text = row[index].encode("utf-8", "surrogateescape") if row else b""
            yield checked_text(text, where, options.bad_files) or b""


class ParquetFile(OneFile):
    """One document a row."""

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        path = self.file.path
        with arrow.open_parquet(path) as parquet:
            arrow.check_column(path, parquet.schema_arrow, options.column)
            groups = parquet.num_row_groups
            for group in range(groups):
                columns = arrow.row_group_columns(parquet, group, options.column, path, MAX_RECORD)
                documents = functools.partial(_column_documents, f"{path}, rows of group {group}", options)
                done = self.size * (group + 1) // groups
                yield from (Batch(done, batch) for batch in _grouped(columns, _nbytes, documents))


@dataclass(frozen=True)
class Shard:
    """Shard `index` of a Hugging Face data set, streamed or on disk."""

    name: str
    index: int
    shards: int
    dataset: Any
    size = 1  # its bytes are not known: the progress bar counts shards

    def batches(self, options: ReadOptions) -> Iterator[Batch]:
        where = f"{self.name}, shard {self.index}"
        documents = functools.partial(_column_documents, where, options)
        try:
            shard = self.dataset.shard(num_shards=self.shards, index=self.index)
            tables = shard.with_format("arrow").iter(batch_size=256)
            columns = (self._column(table, options.column) for table in tables)
            yield from (Batch(0, batch) for batch in _grouped(columns, _nbytes, documents))
        except UserError:
            raise
        except Exception as error:  # of any library below: network, server, file format
            raise RunFailed(f"{where} cannot be read: {one_line(error)}; run again to go on") from error

    def _column(self, table: Any, column: str) -> Any:
        arrow.check_column(self.name, table.schema, column)
        return table.column(column)


Item = TextFiles | OneFile | Shard
KINDS = {"JSON Lines": JsonFile, "JSON": JsonFile, "CSV": CsvFile, "TSV": CsvFile, "Parquet": ParquetFile}
_SUFFIXES = {"jsonl": "JSON Lines", "ndjson": "JSON Lines", "json": "JSON", "csv": "CSV", "tsv": "TSV"}


def kind_of(path: str) -> str:
    """How a file is read, by the end of its name in upper or lower case."""
    if path.lower().endswith(".parquet"):
        return "Parquet"
    match = re.search(r"\.(jsonl|ndjson|json|csv|tsv)(\.gz|\.zst)?$", path.lower())
    return _SUFFIXES[match[1]] if match else "text"


def _grouped(values: Iterable[Any], size_of: Callable, documents: Callable) -> Iterator[Callable[[], Documents]]:
    """`documents` of PIECE bytes of values at a time."""
    waiting, size = [], 0
    for value in values:
        waiting.append(value)
        size += size_of(value)
        if size >= PIECE:
            yield functools.partial(documents, waiting)
            waiting, size = [], 0
    if waiting:
        yield functools.partial(documents, waiting)


def _nbytes(column: Any) -> int:
    return column.nbytes


def _column_documents(where: str, options: ReadOptions, columns: list[Any]) -> Documents:
    found = []
    for column in columns:
        texts, valid = arrow.column_texts(column)
        found += texts if valid else [text and checked_text(text, where, options.bad_files) for text in texts]
    return documents_of(found)


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}, is not JSON: {one_line(error)}") from error


def _text_of(row: Any, where: str, options: ReadOptions) -> bytes | None:
    """The column of a JSON object."""
    column, columns = options.column, row if isinstance(row, dict) else {}
    if column not in columns:
        remedy = f"name the --column: {', '.join(columns)[:300]}" if columns else "it has to be a JSON object"
        raise UserError(f"{where}, has no {column!r}{closest(column, columns)}; {remedy}")
    if row[column] is None:
        return None
    if not isinstance(row[column], str):
        raise UserError(f"{where}: {column!r} is not text; name the --column")
    return checked_text(row[column].encode("utf-8", "surrogatepass"), where, options.bad_files)
