"""Text in, token files out: data/<name>/ with train.bin, val.bin (numbered where large), meta.json and tokenizer.json.

python prepare_data.py python                # Python's own library: nothing to download
python prepare_data.py my/books 'notes/*.md' --name=books --tokenizer=bpe --vocab_size=4096
python prepare_data.py hf:owner/name --column=text --part=3/16          # one of 16 machines
python prepare_data.py --inspect=books
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout

from config.settings import PositiveInt, Range, UserError, load_settings, note, one_line, run_script
from data.pipeline import MAX_UNITS, UNIT_BYTES, UNIT_FORMAT, Encoder, Job, Merger, encode_units, make_units
from data.sources import Source, find_source
from data.token_files import READY, fetch_tokens, id_dtype, source_of, write_meta
from data.tokenizer import Tokenizer, make_tokenizer, tokenizer_of
from files import whole_directory

MANY_DOCUMENTS = 200  # from here on whole documents go to validation; below, the tail of each
TRAINING_BYTES = 1 << 28  # of text that a BPE is learned from: more hardly changes it


@dataclass(frozen=True)
class PrepareConfig:
    sources: list[str] = field(default_factory=list)
    """a named source, hf:owner/name, - (standard input), or files, folders and globs of text, JSON Lines and Parquet"""
    name: str | None = None
    """the data set's name, a folder of data_dir: what train.py's `dataset` says (by default from the source)"""
    inspect: str | None = None
    """print and draw what the prepared data set of this name holds, and verify its checksums; nothing is prepared"""
    tokenizer: str | None = None
    """gpt2, char, byte, bpe trained on the text, or a model's directory: its own (by default what suits the source)"""
    vocab_size: PositiveInt = 2048
    """ids of a bpe tokenizer, end of text included"""
    val_fraction: Annotated[float, Range(above=0, max=0.5)] | None = None
    """share of the text that is kept for validation (by default what suits the source)"""
    dedup: bool = False
    """leave out documents that came before, byte for byte"""
    bad_files: Literal["stop", "skip", "replace"] = "stop"
    """text that is not UTF-8: stop, skip the document, or write U+FFFD for what is wrong"""
    column: str = "text"
    """where JSON Lines, Parquet and Hugging Face data sets have the text; given with -, standard input is JSON Lines"""
    config: str | None = None
    """the configuration of a Hugging Face data set, such as sample-10BT"""
    split: str = "train"
    """the split of a Hugging Face data set that is read"""
    revision: str | None = None
    """the revision of a Hugging Face data set (by default the newest)"""
    streaming: bool = True
    """read a Hugging Face data set as it comes; no: keep a copy in Hugging Face's cache first"""
    site_packages: bool = False
    """with `python`: also every installed package"""
    shard_tokens: PositiveInt = 1 << 28
    """ids in a file; a split of more has several"""
    part: str | None = None
    """such as 3/16: do the third of 16 shares; torchrun and Slurm arrays give it themselves. The last to end merges"""
    threads: PositiveInt | None = None
    """that encode (by default one a core)"""
    data_dir: str = "data"
    """the folder of the data sets"""


def main() -> None:
    config, given = load_settings(PrepareConfig, positional="sources")
    if config.inspect:
        from data.report import inspect_data_set

        return inspect_data_set(Path(config.data_dir) / config.inspect)
    if len(config.sources) == 1 and config.sources[0] in READY and not Path(config.sources[0]).exists():
        return fetch(config.sources[0], Path(config.data_dir) / (config.name or config.sources[0]))
    source = find_source(config.sources, config, json_lines="column" in given)
    name = config.name or source.name
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"{name!r} cannot be the data set's name: letters, digits, '.', '_' and '-'; give --name=…")
    directory = Path(config.data_dir) / name
    if directory.exists() and not (directory / "meta.json").exists():
        raise UserError(f"{directory} is there and is not a data set of ours; choose another --name")
    if config.name is None and directory.exists() and (held := source_of(directory)) != source.description:
        raise UserError(f"{directory} holds {held}: give --name=… (with --name={name} it is replaced)")
    part, parts = share(config.part)
    if parts > 1 and "-" in config.sources:
        raise UserError("standard input cannot be shared out: save it to a file first")
    started = time.perf_counter()
    try:
        meta = prepare(directory, source, config, part, parts)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {one_line(error)}") from error
    except KeyboardInterrupt:
        note("stopped; the same command goes on from here")
        raise
    if meta:
        say_what_was_made(directory, meta, time.perf_counter() - started)


