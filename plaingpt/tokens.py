"""Token files: raw ids in train.bin and val.bin, described by meta.json.

What opening a data set guarantees: each file has the size and the dtype that meta.json gives; data sets of at most
HASHED bytes are compared with their checksums each time, which takes a fraction of a second; and no id outside the
vocabulary ever reaches a model, because ids are checked as they are read. A larger corpus therefore opens at once,
and a change of its bytes into other valid ids is detected only by tools/inspect_data.py, which reads everything.
"""

import bisect
import hashlib
import itertools
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plaingpt.console import UserError, errors_of_library, note
from plaingpt.files import check_sums, existing, read_json
from plaingpt.tokenizer import Tokenizer, gpt2

FORMAT_VERSION = 1
SPLITS = ("train", "val")
# Data sets that prepare_data.py knows by name
NAMED = ("python", "shakespeare", "shakespeare_char", "tinystories", "openwebtext", "fineweb_edu")
HASHED = 256 << 20  # bytes; SHA-256 takes about half a second for them
CHUNK = 1 << 22  # ids read at a time from a file that is read from beginning to end
SAMPLE = 1 << 16  # ids at the beginning of a file of unknown dtype that are looked at
# llm.c's shards: 256 int32 before the ids, of which the first three are magic number, version and number of tokens
LLM_C_HEADER, LLM_C_GPT2 = 1024, 20240520
LLM_C_NAME = re.compile(r"(?:.*[_-])?(train|val)(?:[_-]\d+)?\.bin")  # not `medieval`, which contains "val"


def id_dtype(largest_id: int) -> np.dtype:
    """The type of token files. A vocabulary with gaps has larger ids than it has tokens."""
    return np.dtype("<u2" if largest_id < 1 << 16 else "<u4")


@dataclass(frozen=True)
class DataSet:
    """A prepared data set: its two splits, its tokenizer, and a digest of its content (without a meta.json, of its
    lengths only)."""

    train: "Tokens"
    val: "Tokens"
    tokenizer: Tokenizer
    digest: str


