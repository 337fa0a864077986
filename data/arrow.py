"""Texts out of Arrow's readers, which leave Python's lock to others: Parquet, JSON Lines, columns of data sets.

Arrow is slow to import, so it is where there is something to read with it.
"""

import contextlib
from collections.abc import Iterator
from typing import IO, Any

from config.settings import UserError, closest, one_line


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None):  # the system's, and no fault of the file
            raise
        raise UserError(f"{path} is no Parquet file, or a damaged one: {one_line(error)}") from error


def check_column(where: str, schema: Any, column: str) -> None:
    """UserError where the column is missing or is no text."""
    import pyarrow.types as types

    if column not in schema.names:
        names = ", ".join(schema.names)
        raise UserError(f"{where} has no column {column!r}{closest(column, schema.names)}; name the --column: {names}")
    kind = schema.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    forms = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(is_text(values) for is_text in forms):
        raise UserError(f"{where}: column {column!r} is {kind}, no text; name the --column")


def column_texts(column: Any) -> tuple[list[bytes | None], bool]:
    """The values of a column, an array of Arrow's, and whether all of them are UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = column.cast("large_binary")  # without a copy
    try:
        column.cast("large_string")  # all at once, ten times as fast as one by one
        valid = True
    except pyarrow.ArrowInvalid:
        valid = False
    return column.to_pylist(), valid


def json_texts(lines: bytes, column: str) -> list[bytes] | None:
    """The column's values in lines of JSON; None where not each line has one: then they are to be looked at singly.

    Arrow looks neither at where lines end nor, in other columns, at what is no UTF-8.
    """
    import pyarrow.json as json
    from pyarrow import ArrowException, BufferReader, large_string, schema

    try:
        table = json.read_json(
            BufferReader(lines),
            json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            json.ParseOptions(explicit_schema=schema([(column, large_string())]), unexpected_field_behavior="ignore"),
        )
    except (ArrowException, OverflowError, UnicodeError):  # 2 GB in a line, a column that cannot be a name
        return None
    if table.num_rows != lines.count(b"\n") + (not lines.endswith(b"\n")) or not is_utf8(lines):
        return None
    texts, valid = column_texts(table[column])
    return texts if valid and not table[column].null_count else None


def is_utf8(data: bytes) -> bool:
    """As `decode` finds it, but without making a string, which for much text takes several times as long."""
    import pyarrow

    borders = pyarrow.array([0, len(data)], pyarrow.int64()).buffers()[1]
    text = pyarrow.Array.from_buffers(pyarrow.large_string(), 1, [None, borders, pyarrow.py_buffer(data)])
    try:
        text.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def zstd_stream(file: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")