def fetch(name: str, directory: Path) -> None:
    if not directory.exists():
        fetch_tokens(name, directory)
    note(f"{directory}: tokens, read as they are; next: python train.py --dataset={directory.name}")


def prepare(directory: Path, source: Source, config: PrepareConfig, part: int, parts: int) -> dict | None:
    """Do share `part` of `parts`; whoever finds everything done makes `directory` and gets what meta.json says."""
    partial = directory.with_name(f"{directory.name}.partial")
    if partial.exists() and any(partial.iterdir()) and not any(partial.glob("*.lock")):
        raise UserError(f"{partial} is there and is no unfinished preparation; choose another --name")
    partial.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        lock = partial / f"part-{part}-of-{parts}.lock"
        try:
            stack.enter_context(FileLock(lock, timeout=1))  # others take it for an instant, to see whether it is held
        except Timeout as error:
            raise UserError(f"{directory} is being prepared by another process ({lock} is held)") from error
        if held := next(held_locks(partial, "part-*.lock" if parts == 1 else "part-1-of-1.lock", but=lock), None):
            raise UserError(f"{directory} is being prepared by another process ({held} is held)")
        working(lock).unlink(missing_ok=True)
        try:
            with FileLock(partial / "plan.lock"):
                plan = make_plan(partial, source, config, lock)
            if parts > 1 and is_made(directory, plan):
                note(f"{directory} is prepared already")
                remove(partial)
                return None
            mine = range(part - 1, len(plan.units), parts)
            if parts == 1 and not config.dedup:  # then the units can be merged while others are encoded
                return finish(directory, plan, source, config, mine)
            encode_units(plan.job, plan.units, mine, Encoder(plan.job, plan.tokenizer), threads_of(config))
            with FileLock(partial / "plan.lock"):  # of several that end together one merges
                left = sum(not plan.job.manifest(unit).exists() for unit in range(len(plan.units)))
                if left and is_made(directory, plan):  # by another part: only this lock's folder is here again
                    remove(partial)
                    return None
                if left:
                    note(f"part {part} of {parts} is done; {left} of {len(plan.units)} units are left to the others")
                    return None
                return finish(directory, plan, source, config)
        except FileNotFoundError:
            if partial.exists():
                raise
            return None  # another part has merged
        except UserError:
            if parts == 1:
                shutil.rmtree(partial, ignore_errors=True)
            raise


@dataclass(frozen=True)
class Plan:
    job: Job
    units: list
    digest: str
    kind: str
    tokenizer: Tokenizer


