"""Token files as preparation writes them: numbered shards and meta.json."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plaingpt.tokenizer import Tokenizer
from plaingpt.tokens import FORMAT_VERSION, id_dtype


class ShardWriter:
    """Writes ids to numbered files of `shard_tokens` each.

    `files` is what `saved` returned before a stop: what was written after it is cut off. ValueError if the last file
    has other content.
    """

    def __init__(self, directory: Path, prefix: str, dtype: np.dtype, shard_tokens: int, files: Sequence[dict] = ()):
        self._directory, self._prefix, self._shard_tokens = directory, prefix, shard_tokens
        self._files = list(files)
        if files:
            self._reopen(files[-1], dtype)
        else:
            self._open()

    def _reopen(self, last: dict, dtype: np.dtype) -> None:
        path = self._directory / last["name"]
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is missing")
        self._file = open(path, "r+b")  # noqa: SIM115 (closed when it is full)
        self._file.truncate(last["tokens"] * dtype.itemsize)
        self._digest = hashlib.file_digest(self._file, "sha256")
        if self._digest.hexdigest() != last["sha256"]:
            raise ValueError(f"{path} is damaged")

    def _open(self) -> None:
        path = self._directory / f"{self._prefix}_{len(self._files):06}.bin"
        path.unlink(missing_ok=True)
        self._file = open(path, "xb")  # noqa: SIM115 (closed when it is full)
        self._digest = hashlib.sha256()
        self._files.append({"name": path.name, "tokens": 0, "sha256": self._digest.hexdigest()})

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._files[-1]["tokens"] == self._shard_tokens:
                self.close()
                self._open()
            room = self._shard_tokens - self._files[-1]["tokens"]
            fitting, ids = ids[:room], ids[room:]
            self._file.write(fitting)
            self._digest.update(fitting)
            self._files[-1]["tokens"] += len(fitting)

    def saved(self) -> list[dict]:
        """Name, tokens and SHA-256 of each file, all of them on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._files[-1]["sha256"] = self._digest.hexdigest()
        return self._files

    def close(self) -> list[dict]:
        files = self.saved()
        self._file.close()
        return files


def json_in(path: Path) -> dict:
    """The object in a file; {} if it is missing, or was left empty or cut by a loss of power."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def name_files(directory: Path, split: str, files: list[dict]) -> list[dict]:
    """Give a split's files their final names: train.bin, or train_000000.bin and so on. Can be repeated."""
    named = []
    for i, file in enumerate(files):
        name = f"{split}.bin" if len(files) == 1 else f"{split}_{i:06}.bin"
        if (directory / file["name"]).exists():
            (directory / file["name"]).rename(directory / name)
        named.append(file | {"name": name})
    return named


def write_meta(directory: Path, tokenizer: Tokenizer, kind: str, source: str, splits: dict, plan: str = "") -> dict:
    """Write meta.json and return what it says; `plan` is a digest of what was prepared and how."""
    meta = {
        "format_version": FORMAT_VERSION,
        "tokenizer": kind,
        "vocab_size": tokenizer.vocab_size,
        "dtype": id_dtype(tokenizer.vocab_size - 1).name,
        "end_of_text": tokenizer.end_of_text,
        "source": source,
        "plan": plan,
        "splits": splits,
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta
