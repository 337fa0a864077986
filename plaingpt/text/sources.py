"""Where documents come from: named sources, Hugging Face data sets, standard input, and any files of text."""

import collections
import dataclasses
import glob
import hashlib
import itertools
import os
import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from plaingpt.console import UserError, closest, counted, errors_of_library, note
from plaingpt.files import SUMS, new_file, sha256
from plaingpt.text.config import PrepareConfig
from plaingpt.text.readers import File, HubShard, NotDocuments, kind_of
from plaingpt.text.streams import open_utf8
from plaingpt.tokens import NAMED

HEAD = 8000  # bytes in which a NUL makes a file binary, as in git
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
HUB = {  # repository, share for validation, and what is pinned
    "tinystories": ("roneneldan/TinyStories", 0.01, {}),
    # the revision that has Parquet files instead of a script
    "openwebtext": ("Skylion007/openwebtext", 0.0005, {"revision": "79d93d786212f7344586290adb811d4ae6a1762c"}),
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", 0.0005, {"config": "sample-10BT"}),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in files or in a Hugging Face data set, and what suits them."""

    name: str
    description: str
    files: tuple[File, ...] = ()
    dataset: Any = None
    tokenizer: str = "gpt2"
    val_fraction: float = 0.05
    bad_files: str = "stop"
    fetch: Callable[[Path], Path] | None = None  # returns the only file, after downloading or copying it
    once: bool = False  # it cannot be read again later

    def fetched(self, directory: Path, config: PrepareConfig) -> "Source":
        if not self.fetch:
            return self
        path = str(self.fetch(directory))
        if self.once:
            check_is_text(path, config, self.description, "convert it to text, or name its --encoding")
        return dataclasses.replace(self, files=(File.at(path),))

    def inputs(self) -> list[File | HubShard]:
        """What is read one after another, in an order that depends on the source alone."""
        if self.dataset is None:
            return list(self.files)
        shards = getattr(self.dataset, "num_shards", None)  # a data set on disk has none
        if shards is None:
            shards = max(1, min(len(self.dataset), (self.dataset.dataset_size or 0) >> 23))
        return [HubShard(self.description, number, shards, self.dataset) for number in range(shards)]

    def texts(self, config: PrepareConfig) -> Iterator[str]:
        """The documents; a large text file in pieces."""
        for text_input in self.inputs():
            yield from (text.data.decode() for text in text_input.texts(config))


def find_source(config: PrepareConfig, json_lines: bool = False) -> Source:
    """The source that the command line names. json_lines: read standard input as JSON Lines."""
    wanted = config.sources
    try:
        "".encode(config.encoding or "utf-8")
    except (LookupError, ValueError) as error:
        examples = "latin-1, cp1252, utf-16-le, gb18030"
        raise UserError(f"--encoding={config.encoding}: unknown; examples: {examples}") from error
    named = next((w for w in wanted if w == "-" or w.startswith("hf:") or (w in NAMED and not os.path.exists(w))), None)
    if named and len(wanted) > 1:
        raise UserError(f"{named} cannot be combined with other sources: prepare each by itself, with its own --name")
    if not wanted:
        others = "files, directories and globs of text, or hf:owner/name"
        raise UserError(f"name a source: one of {', '.join(NAMED)}, or {others}")
    if named == "-":
        path = "stdin.jsonl" if json_lines else "stdin.txt"
        return Source("stdin", "standard input", fetch=lambda directory: _standard_input(directory / path), once=True)
    if named == "python":
        return Source("python", "python", _python_files(), tokenizer="bpe", bad_files="skip")
    if named in ("shakespeare", "shakespeare_char"):
        kind = "char" if named == "shakespeare_char" else "gpt2"
        return Source(named, named, fetch=_shakespeare, tokenizer=kind, val_fraction=0.1)
    if named:
        return _hub(named, config)
    wanted = [str(Path(word)) for word in wanted]  # unlike normpath, keeps `..`, which may follow a link
    name = re.sub(r"[^\w-]+", "_", Path(wanted[0]).stem.partition(".")[0]).strip("_-") or "text"
    return Source(name, shlex.join(wanted), find_files(wanted, config))


def find_files(words: list[str], config: PrepareConfig) -> tuple[File, ...]:
    """The files that are read, each once, in the order of their paths. Prints how many are read and left out."""
    given = {word for word in words if os.path.isfile(word)}
    found = {str(Path(path)) for word in words for path in _matches(word)}
    # by inode and device: each file once, whatever links there are; some file systems give 0 for every inode
    by_inode = {(os.stat(path).st_dev, os.stat(path).st_ino or path): path for path in sorted(found, reverse=True)}
    paths = sorted(by_inode.values(), key=lambda path: path.split(os.sep))
    reasons = {path: why_skipped(path, config, path in given) for path in paths}
    skipped = [reason for reason in reasons.values() if reason]
    files = tuple(File.at(path) for path, reason in reasons.items() if not reason)

    def listed(kinds: Iterable[str]) -> str:
        return ", ".join(f"{n:,} {kind}" for kind, n in collections.Counter(kinds).most_common())

    left_out = f"{len(skipped):,} skipped: {listed(skipped)}"
    if not files:
        raise UserError(f"{' '.join(words):.300}: {left_out}")
    read = f"reading {counted(len(files), 'file')}: {listed(kind_of(file.path) for file in files)}"
    note(f"{read}; {left_out}" if skipped else read)
    return files


def _matches(word: str) -> Iterable[str]:
    """The files of a word of the command line."""
    found = [word] if os.path.exists(word) else glob.glob(word, recursive=True)
    if files := [*filter(os.path.isfile, found), *itertools.chain(*map(walk, filter(os.path.isdir, found)))]:
        return files
    if found:
        pipe = os.path.exists(word) and not os.path.isdir(word)
        raise UserError(f"{word}: no files there" + ("; a pipe is read with -, from standard input" if pipe else ""))
    hub = f"; did you mean hf:{word}?" if re.fullmatch(r"[\w.-]+/[\w.-]+", word) else ""
    raise UserError(f"{word}: no such file, directory or source{closest(word, NAMED) or hub}")


def walk(directory: str, left_out: Container[str] = ("node_modules",)) -> Iterator[str]:
    """The files in a directory and below, except hidden ones. Links are followed; no directory is entered twice."""
    entered, to_enter = set(), [directory]
    while to_enter:
        real = os.path.realpath(folder := to_enter.pop())
        if real not in entered:
            entered.add(real)
            os.stat(os.path.join(folder, "."))  # without permission to enter it, isfile and isdir would return False
            names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
            yield from filter(os.path.isfile, (os.path.join(folder, name) for name in names))  # no pipe or broken link
            folders = (os.path.join(folder, name) for name in reversed(names) if name not in left_out)
            to_enter += filter(os.path.isdir, folders)


def why_skipped(path: str, config: PrepareConfig, is_named: bool) -> str | None:
    """Why a file is skipped, or None if it is read. UserError if it must not be skipped: it was named on the command
    line, or contains the column but cannot be read."""
    kind = kind_of(path)
    if os.path.basename(path) == SUMS and not is_named:
        return "checksums"  # of a data set or a model
    try:
        if kind == "text":
            remedy = "convert it to text, name its --encoding, or leave it out: --bad_files=skip"
            check_is_text(path, config, path, remedy)
        # JSON and tables are often something else, such as settings; JSON Lines and Parquet seldom
        elif kind in ("json", "csv", "tsv") or config.bad_files == "skip":
            next(File.at(path).texts(dataclasses.replace(config, bad_files="replace")), None)
    except UserError as error:
        maybe_text = kind != "text" and not isinstance(error, NotDocuments)  # skipping it could lose text
        if config.bad_files != "skip" and (is_named or maybe_text):
            raise
        other = f" or not {config.encoding}" if config.encoding else ""
        return f"binary{other}" if kind == "text" else f"{kind} damaged{other} or without {config.column!r} (--column)"
    return None


def check_is_text(path: str, config: PrepareConfig, name: str, remedy: str) -> None:
    """UserError if the file is binary."""
    with open_utf8(path, config) as (_, stream):
        head = stream.read(HEAD)
    if b"\0" in head or head.startswith((b"%PDF-", b"{\\rtf")):
        raise UserError(f"{name} is binary, not text: {remedy}")


def _hub(named: str, config: PrepareConfig) -> Source:
    """A data set of the Hugging Face hub, or a local directory of that form."""
    import datasets
    import huggingface_hub

    repository, val_fraction, pinned = HUB.get(named) or (named.removeprefix("hf:").rstrip("/"), 0.01, {})
    configuration, revision = (getattr(config, key) or pinned.get(key) for key in ("config", "revision"))
    with errors_of_library(f"hf:{repository} cannot be opened"):  # no such repository or split, no network, scripts, …
        local = Path(repository).is_dir()
        if local:  # names, sizes and times stand for a revision: a changed directory is another source
            files = sorted(File.at(path) for path in walk(repository))
            revision = hashlib.sha256(repr(files).encode()).hexdigest()[:40]
        elif not re.fullmatch("[0-9a-f]{40}", revision or ""):  # every process and machine reads the same revision
            revision = huggingface_hub.HfApi().dataset_info(repository, revision=revision).sha
        options = {"split": config.split, "revision": None if local else revision}
        options["streaming"] = "[" not in config.split  # what train[:10%] stands for is not known before the download
        dataset = datasets.load_dataset(repository, configuration, **options)
        if dataset.info.builder_name == "text":  # `datasets` makes a document of every line
            download = f"(from the hub: hf download {repository} --repo-type=dataset --local-dir=DIR)"
            raise UserError(f"hf:{repository} consists of text files: name their directory, without hf: {download}")
        if config.column in (dataset.column_names or ()):
            dataset = dataset.select_columns([config.column])
    flags = {"config": configuration, "split": config.split, "revision": revision}
    words = [f"hf:{repository}", *(f"--{key}={value}" for key, value in flags.items() if value)]
    name = named if named in HUB else Path(repository).name
    return Source(name, shlex.join(words), dataset=dataset, val_fraction=val_fraction)


def _python_files() -> tuple[File, ...]:
    """Python's standard library without its tests."""
    found = walk(sysconfig.get_path("stdlib"), {"site-packages", "dist-packages", "test", "tests", "idle_test"})
    files = [path for path in found if path.endswith(".py")]
    return tuple(File.at(path) for path in sorted(files, key=lambda path: path.split(os.sep)))


def _standard_input(path: Path) -> Path:
    with new_file(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path


def _shakespeare(directory: Path) -> Path:
    path = directory.parent / ".downloads" / "tinyshakespeare.txt"  # in data_dir
    path.parent.mkdir(exist_ok=True)
    problem = f"{SHAKESPEARE_URL} cannot be downloaded (try again, or put it at {path})"
    # Two data sets are made from it, perhaps at the same time: neither may replace what the other one reads.
    with FileLock(path.with_suffix(".lock")), errors_of_library(problem):
        if not path.exists() or sha256(path) != SHAKESPEARE_SHA256:
            import urllib.request  # slow to import

            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:
                data = response.read()
            if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
                raise OSError(f"the {len(data):,} bytes received are not the expected file")
            with new_file(path, "wb") as file:
                file.write(data)
    return path
