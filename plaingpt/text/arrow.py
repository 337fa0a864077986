"""Texts out of Arrow's readers, which leave Python's lock to others: Parquet, JSON Lines, columns of data sets.

Arrow is slow to import, so it is where there is something to read with it.
"""

import contextlib
from collections.abc import Iterator
from typing import IO, Any

from plaingpt.console import UserError, closest, one_line

LONG_LINE = 1 << 24  # bytes, of which Arrow's JSON reader makes two copies more than Python's


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
    import pyarrow

    if column not in schema.names:
        names = ", ".join(schema.names)
        raise UserError(f"{where} has no column {column!r}{closest(column, schema.names)}; name the --column: {names}")
    kind = schema.field(column).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(values) not in ("string", "large_string", "string_view", "binary", "large_binary"):
        raise UserError(f"{where}: column {column!r} is {kind}, no text; name the --column")


def column_texts(column: Any) -> tuple[list[bytes | None], bool]:
    """The values of a column, an array of Arrow's, and whether all of them are UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = column.cast("large_binary")  # without a copy
    return column.to_pylist(), _all_utf8(column)


def json_texts(lines: bytes, column: str) -> list[bytes] | None:
    """The column's values in lines of JSON; None where not each line has one: then they are to be looked at singly.

    Arrow looks neither at where lines end nor, in other columns, at what is no UTF-8.
    """
    if len(lines) > LONG_LINE:
        return None
    import pyarrow.json as json
    from pyarrow import ArrowException, BufferReader, large_string, schema

    try:
        table = json.read_json(
            BufferReader(lines),
            json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            json.ParseOptions(explicit_schema=schema([(column, large_string())]), unexpected_field_behavior="ignore"),
        )
    except (ArrowException, UnicodeError):  # the column cannot be a name
        return None
    if table.num_rows != lines.count(b"\n") + (not lines.endswith(b"\n")) or not is_utf8(lines):
        return None
    texts, valid = column_texts(table[column])
    return texts if valid and not table[column].null_count else None


def is_utf8(data: bytes) -> bool:
    """As `decode` finds it, but without making a string, which for much text takes several times as long."""
    import pyarrow

    return data.isascii() or _all_utf8(pyarrow.array([data], "large_binary"))


def _all_utf8(texts: Any) -> bool:
    """Of bytes all at once, which is ten times as fast as one by one."""
    import pyarrow

    try:
        texts.cast("large_string")
    except pyarrow.ArrowInvalid:
        return False
    return True


def zstd_stream(file: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(file, "zstd")
