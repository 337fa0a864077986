"""Text in, token files out: data/<name>/ with train.bin, val.bin (numbered where large), meta.json and tokenizer.json.

python prepare_data.py python                # Python's own library: nothing to download
python prepare_data.py my/books 'notes/*.md' --name=books --tokenizer=bpe --vocab_size=4096
python prepare_data.py hf:owner/name --column=text --part=3/16          # one of 16 machines
python prepare_data.py --inspect=books
"""

import plaingpt.startup

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout

from plaingpt.console import UserError, cores, counted, note, one_line, run_script
from plaingpt.files import flush, put_in_place
from plaingpt.settings import PositiveInt, Range, load_settings
from plaingpt.text.job import MAX_UNITS, UNIT_BYTES, UNIT_FORMAT, Job, make_units, read_json
from plaingpt.text.merger import Merger
from plaingpt.text.pipeline import encode_units
from plaingpt.text.shards import READY, fetch_tokens, write_meta
from plaingpt.text.sources import Source, find_source
from plaingpt.tokenizer import Tokenizer, make_tokenizer, tokenizer_of

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
    """read a Hugging Face data set as it comes; False: keep a copy in Hugging Face's cache first"""
    site_packages: bool = False
    """with `python`: also every installed package"""
    shard_tokens: PositiveInt = 1 << 28
    """ids in a file; a split of more has several"""
    part: str | None = None
    """such as 3/16: do the third of 16 shares; torchrun and Slurm arrays give it themselves. The last to end merges"""
    threads: PositiveInt | None = None
    """threads that encode (by default one a core)"""
    data_dir: str = "data"
    """the folder of the data sets"""


def main() -> None:
    config, given = load_settings(PrepareConfig, positional="sources")
    if config.inspect:
        from plaingpt.text.report import inspect_data_set

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
    held = (read_json(directory / "meta.json") or {}).get("source")
    if config.name is None and directory.exists() and (held != source.description or "-" in config.sources):
        raise UserError(f"{directory} holds {held}: give --name=… (with --name={name} it is replaced)")
    part, parts = share(config.part)
    if parts > 1 and "-" in config.sources:
        raise UserError("standard input cannot be shared out: save it to a file first")
    started = time.perf_counter()
    try:
        meta = prepare(directory, source, config, part, parts)
    except OSError as error:
        raise UserError(f"{directory} cannot be made: {one_line(error)}") from error
    except KeyboardInterrupt:
        note("stopped" if "-" in config.sources else "stopped; the same command goes on from here")
        raise
    if meta:
        from plaingpt.text.report import say_what_was_made

        say_what_was_made(directory, meta, time.perf_counter() - started)


def fetch(name: str, directory: Path) -> None:
    if not directory.exists():
        fetch_tokens(name, directory)
    note(f"{directory}: GPT-2's tokens; next: python train.py config/train_gpt2.py --dataset={directory.name}")


def prepare(directory: Path, source: Source, config: PrepareConfig, part: int, parts: int) -> dict | None:
    """Do share `part` of `parts`; whoever finds everything done makes `directory` and gets what meta.json says."""
    place = directory.resolve() if directory.is_symlink() else directory  # a link leads to another disk, say
    partial = place.with_name(f"{place.name}.partial")
    if partial.exists() and any(partial.iterdir()) and not any(partial.glob("*.lock")):
        raise UserError(f"{partial} is there and is no unfinished preparation; choose another --name")
    partial.mkdir(parents=True, exist_ok=True)
    with hold_part(directory, partial, part, parts) as lock:
        try:
            with FileLock(partial / "plan.lock"):
                job = make_job(partial, source, config, lock)
            meta = do_part(directory, source, job, part, parts, threads_of(config))
        except (FileNotFoundError, UserError) as error:
            if parts > 1 and not partial.exists() and (directory / "meta.json").exists():
                return None  # another part has merged
            if parts == 1 and isinstance(error, UserError):
                shutil.rmtree(partial, ignore_errors=True)
            raise
    if is_made(directory, job):
        remove(partial)
    return meta


@contextlib.contextmanager
def hold_part(directory: Path, partial: Path, part: int, parts: int) -> Iterator[Path]:
    """Hold the lock of this part, which is given; UserError where another process is at the same."""
    lock = partial / f"part-{part}-of-{parts}.lock"
    try:
        held = FileLock(lock).acquire(timeout=1)  # others take it for an instant, to see whether it is held
    except (Timeout, FileNotFoundError) as error:  # not found: the other has just ended
        raise UserError(f"{directory} is being prepared by another process ({lock} is held)") from error
    with held:
        if other := next(held_locks(partial, "part-*.lock" if parts == 1 else "part-1-of-1.lock", but=lock), None):
            raise UserError(f"{directory} is being prepared by another process ({other} is held)")
        working(lock).unlink(missing_ok=True)
        yield lock


def do_part(directory: Path, source: Source, job: Job, part: int, parts: int, threads: int) -> dict | None:
    put_in_place_before = job.progress.exists() and not job.merged.exists()
    if (parts > 1 or put_in_place_before) and is_made(directory, job):
        note(f"{directory} is prepared already")
        return None
    mine = range(part - 1, len(job.units), parts)
    if parts == 1 and not job.dedup:  # then the units can be merged while others are encoded
        return finish(directory, source, job, threads, mine)
    encode_units(job, mine, threads)
    with FileLock(job.partial / "plan.lock"):  # of several that end together one merges
        if parts > 1 and is_made(directory, job):
            return None
        if left := len(job.left()):
            note(f"part {part} of {parts} is done; left to the others: {left} of {counted(len(job.units), 'unit')}")
            return None
        return finish(directory, source, job, threads)


