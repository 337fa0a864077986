"""Token files: raw ids in train.bin and val.bin, and meta.json, which says what they are."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plaingpt.console import UserError
from plaingpt.files import check_sums, existing
from plaingpt.tokenizer import Tokenizer, gpt2

FORMAT_VERSION = 1
SPLITS = ("train", "val")
# What prepare_data.py knows by name
NAMED = ("python", "shakespeare", "shakespeare_char", "tinystories", "openwebtext", "fineweb_edu", "fineweb10B-gpt2")
STAMP = ".checked"  # the end of the name of a file that says in which state another was checked
LLM_C_HEADER, LLM_C_MAGIC = 1024, 20240520  # bytes before the ids, and the first of their 256 int32
CHUNK = 1 << 22  # ids read at a time from a file that is read through


def id_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class DataSet:
    """A prepared data set, opened: its two splits, its tokenizer, and a digest that names its content."""

    train: "Tokens"
    val: "Tokens"
    tokenizer: Tokenizer
    digest: str


class Tokens:
    """One split as an endless ring of ids: after the last comes the first."""

    def __init__(self, files: list[np.ndarray], n_bytes: int | None = None):
        self._files = [np.asarray(file) for file in files if len(file)]  # slicing a memmap is slow
        self._ends = np.cumsum([len(file) for file in self._files])
        self._views = functools.lru_cache(4)(self._windows_of_files)
        self.n_bytes = n_bytes  # of the text, or None where it is not known

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy the ids from position `start` on into `out`."""
        filled = 0
        while filled < len(out):
            position = (start + filled) % len(self)
            shard = int(np.searchsorted(self._ends, position, side="right"))
            left = int(self._ends[shard]) - position
            part = self._files[shard][len(self._files[shard]) - left :][: len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The ids from each of `starts` on, (len(starts), length) int64: one gather a file."""
        views, places = self._views(length), starts % len(self)
        if len(views) == 1 and places.max() < len(views[0]):
            return views[0][places].astype(np.int64)
        out = np.empty((len(starts), length), np.int64)
        files = np.searchsorted(self._ends, places, side="right")
        places -= (self._ends - [len(file) for file in self._files])[files]
        for i in set(files.tolist()):
            rows = (files == i) & (places < len(views[i]))
            out[rows] = views[i][places[rows]]
            for row in np.flatnonzero((files == i) & ~rows):  # goes on in the next file
                self.read(int(starts[row]), out[row])
        return out

    def _windows_of_files(self, length: int) -> list[np.ndarray]:
        """Every window of each file, as views."""
        view = np.lib.stride_tricks.sliding_window_view
        none = np.empty((0, length), np.uint16)
        return [view(file, length) if len(file) >= length else none for file in self._files]

    def all(self) -> Iterable[np.ndarray]:
        """The files' ids, in pieces of bounded size."""
        return (file[i : i + CHUNK] for file in self._files for i in range(0, len(file), CHUNK))


def how_to_get(name: str) -> str:
    """The command that makes the data set `name`."""
    return f"python prepare_data.py {name if name in NAMED else f'FILES --name={name}'}"


def open_data_set(directory: Path, check: bool = True, again: bool = False) -> DataSet:
    """Open data/<name>. With `check`, every byte is compared with meta.json, once for each state of a file, or `again`.

    nanoGPT's folders, train.bin and val.bin alone, are read as GPT-2 tokens, and so are llm.c's shards.
    """
    found = existing(directory)
    if found is None:
        raise UserError(f"{directory}: no such data set; to get it: {how_to_get(Path(directory).name)}")
    directory = found
    if again:
        for stamp in directory.glob(f"*{STAMP}"):
            stamp.unlink()
    meta_path = directory / "meta.json"
    if not meta_path.is_file():
        return _open_foreign(directory, check)
    check_sums(directory)
    try:
        meta = json.loads(meta_path.read_bytes())
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"{meta_path}: format version {meta['format_version']}, this is for {FORMAT_VERSION}")
        vocab_size = int(meta["vocab_size"])
        dtype = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}[meta["dtype"]]
        splits = {split: meta["splits"][split] for split in ("train", "val")}
        tokens = {
            split: [(Path(f["name"]).name, int(f["tokens"]), str(f["sha256"])) for f in splits[split]["files"]]
            for split in splits
        }
        n_bytes = {split: int(splits[split]["bytes"]) for split in splits}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{meta_path} is damaged ({type(error).__name__}: {error}); prepare the data again") from error
    tokenizer = Tokenizer.load(directory)
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f"{directory}: tokenizer.json has {tokenizer.vocab_size} ids, meta.json says {vocab_size}")
    opened = {
        split: Tokens([_open_ids(directory / name, dtype, n) for name, n, _ in tokens[split]], n_bytes[split])
        for split in tokens
    }
    if check:
        for name, _, digest in (file for split in tokens.values() for file in split):
            _check_file(directory / name, dtype, vocab_size, digest)
    digests = "".join(digest for split in tokens.values() for _, _, digest in split)
    digest = hashlib.sha256(digests.encode()).hexdigest()
    return DataSet(opened["train"], opened["val"], tokenizer, digest)


