"""Text columns from Arrow's readers, which release the GIL: Parquet, JSON Lines, Hugging Face data sets.

Arrow is imported inside the functions: the import takes a third of a second, and plain text does without it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from plaingpt.console import UserError, closest, one_line

LONG_LINE = 1 << 24  # bytes; Arrow's JSON reader makes two more copies of a line than Python's
ROWS = 64  # decoded at a time


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A ParquetFile that streams its row groups."""
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
            yield file
    except (OSError, pyarrow.ArrowException) as error:
        if getattr(error, "errno", None):  # the operating system's error, not a fault of the file
            raise
        raise UserError(f"{path} is not a Parquet file, or is damaged: {one_line(error)}") from error


def row_group_columns(file: Any, group: int, column: str, where: str, max_bytes: int) -> Iterator[Any]:
    """One column of a row group, some rows at a time, as Arrow arrays."""
    group_metadata = file.metadata.row_group(group)
    chunks = map(group_metadata.column, range(group_metadata.num_columns))
    size, compressed = next(
        (c.total_uncompressed_size, c.total_compressed_size) for c in chunks if c.path_in_schema.split(".")[0] == column
    )
    if size > max_bytes * max(group_metadata.num_rows, 1):
        raise UserError(f"{where} has rows of more than {max_bytes >> 20} MB")
    # A few hundred bytes can stand for a million equal rows of a megabyte: such a file is read row by row.
    rows = ROWS if size < 100 * compressed else 1
    for batch in file.iter_batches(rows, [group], columns=[column], use_threads=False):
        yield batch.column(0)


def check_names(where: str, names: Sequence[str], column: str) -> None:
    """UserError unless exactly one of `names` is `column`."""
    if column not in names:
        shown = ", ".join(names)[:300]
        raise UserError(f"{where} has no column {column!r}{closest(column, names)}; name the --column: {shown}")
    if list(names).count(column) > 1:
        raise UserError(f"{where} has more than one column {column!r}: rename one of them")


def check_column(where: str, schema: Any, column: str) -> None:
    """UserError unless the schema has exactly one such column and it holds text."""
    import pyarrow

    check_names(where, schema.names, column)
    kind = schema.field(column).type
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(values) not in ("string", "large_string", "string_view", "binary", "large_binary", "null"):
        raise UserError(f"{where}: column {column!r} is {kind}, not text; name the --column")


def column_texts(column: Any) -> tuple[list[bytes | None], bool]:
    """The values of an Arrow array, and whether all of them are UTF-8."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    column = column.cast("large_binary")  # no copy
    return column.to_pylist(), _all_utf8(column)


def json_texts(lines: bytes, column: str) -> list[bytes] | None:
    """The column's values in lines of JSON; None unless every line has one: then they are parsed one by one.

    Arrow checks neither where a line ends nor, in other columns, that they are UTF-8.
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
    except (ArrowException, UnicodeError):  # UnicodeError: not a name in Arrow
        return None
    if table.num_rows != lines.count(b"\n") + (not lines.endswith(b"\n")) or not is_utf8(lines):
        return None
    texts, valid = column_texts(table[column])
    return texts if valid and not table[column].null_count else None


def is_utf8(data: bytes) -> bool:
    """The verdict of `decode` without creating a string, which takes several times as long for much text."""
    import pyarrow

    return data.isascii() or _all_utf8(pyarrow.array([data], "large_binary"))


def _all_utf8(texts: Any) -> bool:
    """Checks all values at once, ten times as fast as one by one."""
    import pyarrow

    try:
        texts.cast("large_string")
    except pyarrow.ArrowInvalid:
        return False
    return True
