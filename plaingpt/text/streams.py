"""Files as UTF-8: compression, encodings, bytes that are not text, and places where a text may be cut."""

import codecs
import contextlib
import functools
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from plaingpt.console import UserError, note, one_line
from plaingpt.text import arrow

PIECE = 1 << 20  # bytes read at a time, and about the text in a batch
WINDOW = 1 << 20  # bytes in which a place to cut is looked for
MAX_RECORD = 1 << 26  # bytes of a line, field or row: a few kilobytes of compressed data can stand for gigabytes
LARGE_TEXT = 1 << 18  # bytes from which on Arrow's check of UTF-8 is faster than Python's
# No token of GPT-2 or of a tokenizer of ours spans these places: before a space between two characters that are not
# white space, and after a line's end between such. Python's white space includes that of the tokenizers; the surrogates
# stand for the bytes of a character that is cut.
_INK = r"[^\s\udc80-\udcff]"
SAFE_BORDER = re.compile(f"(?<={_INK})(?= {_INK})|(?<={_INK}\n)(?={_INK})")
BOMS = {  # UTF-32's first: it begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip


@dataclass(frozen=True)
class ReadOptions:
    """What the settings say about reading."""

    column: str = "text"
    bad_files: str = "stop"
    encoding: str | None = None  # of text without a byte order mark; None: UTF-8
    split_documents: bool = False  # text files at <|endoftext|>
    val_fraction: float = 0.05
    by_content: bool = True  # a document goes to a split by its hash; False: the tail of each goes to validation

    @property
    def errors(self) -> str:
        return "replace" if self.bad_files == "replace" else "strict"


@contextlib.contextmanager
def open_utf8(path: str, options: ReadOptions) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """(the file itself, its content decompressed and as UTF-8 without byte order mark)."""
    with open(path, "rb") as raw:
        stream = raw
        if path.lower().endswith(".gz"):
            stream = gzip.open(raw)  # noqa: SIM115 (closing `raw` is enough)
        elif path.lower().endswith(".zst"):
            import pyarrow  # slow to import

            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), PIECE)
        try:
            encoding = encoding_of(stream.peek(4)[:4], options.encoding)
            if encoding == "utf-8-sig":
                stream.read(len(codecs.BOM_UTF8))
            yield raw, stream if encoding in (None, "utf-8-sig") else Recoded(stream, encoding, options.errors)
        except UnicodeError as error:
            raise bad_text(f"{path} is not text in {encoding}: {getattr(error, 'reason', error)}") from error
        except (EOFError, OSError, zlib.error) as error:  # gzip's, zstd's
            if stream is raw or getattr(error, "errno", None):  # the operating system's error, not a fault of the file
                raise
            remedy = "; compress it again without --long" if "too much memory" in str(error) else ""
            raise UserError(f"{path} cannot be decompressed: {one_line(error)}{remedy}") from error


class Recoded:
    """A stream in another encoding, read as UTF-8."""

    def __init__(self, stream: IO[bytes], encoding: str, errors: str):
        self._text = io.TextIOWrapper(stream, encoding, errors, newline="\n")

    def read(self, size: int) -> bytes:
        return self._text.read(size).encode()

    def readline(self, size: int) -> bytes:
        return self._text.readline(size).encode()


def encoding_of(head: bytes, given: str | None) -> str | None:
    """The encoding that a byte order mark names, else the one given."""
    return next((name for bom, name in BOMS.items() if head.startswith(bom)), given)


def decoded_text(data: bytes, path: str, options: ReadOptions) -> bytes | None:
    """A text file's content as UTF-8; None and a note where it is to be skipped."""
    encoding = encoding_of(data[:4], options.encoding)
    try:
        if encoding == "utf-8-sig":
            data = data.removeprefix(codecs.BOM_UTF8)
        elif encoding:
            data = data.decode(encoding, options.errors).encode()
    except UnicodeError as error:
        return skip_or_raise(f"{path} is not text in {encoding}: {getattr(error, 'reason', error)}", options.bad_files)
    return checked_text(data, path, options.bad_files, binary=True)


def checked_text(data: bytes, where: str, bad_files: str, binary: bool = False, position: int = 0) -> bytes | None:
    """`data` if UTF-8 (with `binary`: without NUL), else by `bad_files`: repaired, None and a note, or UserError."""
    bad = data.find(b"\0") if binary else -1
    try:
        if not data.isascii() and not (len(data) > LARGE_TEXT and arrow.is_utf8(data)):
            data.decode()
    except UnicodeDecodeError as error:
        bad = error.start if bad == -1 else min(bad, error.start)
    if bad == -1:
        return data
    if bad_files == "replace":
        text = data.decode(errors="replace")
        return (text.replace("\0", "\ufffd") if binary else text).encode()
    return skip_or_raise(f"{where} is not UTF-8 text (byte 0x{data[bad]:02x} at {position + bad:,})", bad_files)


def skip_or_raise(problem: str, bad_files: str) -> None:
    if bad_files != "skip":
        raise bad_text(problem)
    note_once(f"skipped: {problem}")


def bad_text(problem: str) -> UserError:
    remedy = "leave it out: --bad_files=skip, write U+FFFD for it: --bad_files=replace, or name the --encoding"
    return UserError(f"{problem}; {remedy}")


@functools.lru_cache(maxsize=4096)
def note_once(message: str) -> None:
    """Some text is read more than once: to count documents, to learn a tokenizer, to encode."""
    note(message)


def too_long(where: str) -> UserError:
    return UserError(f"{where} is longer than {MAX_RECORD >> 20} MB; if it is not damaged, split it")


def last_border(data: bytes) -> int:
    """The last place where a text may be cut without changing its tokens, or 0.

    Where there is none in WINDOW bytes, as in a text without spaces, it is cut before its last character.
    """
    for window_size in (1 << 10, len(data)):  # one is usually near
        start = max(0, len(data) - window_size)
        window = data[start:].decode("utf-8", "surrogateescape")
        if borders := list(SAFE_BORDER.finditer(window)):
            return start + len(window[: borders[-1].start()].encode("utf-8", "surrogateescape"))
    last = len(data) - 1 if len(data) >= WINDOW else 0
    while last > 0 and data[last] & 0xC0 == 0x80:
        last -= 1
    return last


def split_of(digest: int, val_fraction: float) -> str:
    """The split of a document, by the XXH3 (64 bits) of its text: order and growth of the source change nothing."""
    return "val" if digest < val_fraction * 2**64 else "train"
