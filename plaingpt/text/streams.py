"""Files as UTF-8 whatever their compression and encoding, the check of their text, and where a text may be cut."""

import codecs
import contextlib
import functools
import io
import os
import re
from collections.abc import Iterator
from typing import IO

from plaingpt.console import UserError, note, one_line
from plaingpt.text.config import PrepareConfig

PIECE = 1 << 20  # bytes of text that are read, and encoded, at a time
MAX_RECORD = 1 << 26  # bytes of a line or a field: a few kilobytes of compressed data can stand for gigabytes
# Places where GPT-2's tokenizer and ours always begin a new token: before a space, or after a line break, between two
# characters that are not white space. Python's white space includes that of the tokenizers; the surrogates stand for
# the bytes of an incomplete character.
_INK = r"[^\s\udc80-\udcff]"
SAFE_BOUNDARY = re.compile(f"(?<={_INK})(?= {_INK})|(?:(?<={_INK}\n)|(?<={_INK}\r\n))(?={_INK})")
note_once = functools.cache(note)  # text is read again to count documents, to train a tokenizer and to encode


@contextlib.contextmanager
def open_utf8(path: str, config: PrepareConfig) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file, and its content: decompressed, without byte order mark, and in UTF-8 if its encoding is known."""
    with open(path, "rb") as raw:
        stream, encoding = raw, None
        codec = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path)[1].lower())
        try:
            if codec:
                import pyarrow  # takes a third of a second

                stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, codec), PIECE)
            head = stream.peek(4)[:4]
            encoding = "utf-16" if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else config.encoding
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            elif encoding:
                import pyarrow

                source = pyarrow.PythonFile(stream, "r")
                stream = io.BufferedReader(pyarrow.transcoding_input_stream(source, encoding, "utf-8"), PIECE)
            yield raw, stream
        except UnicodeError as error:
            raise UserError(f"{path} is damaged, or not text in {encoding}: {one_line(error)}") from error
        except OSError as error:
            if not codec or error.errno:  # the operating system's error, not a fault of the file
                raise
            raise UserError(f"{path} cannot be decompressed: {one_line(error)}") from error


def checked(text: bytes, where: str, bad_files: str | None, position: int = 0) -> bytes:
    """`text`, which is at byte `position` of a file, if it is valid UTF-8. If not: UserError (stop), b"" and a note
    (skip), or `text` with U+FFFD for invalid bytes (replace)."""
    try:
        if not text.isascii():
            text.decode()
        return text
    except UnicodeDecodeError as error:
        problem = f"{where} is not UTF-8 text (byte 0x{text[error.start]:02x} at {position + error.start:,})"
    if bad_files == "replace":
        return text.decode(errors="replace").encode()
    if bad_files == "skip":
        note_once(f"skipped: {problem}")
        return b""
    remedy = "use --bad_files=skip to drop it, --bad_files=replace to write U+FFFD instead, or name the --encoding"
    raise UserError(f"{problem}; {remedy}")


def too_long(where: str) -> UserError:
    return UserError(f"{where} is longer than {MAX_RECORD >> 20} MB; split it (an array: jq -c '.[]' F.json > F.jsonl)")


def last_boundary(data: bytes) -> int:
    """The last place where a cut changes no token. If there is none (no spaces, for example), the place before the last
    character."""
    end = max(data.rfind(b" "), data.rfind(b"\n")) + 8  # the last candidate, with the character after it
    for window_size in (1 << 10, end):  # one is usually near
        start = max(0, end - window_size)
        window = data[start:end].decode("utf-8", "surrogateescape")
        if boundaries := list(SAFE_BOUNDARY.finditer(window)):
            return start + len(window[: boundaries[-1].start()].encode("utf-8", "surrogateescape"))
    last = len(data) - (2 if data.endswith(b"\r\n") else 1)
    return character_boundary(data, last) or len(data)


def with_unix_lines(text: bytes) -> bytes:
    """`text` with line breaks of Unix, as prompts have them. Looking for one byte first is nine times as fast."""
    return text.replace(b"\r\n", b"\n") if b"\r" in text else text


def character_boundary(data: bytes, index: int) -> int:
    """`index`, or the beginning of the character that it is in."""
    while 0 < index < len(data) and data[index] & 0xC0 == 0x80:
        index -= 1
    return index
