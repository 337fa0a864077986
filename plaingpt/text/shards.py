"""Token files as preparation writes them: numbered shards and meta.json; and those that others prepared, downloaded."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from plaingpt.console import RunFailed, one_line
from plaingpt.tokenizer import Tokenizer
from plaingpt.tokens import FORMAT_VERSION, id_dtype

READY = {"fineweb10B-gpt2": "kjj0/fineweb10B-gpt2"}  # repositories of the hub with such shards
FLUSHED = 1 << 25  # ids after which what is written goes to the disk itself, so that the end has not to wait for all


class ShardWriter:
    """Writes one split in one file or, where it has more than `shard_tokens` ids, in numbered files.

    It goes on after `files`, which is what `state` gave; ValueError where they are not like that any more.
    """

    def __init__(self, directory: Path, split: str, dtype: np.dtype, shard_tokens: int, files: Sequence[dict] = ()):
        self._directory, self._split, self._shard_tokens = directory, split, shard_tokens
        self._single = directory / f"{split}.bin"
        self._files = list(files)
        if not files:
            return self._open()
        path = directory / files[-1]["name"]
        if self._single.exists():  # closed already
            self._single.rename(path)
        if not path.exists():
            raise ValueError(f"{path} is gone")
        self._file = open(path, "r+b")  # noqa: SIM115 (closed when it is full)
        self._file.truncate(files[-1]["tokens"] * dtype.itemsize)
        self._digest = hashlib.file_digest(self._file, "sha256")
        if self._digest.hexdigest() != files[-1]["sha256"]:
            raise ValueError(f"{path} is not as it was written")

    def _open(self) -> None:
        name = f"{self._split}_{len(self._files):06}.bin"
        self._file = open(self._directory / name, "wb")  # noqa: SIM115 (closed when it is full)
        self._digest = hashlib.sha256()
        self._files.append({"name": name, "tokens": 0, "sha256": self._digest.hexdigest()})

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._files[-1]["tokens"] == self._shard_tokens:
                self._close()
                self._open()
            room = self._shard_tokens - self._files[-1]["tokens"]
            part, ids = ids[:room], ids[room:]
            self._file.write(part)
            self._digest.update(part)
            self._files[-1]["tokens"] += len(part)
            if self._files[-1]["tokens"] // FLUSHED > (self._files[-1]["tokens"] - len(part)) // FLUSHED:
                os.fsync(self._file.fileno())

    def _close(self) -> None:
        self.state()
        os.fsync(self._file.fileno())  # whoever goes on looks at the last file alone
        self._file.close()

    def state(self) -> list[dict]:
        """Name, tokens and SHA-256 of each file so far."""
        self._file.flush()
        self._files[-1]["sha256"] = self._digest.hexdigest()
        return self._files

    def close(self) -> list[dict]:
        self._close()
        if len(self._files) == 1:
            (self._directory / self._files[0]["name"]).rename(self._single)
            self._files[0]["name"] = self._single.name
        return self._files


def write_meta(directory: Path, tokenizer: Tokenizer, kind: str, source: str, splits: dict, plan: str = "") -> dict:
    """Write meta.json and return what it says; `plan` is a digest of what was prepared and how."""
    meta = {
        "format_version": FORMAT_VERSION,
        "tokenizer": kind,
        "vocab_size": tokenizer.vocab_size,
        "dtype": id_dtype(tokenizer.vocab_size).name,
        "end_of_text": tokenizer.end_of_text,
        "source": source,
        "plan": plan,
        "splits": splits,
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def fetch_tokens(name: str, directory: Path) -> None:
    """Download the token files of one of READY; `directory` appears when they are all there."""
    import huggingface_hub

    partial = directory.with_name(f"{directory.name}.partial")
    try:
        huggingface_hub.snapshot_download(READY[name], repo_type="dataset", local_dir=partial)
    except Exception as error:  # of any library below: network, server, disk
        raise RunFailed(f"{READY[name]} cannot be downloaded: {one_line(error)}; run again to go on") from error
    partial.rename(directory)
