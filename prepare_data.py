"""Text in, token files out: data/<name>/{train,val}.bin, meta.json and tokenizer.json.

python prepare_data.py python                # Python's own library: nothing to download
python prepare_data.py my/books 'notes/*.md' --name=books --tokenizer=bpe --vocab_size=4096
"""

import hashlib
import itertools
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

from config.settings import PositiveInt, Range, UserError, load_settings, note, one_line, run_script
from data.sources import find_source
from data.token_files import SplitWriter, write_meta
from data.tokenizer import KINDS, Tokenizer, make_tokenizer
from files import whole_directory

MANY_DOCUMENTS = 200  # from here on whole documents go to validation; below, the tail of each
BATCH_BYTES = 1 << 22  # of text encoded at a time
TRAINING_BYTES = 1 << 28  # of text that a BPE is learned from: more hardly changes it


@dataclass(frozen=True)
class PrepareConfig:
    sources: list[str] = field(default_factory=list)
    """a named source (python, shakespeare, shakespeare_char), or files, folders and globs of text"""
    name: str | None = None
    """the data set's name, a folder of data_dir: what train.py's `dataset` says (by default from the source)"""
    tokenizer: Literal[KINDS] | None = None
    """gpt2, char, byte, or bpe trained on the text (by default what suits the source)"""
    vocab_size: PositiveInt = 2048
    """ids of a bpe tokenizer, end of text included"""
    val_fraction: Annotated[float, Range(above=0, max=0.5)] | None = None
    """share of the text that is kept for validation (by default what suits the source)"""
    bad_files: Literal["stop", "skip"] = "stop"
    """what to do about a file that is not UTF-8 text"""
    data_dir: str = "data"
    """the folder of the data sets"""


def main() -> None:
    config, _ = load_settings(PrepareConfig, positional="sources")
    source = find_source(config.sources, skip_bad_files=config.bad_files == "skip")
    name = config.name or source.name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{name!r} cannot be the data set's name: letters, digits, '.', '_' and '-'; give --name=…")
    directory = Path(config.data_dir) / name
    if directory.exists() and not (directory / "meta.json").exists():
        raise UserError(f"{directory} is there and is not a data set of ours; choose another --name")
    kind = config.tokenizer or source.tokenizer
    started = time.perf_counter()
    if next(source.documents(), None) is None:
        raise UserError(f"{' '.join(config.sources)}: there is no text in it")
    tokenizer = make_tokenizer(kind, _sample(source.documents(), kind), config.vocab_size)
    val_fraction = config.val_fraction or source.val_fraction
    try:
        splits = write(directory, source.documents(), tokenizer, kind, val_fraction, config)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {one_line(error)}") from error
    seconds = time.perf_counter() - started
    for split, figures in splits.items():
        rate = figures["bytes"] / figures["tokens"]
        note(f"{split}: {figures['tokens']:,} tokens of {rate:.2f} bytes, {figures['documents']:,} documents")
    megabytes = sum(figures["bytes"] for figures in splits.values()) / 1e6
    note(f"{directory}: {megabytes:.1f} MB in {seconds:.1f} s, vocabulary of {tokenizer.vocab_size:,}")
    note(f"next: python train.py --dataset={name} (README.md has recipes)")


def write(
    directory: Path,
    documents: Iterable[str],
    tokenizer: Tokenizer,
    kind: str,
    val_fraction: float,
    config: PrepareConfig,
) -> dict[str, dict]:
    """Encode the documents into `directory`, which appears when it is whole; return the figures of each split."""
    with whole_directory(directory) as new:
        writers = {split: SplitWriter(new, split, tokenizer) for split in ("train", "val")}
        with tqdm(unit="B", unit_scale=True, desc="encoding", disable=None) as bar:
            for batch in _batches(split_documents(documents, val_fraction)):
                texts = [text for _, text in batch]
                for (split, text), ids in zip(batch, tokenizer.encode_documents(texts)):
                    writers[split].add(text, ids)
                bar.update(sum(map(len, texts)))
        splits = {split: writer.close() for split, writer in writers.items()}
        for split, figures in splits.items():
            if not figures["tokens"]:
                raise UserError(
                    f"too little text: nothing of it fell to the {split} split; give more, or --val_fraction"
                )
        tokenizer.save(new)
        write_meta(new, tokenizer, kind, " ".join(config.sources), splits)
    return splits


def split_documents(documents: Iterable[str], val_fraction: float) -> Iterator[tuple[str, str]]:
    """Pairs of a split and a text. The hash of a document decides, so that order and growth change nothing.

    Of few documents the tail of each goes to validation.
    """
    documents = iter(documents)
    first = list(itertools.islice(documents, MANY_DOCUMENTS))
    if len(first) < MANY_DOCUMENTS:
        for text in first:
            border = int(len(text) * (1 - val_fraction))
            yield from ((split, part) for split, part in (("train", text[:border]), ("val", text[border:])) if part)
        return
    for text in itertools.chain(first, documents):
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        yield "val" if number < val_fraction * 2**64 else "train", text


def _batches(pairs: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[1])
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sample(documents: Iterator[str], kind: str) -> Iterator[str]:
    """What the tokenizer is learned from: for a BPE a bounded part; every character has to be seen."""
    size = 0
    for text in documents:
        yield text[: TRAINING_BYTES - size] if kind == "bpe" else text
        size += len(text)
        if kind == "bpe" and size >= TRAINING_BYTES:
            return


if __name__ == "__main__":
    run_script(main)
