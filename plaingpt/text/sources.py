"""Where documents come from: named sources, Hugging Face data sets, standard input, and any files of text."""

import codecs
import dataclasses
import functools
import glob
import hashlib
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from plaingpt.console import UserError, closest, note, one_line
from plaingpt.text import arrow
from plaingpt.text.readers import (
    COMPRESSED,
    JSON_LINES,
    LARGE,
    WHOLE,
    File,
    Item,
    Lines,
    Rows,
    Shard,
    TextFile,
    TextPart,
    checked_text,
    split_of,
)
from plaingpt.tokens import NAMED

CACHE = Path(__file__).parents[2] / "data" / ".downloads"
HUB = {  # repository, share for validation, and what is pinned
    "tinystories": ("roneneldan/TinyStories", 0.01, {}),
    # the revision that has Parquet files in place of a script
    "openwebtext": ("Skylion007/openwebtext", 0.0005, {"revision": "79d93d786212f7344586290adb811d4ae6a1762c"}),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", 0.0005, {"config": "sample-10BT"}),
}


@dataclass(frozen=True)
class Source:
    """Documents in files or in a Hugging Face data set, how they are to be read, and what suits the text."""

    name: str
    description: str
    column: str
    bad_files: str
    files: tuple[File, ...] = ()
    dataset: Any = None
    tokenizer: str = "gpt2"
    val_fraction: float = 0.05
    fetch: Callable[[Path], Path] | None = None  # makes the one file, in the given folder or where it is kept

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self.files)

    def items(self, unit_bytes: int, by_content: bool = True, dedup: bool = False) -> Iterator[Item]:
        """What can be read apart, in an order and of sizes that depend on the source alone."""
        if self.dataset is not None:
            shards = getattr(self.dataset, "num_shards", None)  # one that is on disk already has none
            if shards is None:
                shards = max(1, min(len(self.dataset), (self.dataset.dataset_size or 0) // unit_bytes))
            yield from (Shard(self.description, index, shards, self.dataset) for index in range(shards))
        seen = set() if dedup else None
        for file in self.files:
            if file.size <= LARGE or self.bad_files != "skip" or _is_text(file):
                yield from file_items(file, unit_bytes, self.val_fraction, by_content, seen)

    def texts(self) -> Iterator[bytes]:
        """The documents, for a look at them. A large file comes in pieces."""
        for item in self.items(1 << 62):
            for documents in item.documents(self.column, self.bad_files):
                yield from documents.texts

    def count_documents(self, most: int) -> int:
        """How many there are, up to `most`; no text file is read for it."""
        found = 0
        for item in self.items(1 << 62, by_content=False):
            if isinstance(item, TextFile | TextPart):
                counts = [isinstance(item, TextFile) or item.split == "train"]
            else:
                counts = (len(documents.texts) for documents in item.documents(self.column, self.bad_files))
            for count in counts:
                if (found := found + count) >= most:
                    return most
        return found

    def fetched(self, directory: Path) -> "Source":
        """The same with its file at hand: downloaded, or standard input copied to `directory`."""
        return dataclasses.replace(self, files=(File.at(str(self.fetch(directory))),)) if self.fetch else self


def find_source(wanted: list[str], options: Any, json_lines: bool = False) -> Source:
    """The source that the words of the command line name. `options`: prepare_data's settings."""
    named = next((w for w in wanted if w == "-" or w.startswith("hf:") or (w in NAMED and not Path(w).exists())), None)
    if named and len(wanted) > 1:
        others = " ".join(word for word in wanted if word != named)
        raise UserError(f"{named} is a source of its own: prepare it without {others}")
    if not wanted:
        raise UserError(
            f"name a source: one of {', '.join(NAMED)}, or files, folders and globs of text, or hf:owner/name"
        )
    if options.site_packages and named != "python":
        raise UserError("--site_packages goes with the source python only")
    reading = {"column": options.column, "bad_files": options.bad_files}
    if named == "-":
        path = "stdin.jsonl" if json_lines else "stdin.txt"
        return Source("stdin", "standard input", fetch=lambda folder: _standard_input(folder / path), **reading)
    if named == "python":
        files = _python_files(options.site_packages)
        return Source("python", "python", files=files, tokenizer="bpe", **reading | {"bad_files": "skip"})
    if named in ("shakespeare", "shakespeare_char"):
        kind = "char" if named == "shakespeare_char" else "gpt2"
        return Source(named, named, fetch=_shakespeare, tokenizer=kind, val_fraction=0.1, **reading)
    if named:
        repository, val_fraction, pinned = HUB.get(named) or (named.removeprefix("hf:").rstrip("/"), 0.01, {})
        name = named if named in HUB else Path(repository).name
        return _hub(repository, name, val_fraction, options, reading, pinned)
    paths = {os.path.normpath(path) for word in wanted for path in _files(word)}
    files = tuple(File.at(path) for path in sorted(paths, key=_parts))
    if not files:
        raise UserError(f"{' '.join(wanted)}: no files there")
    return Source(Path(wanted[0]).stem.split(".")[0] or "text", shlex.join(wanted), files=files, **reading)


def _hub(repository: str, name: str, val_fraction: float, options: Any, reading: dict, pinned: dict) -> Source:
    """A data set of the Hugging Face hub, or a local folder of that form."""
    import datasets
    import huggingface_hub

    config, revision = (getattr(options, key) or pinned.get(key) for key in ("config", "revision"))
    try:
        local = Path(repository).is_dir()
        if local:  # a name for its state: work that was begun with another is not gone on with
            files = [File.at(path) for path in sorted(_below(repository))]
            revision = hashlib.sha256(repr(files).encode()).hexdigest()[:40]
        elif not re.fullmatch("[0-9a-f]{40}", revision or ""):  # every process and machine reads the same state of it
            revision = huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
        dataset = datasets.load_dataset(
            repository, config, split=options.split, revision=None if local else revision, streaming=options.streaming
        )
        if options.column in (dataset.column_names or ()):
            dataset = dataset.select_columns([options.column])
    except Exception as error:  # of any library below: no such repository, split or configuration, no network, scripts
        raise UserError(f"hf:{repository} cannot be opened: {one_line(error)}") from error
    flags = {"config": config, "split": options.split, "revision": revision}
    words = [f"hf:{repository}", *(f"--{key}={value}" for key, value in flags.items() if value)]
    return Source(name, shlex.join(words), dataset=dataset, val_fraction=val_fraction, **reading)


def file_items(file: File, unit_bytes: int, val_fraction: float, by_content: bool, seen: set | None) -> Iterator[Item]:
    """The items of a file, each of about `unit_bytes` where the file can be parted.

    A large text file goes to one split `by_content`, or its tail goes to validation. One whose digest has been
    `seen` has no items.
    """
    path, size, _ = file
    if path.endswith(".parquet"):
        yield from _row_items(file, unit_bytes)
    elif path.endswith(COMPRESSED):
        yield Lines(file, 0, WHOLE)
    elif path.endswith(JSON_LINES):
        for start in range(0, size, unit_bytes):
            yield Lines(file, start, min(start + unit_bytes, size))
    elif size > LARGE:
        border = int(size * (1 - val_fraction))
        ranges = [("train", 0, border), ("val", border, size)]
        if by_content or seen is not None:
            import xxhash  # train.py, which imports this module, does without

            with open(path, "rb") as opened:
                digest = hashlib.file_digest(opened, xxhash.xxh3_64).intdigest()
            if seen is not None:
                if digest in seen:
                    return
                seen.add(digest)
            if by_content:
                ranges = [(split_of(digest, val_fraction), 0, size)]
        for split, start, stop in ranges:
            for begin in range(start, stop, unit_bytes):
                yield TextPart(file, begin, min(begin + unit_bytes, stop), split, first=begin == start)
    elif size:
        yield TextFile(file)


@functools.cache
def _is_text(file: File) -> bool:
    """Whether a large file can be read; a note where not. Its parts, once they are written, cannot be left out."""
    if file.path.endswith((".parquet", *COMPRESSED, *JSON_LINES)):
        return True
    try:
        for _ in TextPart(file, 0, file.size, "train", first=False).documents("", "stop"):
            pass
    except UserError as error:
        note(f"skipped: {str(error).partition('; leave it out')[0]}")
        return False
    return True


def _row_items(file: File, unit_bytes: int) -> Iterator[Rows]:
    with arrow.open_parquet(file.path) as parquet:
        sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
    start = size = 0
    for i, of_group in enumerate(sizes, 1):
        size += of_group
        if i == len(sizes) or size >= unit_bytes:
            yield Rows(file, start, i, size)
            start, size = i, 0


def read_text(path: Path) -> str:
    """The text of a UTF-8 file of any size, for a prompt say; UserError if it is no text."""
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        return checked_text(data, str(path), bad_files="refuse", binary=True).decode()
    except OSError as error:
        raise UserError(one_line(error)) from error


def download(url: str, path: Path, size: int, sha256: str, timeout: float = 30) -> Path:
    """`path`, downloaded if it is not there yet; kept only if size and checksum are right."""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    import http.client
    import urllib.request  # slow, and needed here alone

    instead = f"fetch it by other means and put it at {path}"
    data = bytearray()
    try:
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], disable=None)
        with bar, urllib.request.urlopen(url, timeout=timeout) as response:
            while len(data) <= size and (chunk := response.read(1 << 16)):
                data += chunk
                bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answered {error.code} {error.reason}; {instead}") from error
    except (OSError, http.client.HTTPException) as error:  # no network, refused, timed out, broken off
        raise UserError(f"{url} cannot be downloaded ({getattr(error, 'reason', error)}); {instead}") from error
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{url} gave {len(data):,} bytes that are not the expected file; try again, or {instead}")
    partial = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(data)
    return partial.replace(path)


