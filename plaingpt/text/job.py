"""One data set in the making: what every process that works on it has in common, and how the last one ends it.

data/<name>.partial has plan.json, which makes the folder ours and says what is prepared, the tokenizer, the progress
of each part, and the shards. Everything in it can be lost at any moment: the same command begins or goes on.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from plaingpt.console import UserError, counted, note
from plaingpt.files import fsync, put_in_place
from plaingpt.text.pipeline import Work, encode_part, read_json, write_json
from plaingpt.text.shards import name_files, write_meta
from plaingpt.text.sources import Source
from plaingpt.text.streams import ReadOptions
from plaingpt.tokenizer import Tokenizer, make_tokenizer
from plaingpt.tokens import SPLITS

FORMAT = 4  # of unfinished work; that of another version starts anew
MARKER = "plaingpt_preparation"  # the key in plan.json that makes a folder ours to delete
MANY_DOCUMENTS = 200  # from here on whole documents go to validation; with fewer, the tail of each
TRAINING_BYTES = 1 << 28  # of text that a BPE is trained on: more hardly changes it


@dataclass(frozen=True)
class Job:
    """What is prepared, the same for all of its `parts`."""

    directory: Path
    source: Source
    options: ReadOptions
    kind: str  # what meta.json calls the tokenizer
    tokenizer: Tokenizer | None  # if it exists already
    vocab_size: int  # of a bpe
    dedup: bool
    shard_tokens: int
    parts: int

    @property
    def partial(self) -> Path:
        directory = self.directory.resolve() if self.directory.is_symlink() else self.directory  # to another disk
        return directory.with_name(f"{directory.name}.partial")

    @property
    def shards(self) -> Path:
        return self.partial / "shards"

    @functools.cached_property
    def digest(self) -> str:
        """A name for the result: from the same source and settings it is the same on every machine."""
        source = self.source.description, self.source.files, secrets.token_hex(8) if self.source.once else None
        tokenizer = self.kind, self.vocab_size if self.kind == "bpe" else None
        result = FORMAT, source, tokenizer, self.options, self.dedup, self.shard_tokens, self.parts
        return hashlib.sha256(repr(result).encode("utf-8", "surrogateescape")).hexdigest()

    def plan(self) -> dict:
        return read_json(self.partial / "plan.json") or {}

    def progress(self, part: int) -> Path:
        return self.partial / f"part-{part}.json"

    def is_done(self) -> bool:
        return (read_json(self.directory / "meta.json") or {}).get("plan") == self.digest


def prepare(job: Job, part: int, threads: int) -> dict | None:
    """Do one part. Whoever finishes last makes the data set and returns the content of its meta.json."""
    partial, over = job.partial, False
    lock = FileLock(partial / f"part-{part}.lock", blocking=False)
    try:
        if job.parts > 1 and job.is_done() and not partial.exists():
            return note(f"{job.directory} is prepared already")
        claim(partial)
        with FileLock(partial / "plan.lock"):  # for the plan and the end; the part's lock is for all of its work
            planned = job.plan().get("digest") == job.digest
            if job.is_done() and (job.parts > 1 or (planned and not job.shards.exists())):  # killed before removing it
                over = planned
                return note(f"{job.directory} is prepared already")
            work = make_work(job, lock, part)
        encode_part(work, threads)
        with FileLock(partial / "plan.lock"):
            meta = finish(job, work)
            over = meta is not None
        return meta
    except UserError:
        over = job.parts == 1 and lock.is_locked
        raise
    except FileNotFoundError:
        if not partial.exists() and job.parts > 1 and job.is_done():  # the last part has just removed it
            return None
        raise
    finally:
        lock.release()
        if over and job.plan().get("digest") in (None, job.digest):  # another job may have claimed the folder by now
            remove(partial)


def claim(partial: Path) -> None:
    """Create the folder of unfinished work; UserError if the user has another folder of that name."""
    partial.mkdir(parents=True, exist_ok=True)
    ours = MARKER in (read_json(partial / "plan.json") or {})
    if not ours and {path.name for path in partial.iterdir()} - {"plan.lock", ".plan.json.new"}:
        raise UserError(f"{partial} exists and is not unfinished work of ours; move it away, or choose another --name")


def make_work(job: Job, lock: FileLock, part: int) -> Work:
    """What this part has to do. Unfinished work for the same result is continued, any other removed."""
    plan = job.plan()
    new = plan.get("digest") != job.digest
    if new:
        if other := next(locked(job.partial), None):
            raise UserError(f"{job.partial} is in use for other sources or settings ({other.name} is locked)")
        write_json(job.partial / "plan.json", {MARKER: FORMAT})  # the folder is ours, and nothing in it counts
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{job.directory} is being prepared by another process ({lock.lock_file} is locked)") from error
    if new:
        if plan.get("digest"):
            note(f"{job.partial} has unfinished work of another text or other settings: it is removed")
        clear(job.partial, but={"plan.json", "plan.lock", Path(lock.lock_file).name})
    source = job.source.fetched(job.partial)
    if new:
        plan, tokenizer = make_plan(job, source)
    else:
        tokenizer = Tokenizer.load(job.partial)
    options = dataclasses.replace(job.options, by_content=plan["by_content"])
    items = source.items(options)[part - 1 :: job.parts]
    return Work(job.shards, job.progress(part), part, items, options, tokenizer, job.dedup, job.shard_tokens)


def make_plan(job: Job, source: Source) -> tuple[dict, Tokenizer]:
    documents = source.count_documents(job.options, MANY_DOCUMENTS)
    if not documents:
        raise UserError(f"{source.description}: there is no text in it")
    if source.summary:
        note(source.summary)
    tokenizer = job.tokenizer or make_tokenizer(job.kind, sample(source, job.options, job.kind), job.vocab_size)
    tokenizer.save(job.partial)
    fsync(job.partial / "tokenizer.json")
    job.shards.mkdir()
    plan = {MARKER: FORMAT, "digest": job.digest, "by_content": documents >= MANY_DOCUMENTS}
    write_json(job.partial / "plan.json", plan)  # last: it says that the rest is there
    return plan, tokenizer


def sample(source: Source, options: ReadOptions, kind: str) -> Iterator[str]:
    """The text that a tokenizer is made from: for bpe the first part; for char all, to see every character."""
    size = 0
    for text in map(bytes.decode, source.texts(options)):
        yield text[: TRAINING_BYTES - size] if kind == "bpe" else text
        size += len(text)
        if kind == "bpe" and size >= TRAINING_BYTES:
            return


def finish(job: Job, work: Work) -> dict | None:
    """Make the data set if all parts are done. It appears complete, or not at all."""
    progress = (read_json(job.progress(part)) or {} for part in range(1, job.parts + 1))
    done = [found for found in progress if found.get("finished")]
    if len(done) < job.parts:
        left = counted(job.parts - len(done), "part")
        return note(f"part {work.part} of {job.parts} is done; not done yet: {left}")
    splits = {}
    for split in SPLITS:
        files = [file for found in done for file in found["splits"][split]["files"] if file["tokens"]]
        if not files:
            raise UserError(f"too little text: the {split} split is empty; give more, or another --val_fraction")
        sums = {key: sum(found["splits"][split][key] for found in done) for key in ("tokens", "bytes", "documents")}
        splits[split] = sums | {"files": name_files(job.shards, split, files)}
    for empty in job.shards.glob("part*.bin"):
        empty.unlink()
    work.tokenizer.save(job.shards)
    meta = write_meta(job.shards, work.tokenizer, job.kind, job.source.description, splits, job.digest)
    put_in_place(job.shards, job.directory)
    return meta


def locked(partial: Path) -> Iterator[Path]:
    """The lock files of parts that other processes are working on."""
    for path in sorted(partial.glob("part-*.lock")):
        try:
            FileLock(path, blocking=False).acquire().lock.release()
        except Timeout:
            yield path


def clear(partial: Path, but: set[str]) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in but:
            path.unlink()


def remove(partial: Path) -> None:
    """Delete the folder in one step: a process that waits for a lock in it never sees half of it."""
    with contextlib.suppress(OSError):  # another process does it, or has a file in it open (Windows, NFS)
        shutil.rmtree(partial.rename(f"{partial}.{os.getpid()}"), ignore_errors=True)