class Tokens:
    """One split as a ring of ids: after the last id comes the first again. UserError if an id is not in the vocabulary.

    n_bytes: bytes of the text, or None if unknown.
    """

    def __init__(self, files: list[np.ndarray], n_bytes: int | None = None, vocab_size: int = 1 << 32):
        self._files = [np.asarray(file) for file in files if len(file)]  # slicing a memmap is slow
        self._ends = list(itertools.accumulate(map(len, self._files)))
        self.n_bytes, self._vocab_size = n_bytes, vocab_size

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` ids from each position on: (len(starts), length) int64."""
        windows = np.empty((len(starts), length), np.int64)
        for window, start in zip(windows, starts.tolist()):
            filled = 0
            while filled < length:
                position = (start + filled) % len(self)
                i = bisect.bisect_right(self._ends, position)
                ids = self._files[i][position - self._ends[i] :][: length - filled]  # counted from the file's end
                window[filled : filled + len(ids)] = ids
                filled += len(ids)
        return _check_ids("the data set", windows, self._vocab_size)

    def all(self) -> Iterable[np.ndarray]:
        """All ids in order, in arrays of bounded size."""
        chunks = (file[i : i + CHUNK] for file in self._files for i in range(0, len(file), CHUNK))
        return (_check_ids("the data set", ids, self._vocab_size) for ids in chunks)


def data_dir_flag(directory: Path) -> str:
    """The --data_dir of a data set, unless it is the default."""
    return "" if directory.parent == Path("data") else f" --data_dir={shlex.quote(str(directory.parent))}"


def how_to_get(directory: Path) -> str:
    """What to do about a missing data set: finish it, correct its name, or download or prepare it."""
    name, above = directory.name, directory.parent.parent / directory.name  # above: --dataset=data/books
    if directory.with_name(f".{name}.partial").joinpath("plan.json").exists():
        return "its preparation is unfinished: run the same prepare_data.py command again (for each --part)"
    if any(LLM_C_NAME.fullmatch(path.name) for path in above.glob("*.bin")):
        return f"did you mean --dataset={name}{data_dir_flag(above)}?"
    if name == "fineweb10B-gpt2":  # llm.c's token files
        return f"to get it: hf download kjj0/{name} --repo-type=dataset --local-dir={shlex.quote(str(directory))}"
    source = name if name in NAMED else f"FILES --name={shlex.quote(name)}"
    return f"to get it: python prepare_data.py {source}{data_dir_flag(directory)}"


def open_data_set(directory: Path, check: bool = True, check_all: bool = False) -> DataSet:
    """Open data/<name>: ours, with meta.json, or GPT-2 tokens from nanoGPT or llm.c.

    With `check`, files are compared with their checksums if they have at most HASHED bytes, with `check_all` always.
    """
    found = existing(directory)
    if found is None:
        others = sorted(path.parent.name for path in directory.parent.glob("[!.]*/meta.json"))
        there = f"; available: {', '.join(others[:20])}" if others else ""
        raise UserError(f"{directory}: no such data set; {how_to_get(directory)}{there}")
    if not (found / "meta.json").exists():
        return _open_foreign(found, check_all)
    check_sums(found)
    meta = read_json(found / "meta.json")
    tokenizer = Tokenizer.load(found)
    with errors_of_library(f"{found}/meta.json is damaged; prepare the data again"):
        if meta["format_version"] != FORMAT_VERSION:
            raise UserError(f"{found}/meta.json: format version {meta['format_version']}, expected {FORMAT_VERSION}")
        vocab_size = int(meta["vocab_size"])
        dtype = {"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]]
        splits = [meta["splits"][split] for split in SPLITS]
        # Of each split, the number of ids and the checksum of each file
        files = [
            {found / Path(file["name"]).name: (int(file["tokens"]), str(file["sha256"])) for file in split["files"]}
            for split in splits
        ]
        n_bytes = [int(split["bytes"]) for split in splits]
    if vocab_size not in (tokenizer.vocab_size, len(tokenizer.vocabulary())):  # these two differ if ids have gaps
        raise UserError(f"{found}: tokenizer.json has {tokenizer.vocab_size} ids, but meta.json says {vocab_size}")
    of_file = files[0] | files[1]
    ids = {path: _open_ids(path, np.dtype(dtype), tokens) for path, (tokens, _) in of_file.items()}
    if check_all or (check and sum(array.nbytes for array in ids.values()) <= HASHED):
        for path, (_, digest) in of_file.items():
            if hashlib.sha256(ids[path]).hexdigest() != digest:
                raise UserError(f"{path} has changed since meta.json was written; prepare the data again")
            _check_ids(path, ids[path], tokenizer.vocab_size)
    train, val = (Tokens([ids[path] for path in of], n, tokenizer.vocab_size) for of, n in zip(files, n_bytes))
    digest = hashlib.sha256("".join(digest for _, digest in of_file.values()).encode()).hexdigest()
    return DataSet(train, val, tokenizer, digest)


def _open_ids(path: Path, dtype: np.dtype, tokens: int | None = None, header: int = 0) -> np.ndarray:
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing; prepare the data again")
    size = path.stat().st_size - header
    found = size // dtype.itemsize
    if size % dtype.itemsize or (tokens is not None and found != tokens):
        expected = f"a multiple of {dtype.itemsize}" if tokens is None else f"the {tokens:,} ids that were written"
        raise UserError(f"{path} was truncated or changed: its {size:,} bytes are not {expected}; prepare it again")
    return np.memmap(path, dtype, mode="r", offset=header) if found else np.zeros(0, dtype)


def _check_ids(path: Path | str, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    if ids.size and (largest := ids.max()) >= vocab_size:
        raise UserError(
            f"{path} has the id {largest}, but the vocabulary ends at {vocab_size - 1}: it is damaged, or was made "
            "with another tokenizer or dtype; prepare the data again"
        )
    return ids


def _open_foreign(directory: Path, check_all: bool) -> DataSet:
    """GPT-2 tokens that another program prepared: nanoGPT's train.bin and val.bin, or shards of llm.c."""
    if (directory / "meta.pkl").exists():
        text = str(directory / "input.txt") if (directory / "input.txt").is_file() else "FILES"
        raise UserError(
            f"{directory}/meta.pkl is a pickle, which can execute code, so it is not read; prepare the text again: "
            + shlex.join(["python", "prepare_data.py", text, "--tokenizer=char", f"--name={directory.name}-new"])
        )
    if any(directory.glob("tokenizer*.json")):  # a model, or ours: as GPT-2's, its ids would mean something else
        raise UserError(f"{directory} is a model, or a data set that has lost its meta.json: prepare the text again")
    paths = {split: [directory / f"{split}.bin"] for split in SPLITS}
    if not any(path.exists() for (path,) in paths.values()):
        split_of = {path: match[1] for path in directory.glob("*.bin") if (match := LLM_C_NAME.fullmatch(path.name))}
        paths = {split: sorted(path for path in split_of if split_of[path] == split) for split in SPLITS}
    if not all(paths.values()) or not all(path.exists() for split in SPLITS for path in paths[split]):
        raise UserError(
            f"{directory} is not a prepared data set: it has neither meta.json, nor train.bin and val.bin, "
            "nor shards of llm.c, such as NAME_train_000001.bin and NAME_val_000000.bin"
        )
    ids = {path: _open_foreign_ids(path) for split in SPLITS for path in paths[split]}
    note(f"{directory} has no meta.json: reading it as GPT-2 tokens (uint16)")
    tokenizer = gpt2()
    train, val = (Tokens([ids[path] for path in paths[split]], None, tokenizer.vocab_size) for split in SPLITS)
    check_all |= sum(array.nbytes for array in ids.values()) <= HASHED
    for path, array in ids.items():
        _check_ids(path, array[: None if check_all else SAMPLE], tokenizer.vocab_size)
    lengths = tokenizer.byte_lengths()
    val.n_bytes = sum(int(lengths[chunk].sum()) for chunk in val.all())
    return DataSet(train, val, tokenizer, hashlib.sha256(f"{len(train)} {len(val)}".encode()).hexdigest())


def _open_foreign_ids(path: Path) -> np.ndarray:
    """The ids of a file without meta.json: uint16, after a header of llm.c or from the start."""
    ids = _open_ids(path, np.dtype("<u2"))
    start = ids[:6].view("<i4") if len(ids) >= 6 else ()
    if tuple(start[:2]) == (LLM_C_GPT2, 1):
        return _open_ids(path, ids.dtype, int(start[2]), LLM_C_HEADER)
    if len(ids) >= 16 and not ids[-16:].any():
        raise UserError(f"{path} ends in zeros: its preparation was interrupted; prepare the text again")
    if len(ids) >= 16 and not ids[1:SAMPLE:2].any():  # in wider integers every second one would be 0
        raise UserError(f"{path} has integers of 4 or 8 bytes: convert it to uint16, or prepare the text again")
    if len(ids) >= 1000 and ids[:SAMPLE].max() < 256:  # GPT-2's first ids are single bytes
        raise UserError(f"{path} has no id above 255, so these are not GPT-2's tokens: prepare the text again")
    return ids