def _files(word: str) -> Iterator[str]:
    if os.path.isdir(word):
        yield from _below(word)
    elif os.path.isfile(word):
        yield word
    elif matches := glob.glob(word, recursive=True):
        yield from (match for match in matches if os.path.isfile(match))
    else:
        raise UserError(f"{word}: no such file, folder or source{closest(word, NAMED)}")


def _parts(path: str) -> list[str]:
    return path.split(os.sep)  # a folder's files stay together, whatever signs come before the separator


def _below(folder: str, left_out: frozenset[str] = frozenset()) -> Iterator[str]:
    """The files in a folder and its folders, but for hidden ones and those below a folder named in `left_out`."""
    for entry in os.scandir(folder):  # not os.walk: it passes over a folder that may not be read
        if not entry.name.startswith(".") and entry.name not in left_out:
            deeper = entry.is_dir(follow_symlinks=False)
            yield from _below(entry.path, left_out) if deeper else filter(os.path.isfile, [entry.path])


def _python_files(site_packages: bool) -> tuple[File, ...]:
    """Python's own library without its tests and, where asked for, every installed package."""
    paths = sysconfig.get_paths()
    left_out = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
    found = list(_below(paths["stdlib"], left_out))
    if site_packages:
        found += [path for folder in {paths["purelib"], paths["platlib"]} for path in _below(folder)]
    return tuple(File.at(path) for path in sorted(found, key=_parts) if path.endswith(".py"))


def _standard_input(path: Path) -> Path:
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path


def _shakespeare(_: Path) -> Path:
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    digest = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    return download(url, CACHE / "tinyshakespeare.txt", size=1_115_394, sha256=digest)
