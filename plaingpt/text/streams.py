"""Files as UTF-8 whatever their compression and encoding, the check of their text, and where a text may be cut."""

import codecs
import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import IO, NamedTuple

from plaingpt.console import UserError, note, one_line
from plaingpt.text.config import PrepareConfig

PIECE = 1 << 20  # bytes of text that are read, and encoded, at a time
MAX_RECORD = 1 << 26  # bytes of a line or a field: a few kilobytes of compressed data can stand for gigabytes
# Places that no token of GPT-2's or our tokenizers spans: before a space, or after a line break, between two characters
# that are not white space. Python's white space includes that of the tokenizers; the surrogates stand for the bytes of
# an incomplete character.
_INK = r"[^\s\udc80-\udcff]"
SAFE_BOUNDARY = re.compile(f"(?<={_INK})(?= {_INK})|(?<={_INK}\n)(?={_INK})")
BOMS = {  # UTF-32's first: it begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip
BAD = "\udcff"  # replaces bytes that are invalid in the encoding; written as 0xff, which is invalid UTF-8
_noted = set()


class Utf8(NamedTuple):
    """An open file."""

    raw: IO[bytes]
    stream: io.BufferedReader  # decompressed, in UTF-8, without byte order mark; `raw` itself where that is the same
    config: PrepareConfig
    encoding: str | None

    def checked(self, text: bytes, where: str, position: int = 0, binary: bool = False) -> bytes:
        return checked(text, where, self.config.bad_files, position, binary, self.encoding)


@contextlib.contextmanager
def open_utf8(path: str, config: PrepareConfig) -> Iterator[Utf8]:
    with open(path, "rb") as raw:
        stream = raw
        if codec := {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path)[1].lower()):
            import pyarrow  # takes a third of a second

            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, codec), PIECE)
        try:
            head = stream.peek(4)[:4]
            encoding = next((name for bom, name in BOMS.items() if head.startswith(bom)), config.encoding)
            if head.startswith(codecs.BOM_UTF8):
                stream.read(len(codecs.BOM_UTF8))
            elif encoding:
                stream = io.BufferedReader(Transcoded(stream, encoding), PIECE)
            yield Utf8(raw, stream, config, encoding)
        except UnicodeError as error:
            raise UserError(f"{path} is not text in {encoding}: {one_line(error)}; name the --encoding") from error
        except OSError as error:
            if not codec or error.errno:  # the operating system's error, not a fault of the file
                raise
            remedy = "; compress it again without --long" if "too much memory" in str(error) else ""
            raise UserError(f"{path} cannot be decompressed: {one_line(error)}{remedy}") from error


class Transcoded(io.RawIOBase):
    """A stream in another encoding, read as UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str):
        self._text, self._rest = io.TextIOWrapper(stream, encoding, "plaingpt_bad", newline="\n"), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self._rest or self._text.read(max(1, len(buffer) // 4)).encode("utf-8", "surrogateescape")
        fitting, self._rest = data[: len(buffer)], data[len(buffer) :]  # a character can be longer than the buffer
        buffer[: len(fitting)] = fitting
        return len(fitting)


codecs.register_error("plaingpt_bad", lambda error: (BAD, error.end))


def checked(
    text: bytes, where: str, bad_files: str, position: int = 0, binary: bool = False, encoding: str | None = None
) -> bytes:
    """`text` if it is UTF-8, else what --bad_files asks for: an error, nothing (and a note), or U+FFFD.

    position: of the text in its file. binary: NUL is not text either. encoding: of the file.
    """
    bad = text.find(b"\0") if binary else -1
    try:
        if not text.isascii():
            text.decode()
    except UnicodeDecodeError as error:
        bad = error.start if bad == -1 else min(bad, error.start)
    if bad == -1:
        return text
    if bad_files == "replace":
        replaced = text.decode(errors="replace")
        return (replaced.replace("\0", "\ufffd") if binary else replaced).encode()
    problem = f"{where} is not UTF-8 text (byte 0x{text[bad]:02x} at {position + bad:,})"
    if encoding not in (None, "utf-8-sig"):
        problem = f"{where} is not text in {encoding}"
    if bad_files == "stop":
        remedy = "leave it out: --bad_files=skip, write U+FFFD for it: --bad_files=replace, or name the --encoding"
        raise UserError(f"{problem}; {remedy}")
    note_once(f"skipped: {problem}", where)
    return b""


def note_once(message: str, about: str) -> None:
    """Some text is read more than once: to count documents, to train a tokenizer, to encode."""
    if about not in _noted:
        _noted.add(about)
        note(message)


def too_long(where: str) -> UserError:
    return UserError(f"{where} is longer than {MAX_RECORD >> 20} MB; if it is not damaged, split it")


def last_boundary(data: bytes) -> int:
    """The last place where a text may be cut without changing its tokens.

    Where there is none, as in a text without spaces, it is cut before its last character.
    """
    for window_size in (1 << 10, len(data)):  # one is usually near
        start = max(0, len(data) - window_size)
        window = data[start:].decode("utf-8", "surrogateescape")
        if boundaries := list(SAFE_BOUNDARY.finditer(window)):
            return start + len(window[: boundaries[-1].start()].encode("utf-8", "surrogateescape"))
    return character_boundary(data, len(data) - 1) or len(data)


def character_boundary(data: bytes, index: int) -> int:
    """`index`, or the beginning of the character that it is in."""
    while 0 < index < len(data) and data[index] & 0xC0 == 0x80:
        index -= 1
    return index


def split_of(digest: int, val_fraction: float) -> str:
    """The split of a document, by the XXH3 (64 bits) of its text: order and growth of the source change nothing."""
    return "val" if digest < val_fraction * 2**64 else "train"