def _open_foreign(directory: Path, check: bool) -> DataSet:
    """GPT-2 tokens that others prepared: nanoGPT's train.bin and val.bin, or llm.c's shards with their header."""
    if (directory / "meta.pkl").exists():
        raise UserError(
            f"{directory}/meta.pkl is a pickle, which can run code: it is not read; "
            f"prepare the text again: python prepare_data.py FILES --tokenizer=char --name={directory.name}"
        )
    if any(directory.glob("tokenizer*.json")):  # ours: as GPT-2's its ids would mean something else
        again = how_to_get(directory.name)
        raise UserError(f"{directory} has lost its meta.json: remove the folder and prepare the text again: {again}")
    paths = {split: [directory / f"{split}.bin"] for split in SPLITS}
    header = 0
    if not any(path.exists() for (path,) in paths.values()):
        paths = {split: sorted(directory.glob(f"*{split}*.bin")) for split in SPLITS}
        header = LLM_C_HEADER
    if not all(path.exists() for split in SPLITS for path in paths[split]) or not all(paths.values()):
        raise UserError(
            f"{directory} is not a prepared data set: it has neither meta.json, nor train.bin and val.bin, "
            "nor shards of llm.c named train and val"
        )
    tokenizer, dtype = gpt2(), np.dtype("<u2")
    sizes = {path: _llm_c_tokens(path) if header else None for split in SPLITS for path in paths[split]}
    if check:
        for path in sizes:
            _check_file(path, dtype, tokenizer.vocab_size, None, header)
    train, val = (Tokens([_open_ids(path, dtype, sizes[path], header) for path in paths[split]]) for split in SPLITS)
    lengths = tokenizer.byte_lengths()
    val.n_bytes = sum(int(lengths[ids].sum()) for ids in val.all())
    digest = " ".join(str(len(split)) for split in (train, val))
    return DataSet(train, val, tokenizer, hashlib.sha256(digest.encode()).hexdigest())


def _llm_c_tokens(path: Path) -> int:
    """How many tokens the header of llm.c's shard announces."""
    header = np.fromfile(path, "<i4", LLM_C_HEADER // 4)
    if len(header) < LLM_C_HEADER // 4 or header[0] != LLM_C_MAGIC or header[1] != 1:
        raise UserError(f"{path} does not begin with the header of llm.c's GPT-2 shards ({LLM_C_MAGIC}, version 1)")
    return int(header[2])


def _open_ids(path: Path, dtype: np.dtype, tokens: int | None, header: int = 0) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path} is missing; prepare the data again")
    size = path.stat().st_size - header
    found = size // dtype.itemsize
    if size % dtype.itemsize or (tokens is not None and found != tokens):
        expected = "whole ids" if tokens is None else f"the {tokens:,} ids that were written"
        raise UserError(f"{path} was cut or changed: its {size:,} bytes are not {expected}; prepare the data again")
    return np.memmap(path, dtype, mode="r", offset=header) if found else np.zeros(0, dtype)


def _check_file(path: Path, dtype: np.dtype, vocab_size: int, digest: str | None, header: int = 0) -> None:
    """Compare the file with its checksum and its ids with the vocabulary; a stamp beside it saves the next reading."""
    status = path.stat()
    stamp = path.with_name(path.name + STAMP)
    state = f"{status.st_size} {status.st_mtime_ns} {vocab_size} {digest}"
    if stamp.is_file() and stamp.read_text(errors="replace") == state:
        return
    found = hashlib.sha256()
    ids = _open_ids(path, dtype, None, header)
    for i in range(0, len(ids), CHUNK):
        chunk = ids[i : i + CHUNK]
        found.update(chunk)
        if chunk.max() >= vocab_size:
            raise UserError(f"{path} has the id {chunk.max()}, but the vocabulary ends at {vocab_size - 1}")
    if digest is not None and found.hexdigest() != digest:
        raise UserError(f"{path} was changed since meta.json was written; prepare the data again")
    with contextlib.suppress(OSError):  # a read-only folder: the check is simply made again next time
        stamp.unlink(missing_ok=True)  # whatever it is, a link say: only a file of our own is written
        with open(stamp, "x") as file:
            file.write(state)
