"""Which files a preparation reads: one walk over folders and globs, each real file once, and what it leaves out."""

import collections
import glob
import itertools
import os
import re
from collections.abc import Container, Iterator

from plaingpt.console import UserError, closest, counted
from plaingpt.text.readers import File, kind_of
from plaingpt.text.streams import ReadOptions, open_utf8
from plaingpt.tokens import NAMED

HEAD = 8000  # bytes in which a NUL makes a file binary, as in git
OFTEN_NOT_DOCUMENTS = ("JSON", "CSV", "TSV")  # settings and tables as well as texts


def walk(folder: str, left_out: Container[str] = ("node_modules",), entered: set | None = None) -> Iterator[str]:
    """The files in a folder and below, except hidden ones. Links are followed; no folder is entered twice."""
    entered, status = set() if entered is None else entered, os.stat(folder)
    if (status.st_dev, status.st_ino) in entered:
        return
    entered.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:  # not os.walk, which ignores a folder that cannot be read
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
        raise UserError(f"{word}: no such file, folder or source{closest(word, NAMED)}")


def _matches(pattern: str) -> Iterator[str]:
    """What a glob matches. Below ** the walk decides, so that a circle of links ends."""
    if "**" not in pattern:
        yield from glob.iglob(pattern)
        return
    start = os.path.dirname(pattern.partition("**")[0])
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", os.path.relpath(pattern, start or os.curdir).replace(os.sep, "/"))
    fits = re.compile("".join(rules.get(part) or re.escape(part) for part in parts)).fullmatch
    for folder in filter(os.path.isdir, glob.iglob(start or os.curdir)):
        yield from (path for path in walk(folder) if fits(os.path.relpath(path, folder).replace(os.sep, "/")))


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
    if head.startswith((b"%PDF-", b"{\\rtf")):
        kind = "PDF" if head.startswith(b"%") else "RTF"
    elif b"\0" in head:
        kind = "binary file"
    else:
        return None
    if is_named and options.bad_files != "skip":
        hint = "if it is UTF-16, name the --encoding" if kind == "binary file" else "convert it to text first"
        raise UserError(f"{path} is not text ({kind}): {hint}, or leave it out: --bad_files=skip")
    return kind
