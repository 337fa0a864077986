"""Which files a preparation reads: one walk over directories and globs, each real file once, and what it leaves out."""

import collections
import fnmatch
import glob
import itertools
import os
from collections.abc import Container, Iterator

from plaingpt.console import UserError, closest, counted
from plaingpt.text.readers import File, kind_of
from plaingpt.text.streams import ReadOptions, open_utf8
from plaingpt.tokens import NAMED

HEAD = 8000  # bytes in which a NUL makes a file binary, as in git
OFTEN_NOT_DOCUMENTS = ("JSON", "CSV", "TSV")  # settings and tables as well as texts


def walk(directory: str, left_out: Container[str] = ("node_modules",), entered: set | None = None) -> Iterator[str]:
    """The files in a directory and below, except hidden ones. Links are followed; no directory is entered twice."""
    entered, status = set() if entered is None else entered, os.stat(directory)
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    with os.scandir(directory) as entries:  # not os.walk, which ignores a directory that cannot be read
        found = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    for entry in found:
        if entry.name.startswith(".") or entry.name in left_out:
            continue
        if entry.is_dir():
            yield from walk(entry.path, left_out, entered)
        elif entry.is_file():  # not a pipe, a device or a broken link
            yield entry.path


def find_files(words: list[str], options: ReadOptions) -> tuple[tuple[File, ...], str]:
    """The files that are read, each once, in the order of their paths, and a summary of these and of those left out.

    What is not text is left out, but UserError where such a file is named itself.
    """
    named = {os.path.normpath(word) for word in words if os.path.isfile(word)}
    paths = {os.path.normpath(path) for word in words for path in _files(word)}
    found, read, skipped = {}, collections.Counter(), collections.Counter()
    for path in sorted(paths, key=lambda path: (os.path.islink(path), path.split(os.sep))):
        status = os.stat(path)
        found.setdefault((status.st_dev, status.st_ino), path)
    files = []
    for path in sorted(found.values(), key=lambda path: path.split(os.sep)):
        if kind := _not_text(path, options, path in named):
            skipped[kind] += 1
        else:
            files.append(File.at(path))
            read[kind_of(path)] += 1
    of_each = ", ".join(f"{n:,} {kind}" for kind, n in read.most_common())
    column = f" (column {options.column!r})" if set(read) - {"text"} else ""
    left_out = ", ".join(counted(n, kind) if kind.islower() else f"{n:,} {kind}" for kind, n in skipped.most_common())
    left_out = f"{skipped.total():,} skipped: {left_out}" if skipped else ""
    if not files:
        raise UserError(f"{' '.join(words)}: {left_out or 'no files there'}")
    return tuple(files), f"reading {counted(len(files), 'file')}: {of_each}{column}" + (left_out and f"; {left_out}")


def _files(word: str) -> Iterator[str]:
    if os.path.isdir(word):
        yield from walk(word)
    elif matches := [word] if os.path.isfile(word) else list(_matches(word)):
        yield from filter(os.path.isfile, matches)
    else:
        raise UserError(f"{word}: no such file, directory or source{closest(word, NAMED)}")


def _matches(pattern: str) -> Iterator[str]:
    """What a glob matches. Below ** the walk decides, so that a circle of links ends."""
    if "**" not in pattern:
        yield from glob.iglob(pattern)
        return
    start = os.path.dirname(pattern.partition("**")[0])
    parts = os.path.relpath(pattern, start or os.curdir).split(os.sep)
    for directory in filter(os.path.isdir, glob.iglob(start or os.curdir)):
        yield from (path for path in walk(directory) if _fits(os.path.relpath(path, directory).split(os.sep), parts))


def _fits(names: list[str], patterns: list[str]) -> bool:
    """Whether the names of a path match a glob's patterns, of which ** stands for any number of names."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_fits(names[i:], patterns[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def _not_text(path: str, options: ReadOptions, is_named: bool) -> str | None:
    """What a file is that cannot be read as documents; None if it can. UserError if it is named."""
    kind = kind_of(path)
    if kind in OFTEN_NOT_DOCUMENTS and not is_named:
        try:
            for _ in itertools.islice(File.at(path).texts(options), 1):
                pass
        except UserError:
            return f"{kind} without {options.column!r}"
    if kind != "text":
        return None
    try:
        with open_utf8(path, options) as opened:  # a compressed text is one, too
            head = opened.stream.read(HEAD)
    except UserError:
        if is_named:
            raise
        return "damaged file"
    if b"\0" not in head and not head.startswith((b"%PDF-", b"{\\rtf")):
        return None
    if is_named and options.bad_files != "skip":
        remedy = "convert it to text, name its --encoding, or leave it out: --bad_files=skip"
        raise UserError(f"{path} is not text but a binary file: {remedy}")
    return "binary file"