def make_plan(partial: Path, source: Source, config: PrepareConfig, lock: Path) -> Plan:
    """What is to be done. What an earlier run left of the same plan stays; of another it is removed.

    The plan depends on the source and the settings alone, so that processes on many machines come to the same.
    """
    source = source.fetched(partial)
    kind, given = tokenizer_of(config.tokenizer or source.tokenizer)
    val_fraction = config.val_fraction or source.val_fraction
    source = dataclasses.replace(source, val_fraction=val_fraction)
    if not source.has_documents(1):
        raise UserError(f"{' '.join(config.sources)}: there is no text in it")
    unit_bytes = max(UNIT_BYTES, source.size // MAX_UNITS)
    by_content = source.has_documents(MANY_DOCUMENTS)
    units = make_units(source.items(unit_bytes, by_content, config.dedup), unit_bytes)
    job = Job(partial, val_fraction, by_content, source.column, source.bad_files, config.dedup)
    settings = (UNIT_FORMAT, dataclasses.replace(job, partial=None), kind, config.vocab_size if kind == "bpe" else None)
    digest = hashlib.sha256(repr((settings, units)).encode()).hexdigest()
    path = partial / "plan"
    if not path.exists() or path.read_text() != digest:
        others = (other for other in held_locks(partial, "part-*.lock", but=lock) if working(other).exists())
        if held := next(others, None):  # who holds a lock and does not work yet waits to make the same plan
            raise UserError(f"{partial} is in use for other sources or settings ({held.name} is held)")
        for old in partial.iterdir():
            if old.suffix != ".lock" and str(old) not in {file.path for file in source.files}:
                old.unlink()
        tokenizer = given or make_tokenizer(kind, _sample(source, kind), config.vocab_size)
        tokenizer.save(partial)
        path.write_text(digest)
    else:
        tokenizer = Tokenizer.load(partial)
    working(lock).touch()
    return Plan(job, units, digest, kind, tokenizer)


def working(lock: Path) -> Path:
    """What stands beside the lock of a process that works by the plan."""
    return lock.with_suffix(".working")


def held_locks(partial: Path, pattern: str, but: Path) -> Iterator[Path]:
    """The locks that other processes hold."""
    for lock in sorted(set(partial.glob(pattern)) - {but}):
        try:
            FileLock(lock, blocking=False).acquire().lock.release()
        except Timeout:
            yield lock


def finish(directory: Path, plan: Plan, source: Source, config: PrepareConfig, left: Sequence[int] = ()) -> dict:
    """Merge the units into `directory`, which appears when it is whole; encode those that are `left` meanwhile."""
    job, tokenizer = plan.job, plan.tokenizer
    with whole_directory(directory) as new:
        merger = Merger(job, len(plan.units), new, id_dtype(tokenizer.vocab_size), config.shard_tokens)
        if left:
            encode_units(job, plan.units, left, Encoder(job, tokenizer), threads_of(config), merger)
        splits = merger.close()
        for split, figures in splits.items():
            if not figures["tokens"]:
                raise UserError(
                    f"too little text: nothing of it fell to the {split} split; give more, or --val_fraction"
                )
        tokenizer.save(new)
        meta = write_meta(new, tokenizer, plan.kind, source.description, splits, plan.digest)
    remove(job.partial)
    return meta


def remove(partial: Path) -> None:
    """Remove it at once: others that wait for its locks never see a half of it."""
    done = partial.with_name(f"{partial.name}.{os.getpid()}")
    partial.rename(done)
    shutil.rmtree(done)


def say_what_was_made(directory: Path, meta: dict, seconds: float) -> None:
    note = functools.partial(print, file=sys.stderr)  # under torchrun too whoever merges says so, not rank 0
    for split, figures in meta["splits"].items():
        rate = figures["bytes"] / figures["tokens"]
        files = f" in {len(figures['files'])} files" if len(figures["files"]) > 1 else ""
        note(f"{split}: {figures['tokens']:,} tokens of {rate:.2f} bytes, {figures['documents']:,} documents{files}")
    megabytes = sum(figures["bytes"] for figures in meta["splits"].values()) / 1e6
    note(
        f"{directory}: {megabytes:.1f} MB in {seconds:.1f} s, {megabytes / seconds:.1f} MB/s, "
        f"vocabulary of {meta['vocab_size']:,}"
    )
    note(f"next: python train.py --dataset={directory.name} (README.md has recipes)")


def share(given: str | None) -> tuple[int, int]:
    """Which part of how many this process does, counted from 1: as given, of a Slurm array, under torchrun, or all."""
    env = os.environ
    if given is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", given)
        part, parts = map(int, match.groups()) if match else (0, 0)
        if not 1 <= part <= parts:
            raise UserError(f"--part={given}: write --part=3/16 for the third of 16 parts")
        return part, parts
    if "SLURM_ARRAY_TASK_COUNT" in env:
        first, step = int(env["SLURM_ARRAY_TASK_MIN"]), int(env.get("SLURM_ARRAY_TASK_STEP", 1))
        return (int(env["SLURM_ARRAY_TASK_ID"]) - first) // step + 1, int(env["SLURM_ARRAY_TASK_COUNT"])
    return int(env.get("RANK", 0)) + 1, int(env.get("WORLD_SIZE", 1))


def threads_of(config: PrepareConfig) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def is_made(directory: Path, plan: Plan) -> bool:
    try:
        return json.loads((directory / "meta.json").read_bytes()).get("plan") == plan.digest
    except (OSError, ValueError):
        return False


def _sample(source: Source, kind: str) -> Iterator[str]:
    """What the tokenizer is learned from: for a BPE a bounded part; every character has to be seen."""
    size = 0
    for document in source.documents():
        text = document.text.decode()
        yield text[: TRAINING_BYTES - size] if kind == "bpe" else text
        size += len(text)
        if kind == "bpe" and size >= TRAINING_BYTES:
            return


if __name__ == "__main__":
    run_script(main)
