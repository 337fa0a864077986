"""Texts out of Arrow's readers, which leave Python's lock to others: Parquet, JSON Lines, columns of data sets.

Arrow is slow to import: data/readers.py does so where there is something to read with it.
"""

from typing import IO

import pyarrow

from config.settings import UserError, closest, one_line


def open_parquet(path: str) -> "pyarrow.parquet.ParquetFile":
    import pyarrow.parquet  # slow, and needed for such files alone

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is no Parquet file, or a damaged one: {one_line(error)}") from error


def check_column(where: str, schema: pyarrow.Schema, column: str) -> None:
    """UserError where the column is missing or is no text."""
    types = pyarrow.types
    if column not in schema.names:
        names = ", ".join(schema.names)
        raise UserError(f"{where} has no column {column!r}{closest(column, schema.names)}; name the --column: {names}")
    kind = schema.field(column).type
    values = kind.value_type if types.is_dictionary(kind) else kind
    forms = (types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary)
    if not any(is_text(values) for is_text in forms):
        raise UserError(f"{where}: column {column!r} is {kind}, no text; name the --column")


def column_texts(column: pyarrow.Array | pyarrow.ChunkedArray) -> tuple[list[bytes | None], bool]:
    """The column's values, and whether all of them are UTF-8."""
    types = pyarrow.types
    if types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    short = types.is_string(column.type) or types.is_binary(column.type)
    column = column.cast("binary" if short else "large_binary")  # without a copy
    try:
        column.cast("string" if short else "large_string")  # all at once, ten times as fast as one by one
        valid = True
    except pyarrow.ArrowInvalid:
        valid = False
    return column.to_pylist(), valid


def json_texts(lines: bytes, column: str) -> list[bytes] | None:
    """The column's values in lines of JSON; None where not each line has one: then they are to be looked at singly."""
    import pyarrow.json as json

    schema = pyarrow.schema([(column, pyarrow.large_string())])
    try:
        table = json.read_json(
            pyarrow.BufferReader(lines),
            json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
            json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pyarrow.ArrowInvalid:
        return None
    texts, valid = column_texts(table[column])
    return texts if valid and not table[column].null_count else None


def is_utf8(data: bytes) -> bool:
    """As `decode` finds it, but without making a string, which for much text takes several times as long."""
    borders = pyarrow.array([0, len(data)], pyarrow.int64()).buffers()[1]
    text = pyarrow.Array.from_buffers(pyarrow.large_string(), 1, [None, borders, pyarrow.py_buffer(data)])
    try:
        text.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def zstd_stream(file: IO[bytes]) -> pyarrow.NativeFile:
    return pyarrow.CompressedInputStream(file, "zstd")