def make_job(partial: Path, source: Source, config: PrepareConfig, lock: Path) -> Job:
    """What is to be done. What an earlier run left of the same job stays; of another it is removed.

    The job depends on the source and the settings alone, so that processes on many machines come to the same.
    """
    source = source.fetched(partial)
    kind, tokenizer = tokenizer_of(config.tokenizer or source.tokenizer)
    source = dataclasses.replace(source, val_fraction=config.val_fraction or source.val_fraction)
    documents = source.count_documents(MANY_DOCUMENTS)
    if not documents:
        raise UserError(f"{' '.join(config.sources)}: there is no text in it")
    by_content = documents == MANY_DOCUMENTS
    unit_bytes = max(UNIT_BYTES, source.size // MAX_UNITS)
    units = make_units(source.items(unit_bytes, by_content, config.dedup), unit_bytes)
    settings = (source.val_fraction, by_content, source.column, source.bad_files, config.dedup, config.shard_tokens)
    of_tokenizer = kind, config.vocab_size if kind == "bpe" else None
    digest = hashlib.sha256(repr((UNIT_FORMAT, settings, of_tokenizer, units)).encode()).hexdigest()
    path = partial / "plan"
    if path.exists() and path.read_text() == digest:
        tokenizer = Tokenizer.load(partial)
    else:
        others = (other for other in held_locks(partial, "part-*.lock", but=lock) if working(other).exists())
        if held := next(others, None):  # who holds a lock and does not work yet waits to make the same job
            raise UserError(f"{partial} is in use for other sources or settings ({held.name} is held)")
        if path.exists():
            note(f"{partial} has unfinished work of another text or other settings: it is removed")
            path.unlink()  # first: of that work a half is no use
        for old in partial.iterdir():
            if old.is_dir():
                shutil.rmtree(old)
            elif old.suffix != ".lock" and old.stem != "stdin":
                old.unlink()
        tokenizer = tokenizer or make_tokenizer(kind, _sample(source, kind), config.vocab_size)
        tokenizer.save(partial)
        flush(partial / "tokenizer.json")  # before the plan, which tells that it is there
        path.write_text(digest)
    working(lock).touch()
    return Job(partial, digest, units, tokenizer, kind, *settings)


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


def finish(directory: Path, source: Source, job: Job, threads: int, left: Sequence[int] = ()) -> dict:
    """Merge the units into `directory`, which appears when it is whole; encode those that are `left` meanwhile."""
    merger = Merger(job)
    if left:
        encode_units(job, left, threads, merger)
    splits = merger.close()
    for split, figures in splits.items():
        if not figures["tokens"]:
            raise UserError(f"too little text: nothing of it fell to the {split} split; give more, or --val_fraction")
    job.tokenizer.save(job.merged)
    meta = write_meta(job.merged, job.tokenizer, job.kind, source.description, splits, job.digest)
    put_in_place(job.merged, directory)
    return meta


def remove(partial: Path) -> None:
    """Remove it at once, and no lock of ours in it is held any more: who waits for one never sees a half of it."""
    with contextlib.suppress(OSError):  # another does it, or is in it (Windows, NFS): that is no failure any more
        shutil.rmtree(partial.rename(f"{partial}.{os.getpid()}"), ignore_errors=True)


def share(given: str | None) -> tuple[int, int]:
    """Which part of how many this process does, counted from 1: as given, of a Slurm array, under torchrun, or all."""
    env = os.environ
    if given is not None:
        what, match = f"--part={given}", re.fullmatch(r"(\d+)/(\d+)", given)
        part, parts = map(int, match.groups()) if match else (0, 0)
    elif "SLURM_ARRAY_TASK_COUNT" in env:
        what, first = "a Slurm array with gaps", int(env["SLURM_ARRAY_TASK_MIN"])
        part = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // int(env.get("SLURM_ARRAY_TASK_STEP", 1)) + 1
        parts = int(env["SLURM_ARRAY_TASK_COUNT"])
    else:
        return int(env.get("RANK", 0)) + 1, int(env.get("WORLD_SIZE", 1))
    if not 1 <= part <= parts:
        raise UserError(f"{what}: write --part=3/16 for the third of 16 parts")
    return part, parts


def threads_of(config: PrepareConfig) -> int:
    return config.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def is_made(directory: Path, job: Job) -> bool:
    return (read_json(directory / "meta.json") or {}).get("plan") == job.digest


def _sample(source: Source, kind: str) -> Iterator[str]:
    """What the tokenizer is learned from: for a BPE a bounded part; every character has to be seen."""
    size = 0
    for text in map(bytes.decode, source.texts()):
        yield text[: TRAINING_BYTES - size] if kind == "bpe" else text
        size += len(text)
        if kind == "bpe" and size >= TRAINING_BYTES:
            return


if __name__ == "__main__":
    run_script(main, less_memory="--threads")
