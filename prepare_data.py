"""Text in, token files out: data/<name>/ with train.bin, val.bin (numbered if large), meta.json and tokenizer.json.

python prepare_data.py python                # Python's standard library: nothing to download
python prepare_data.py my/books 'notes/*.md' --name=books --tokenizer=bpe --vocab_size=4096
python prepare_data.py hf:owner/name --column=text --part=3/16          # one of 16 machines
"""

import plaingpt.startup

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from filelock import FileLock, Timeout

from plaingpt.console import UserError, cores, counted, escaped, note, one_line, run_script
from plaingpt.files import fsync, put_in_place
from plaingpt.settings import PathName, PositiveInt, Range, load_settings
from plaingpt.text.pipeline import Work, encode_part, read_json, write_json
from plaingpt.text.shards import READY, fetch_tokens, name_files, write_meta
from plaingpt.text.sources import Source, find_source, read_options
from plaingpt.text.streams import ReadOptions
from plaingpt.tokenizer import Tokenizer, make_tokenizer, tokenizer_of
from plaingpt.tokens import SPLITS

FORMAT = 4  # of unfinished work; that of another version starts anew
MARKER = "plaingpt_preparation"  # the key in plan.json that makes a folder ours to delete
MANY_DOCUMENTS = 200  # from here on whole documents go to validation; with fewer, the tail of each
TRAINING_BYTES = 1 << 28  # of text that a BPE is trained on: more hardly changes it
RECIPES = {"python": "quickstart", "shakespeare_char": "train_shakespeare_cpu"}  # that name the data set themselves


@dataclass(frozen=True)
class PrepareConfig:
    sources: list[PathName] = field(default_factory=list)
    """a named source, hf:owner/name, - (standard input), or files, folders and globs: text, JSON, CSV, TSV, Parquet"""
    name: str | None = None
    """name of the data set, a folder of data_dir: train.py's `dataset` (default: from the source)"""
    tokenizer: PathName | None = None
    """gpt2, char, byte, bpe (trained on the text), or a model directory (default: what suits the source)"""
    vocab_size: PositiveInt = 2048
    """ids of a bpe tokenizer, including end of text"""
    val_fraction: Annotated[float, Range(above=0, max=0.5)] | None = None
    """share of the text that is held out for validation (default: what suits the source)"""
    dedup: bool = False
    """drop exact copies of documents; takes about 100 bytes of memory a document"""
    split_documents: bool = False
    """split text files into documents at <|endoftext|>"""
    bad_files: Literal["stop", "skip", "replace"] = "stop"
    """text that is not UTF-8: stop, skip the document, or write U+FFFD for the wrong bytes"""
    encoding: str | None = None
    """encoding of text files, such as latin-1 (default: by byte order mark, else UTF-8)"""
    column: str = "text"
    """the text's column in JSON, CSV, TSV, Parquet and Hugging Face data sets; with -, standard input is JSON Lines"""
    config: str | None = None
    """configuration of a Hugging Face data set, such as sample-10BT"""
    split: str = "train"
    """split of a Hugging Face data set to read"""
    revision: str | None = None
    """revision of a Hugging Face data set (default: the newest)"""
    streaming: bool = True
    """read a Hugging Face data set while it downloads; False: download it to Hugging Face's cache first"""
    site_packages: bool = False
    """with `python`: every installed package, too"""
    shard_tokens: PositiveInt = 1 << 28
    """ids in a file; a larger split has several files"""
    part: str | None = None
    """such as 3/16: the third of 16 parts; set by torchrun and Slurm arrays. The last to finish writes meta.json"""
    threads: PositiveInt | None = None
    """threads that encode (default: one a core)"""
    data_dir: PathName = "data"
    """folder of the data sets"""

    RETIRED: ClassVar = {"inspect": "use python tools/inspect_data.py data/NAME"}


def main() -> None:
    config, given = load_settings(PrepareConfig, positional="sources")
    data_dir = Path(config.data_dir)
    if len(config.sources) == 1 and config.sources[0] in READY and not os.path.exists(config.sources[0]):
        return fetch(config.sources[0], data_dir / (config.name or config.sources[0]))
    source = find_source(config.sources, config, json_lines="column" in given)
    name = config.name or source.name
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > 200:
        raise UserError(f"{name[:50]!r} cannot be the data set's name: up to 200 letters, digits, '.', '_' and '-'")
    directory = data_dir / name
    found = read_json(directory / "meta.json") or {}
    if os.path.exists(directory) and not {"format_version", "splits"} <= found.keys():
        raise UserError(f"{directory} exists and is not a data set of ours; choose another --name")
    if config.name is None and found and (found.get("source") != source.description or source.once):
        raise UserError(f"{directory} was made from {found.get('source')}: give --name=… (--name={name} replaces it)")
    part, parts = part_of(config.part)
    if parts > 1 and source.once:
        raise UserError("standard input cannot be split into parts: save it to a file first")
    if parts > 1 and config.dedup:
        raise UserError("--dedup compares each document with all others, which only one process can: leave out --part")
    started = time.perf_counter()
    try:
        meta = prepare(directory, source, config, part, parts)
    except OSError as error:
        raise UserError(f"{directory} cannot be prepared: {one_line(error)}") from error
    except KeyboardInterrupt:
        note("stopped" if source.once else "stopped; the same command continues from here")
        raise
    if meta:
        report(directory, meta, time.perf_counter() - started)


def fetch(name: str, directory: Path) -> None:
    if not directory.exists():
        fetch_tokens(name, directory)
    note(f"{directory}: GPT-2's tokens; next: python train.py config/train_gpt2.py --dataset={directory.name}")


@dataclass(frozen=True)
class Job:
    """What all parts have in common. `partial` has plan.json, the tokenizer, each part's progress, and the shards."""

    directory: Path
    partial: Path
    source: Source
    config: PrepareConfig
    kind: str  # what meta.json calls the tokenizer
    digest: str  # of everything that the result depends on

    @property
    def shards(self) -> Path:
        return self.partial / "shards"

    def progress(self, part: int) -> Path:
        return self.partial / f"part-{part}.json"

    def plan(self) -> dict:
        return read_json(self.partial / "plan.json") or {}

    def is_done(self) -> bool:
        return (read_json(self.directory / "meta.json") or {}).get("plan") == self.digest


def prepare(directory: Path, source: Source, config: PrepareConfig, part: int, parts: int) -> dict | None:
    """Do one part. Whoever finishes last makes `directory` and returns the content of its meta.json."""
    place = directory.resolve() if directory.is_symlink() else directory  # a link may lead to another disk
    kind, tokenizer = tokenizer_of(config.tokenizer or source.tokenizer)
    partial = place.with_name(f"{place.name}.partial")
    job = Job(directory, partial, source, config, kind, digest_of(source, config, kind, parts))
    lock, over = FileLock(partial / f"part-{part}.lock", blocking=False), False
    try:
        if parts > 1 and job.is_done() and not partial.exists():
            return note(f"{directory} is prepared already")
        claim(partial)
        with FileLock(partial / "plan.lock"):  # for the plan and the end; the part's lock is for all of its work
            planned = job.plan().get("digest") == job.digest
            if job.is_done() and (parts > 1 or (planned and not job.shards.exists())):  # killed just before removing
                over = planned
                return note(f"{directory} is prepared already")
            work = make_work(job, tokenizer, lock, part, parts)
        encode_part(work, config.threads or max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        with FileLock(partial / "plan.lock"):
            meta = finish(job, work, part, parts)
            over = meta is not None
        return meta
    except UserError:
        over = parts == 1 and lock.is_locked
        raise
    except FileNotFoundError:
        if not partial.exists() and parts > 1 and job.is_done():  # the last part has just removed it
            return None
        raise
    finally:
        lock.release()
        if over:
            remove(partial)


def digest_of(source: Source, config: PrepareConfig, kind: str, parts: int) -> str:
    """A name for the result: the same source and settings have the same on every machine."""
    read = read_options(config), config.val_fraction, config.dedup, config.shard_tokens, parts
    once = secrets.token_hex(8) if source.once else None
    described = FORMAT, source.description, source.files, read, kind, config.vocab_size if kind == "bpe" else None, once
    return hashlib.sha256(repr(described).encode("utf-8", "surrogateescape")).hexdigest()


def claim(partial: Path) -> None:
    """Create the folder of unfinished work; UserError if the user has another folder of that name."""
    partial.mkdir(parents=True, exist_ok=True)
    old = partial / "plan"  # of the version before
    ours = MARKER in (read_json(partial / "plan.json") or {}) or (old.is_file() and old.stat().st_size == 64)
    if not ours and {path.name for path in partial.iterdir()} - {"plan.lock", ".plan.json.new"}:
        raise UserError(f"{partial} exists and is not unfinished work of ours; choose another --name")


def make_work(job: Job, tokenizer: Tokenizer | None, lock: FileLock, part: int, parts: int) -> Work:
    """What this part has to do. Unfinished work for the same result is continued, any other removed."""
    config, plan = job.config, job.plan()
    new = plan.get("digest") != job.digest
    if new:
        if other := next(locked(job.partial), None):
            raise UserError(f"{job.partial} is in use for other sources or settings ({other.name} is locked)")
        write_json(job.partial / "plan.json", {MARKER: FORMAT})  # the folder is ours, and what is in it counts no more
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{job.directory} is being prepared by another process ({lock.lock_file} is locked)") from error
    if new:
        if plan.get("digest") or (job.partial / "plan").exists():
            note(f"{job.partial} has unfinished work of another text or other settings: it is removed")
        clear(job.partial, keep={"plan.json", "plan.lock", Path(lock.lock_file).name})
    source = job.source.fetched(job.partial)
    options = dataclasses.replace(
        read_options(config),
        bad_files=source.bad_files or config.bad_files,
        val_fraction=config.val_fraction or source.val_fraction,
    )
    if new:
        documents = source.count_documents(options, MANY_DOCUMENTS)
        if not documents:
            raise UserError(f"{' '.join(config.sources)}: there is no text in it")
        if source.summary:
            note(source.summary)
        plan = {MARKER: FORMAT, "digest": job.digest, "by_content": documents >= MANY_DOCUMENTS}
        tokenizer = tokenizer or make_tokenizer(job.kind, sample(source, options, job.kind), config.vocab_size)
        tokenizer.save(job.partial)
        fsync(job.partial / "tokenizer.json")
        job.shards.mkdir()
        write_json(job.partial / "plan.json", plan)
    else:
        tokenizer = Tokenizer.load(job.partial)
    options = dataclasses.replace(options, by_content=plan["by_content"])
    items = source.items(options)[part - 1 :: parts]
    return Work(job.shards, job.progress(part), part, items, options, tokenizer, config.dedup, config.shard_tokens)


def locked(partial: Path) -> Iterator[Path]:
    """The lock files of parts that other processes are working on."""
    for path in sorted(partial.glob("part-*.lock")):
        try:
            FileLock(path, blocking=False).acquire().lock.release()
        except Timeout:
            yield path


def clear(partial: Path, keep: set[str]) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in keep:
            path.unlink()


def sample(source: Source, options: ReadOptions, kind: str) -> Iterator[str]:
    """The text that a tokenizer is made from: the first part of it for bpe; char has to see every character."""
    size = 0
    for text in map(bytes.decode, source.texts(options)):
        yield text[: TRAINING_BYTES - size] if kind == "bpe" else text
        size += len(text)
        if kind == "bpe" and size >= TRAINING_BYTES:
            return


def finish(job: Job, work: Work, part: int, parts: int) -> dict | None:
    """Make the data set if all parts are done. It appears complete, or not at all."""
    done = [found for p in range(1, parts + 1) if (found := read_json(job.progress(p)) or {}).get("finished")]
    if len(done) < parts:
        return note(f"part {part} of {parts} is done; not done yet: {counted(parts - len(done), 'part')}")
    splits = {}
    for split in SPLITS:
        files = [file for found in done for file in found["splits"][split]["files"] if file["tokens"]]
        if not files:
            raise UserError(f"too little text: the {split} split is empty; give more, or another --val_fraction")
        numbers = {key: sum(found["splits"][split][key] for found in done) for key in ("tokens", "bytes", "documents")}
        splits[split] = numbers | {"files": name_files(job.shards, split, files)}
    for empty in job.shards.glob("part*.bin"):
        empty.unlink()
    work.tokenizer.save(job.shards)
    meta = write_meta(job.shards, work.tokenizer, job.kind, job.source.description, splits, job.digest)
    put_in_place(job.shards, job.directory)
    return meta


def remove(partial: Path) -> None:
    """Delete the folder at once: who waits for a lock in it never sees half of it."""
    with contextlib.suppress(OSError):  # another process does it, or has a file in it open (Windows, NFS)
        shutil.rmtree(partial.rename(f"{partial}.{os.getpid()}"), ignore_errors=True)


def part_of(given: str | None) -> tuple[int, int]:
    """Which part of how many this process does, counted from 1: as given, by the Slurm array or torchrun, or all."""
    env = os.environ
    if given is not None:
        what, match = f"--part={given}", re.fullmatch(r"(\d+)/(\d+)", given)
        part, parts = map(int, match.groups()) if match else (0, 0)
    elif "SLURM_ARRAY_TASK_COUNT" in env:
        what, first = "a Slurm array with gaps", int(env["SLURM_ARRAY_TASK_MIN"])
        part = (int(env["SLURM_ARRAY_TASK_ID"]) - first) // int(env.get("SLURM_ARRAY_TASK_STEP", 1)) + 1
        parts = int(env["SLURM_ARRAY_TASK_COUNT"])
    else:
        what, part, parts = "torchrun", int(env.get("RANK") or 0) + 1, int(env.get("WORLD_SIZE") or 1)
    if not 1 <= part <= parts:
        raise UserError(f"{what}: write --part=3/16 for the third of 16 parts")
    return part, parts


def report(directory: Path, meta: dict, seconds: float) -> None:
    """The last lines. Under torchrun the process that finishes last prints them, whatever its rank."""
    lines = []
    for split, figures in meta["splits"].items():
        tokens, documents = counted(figures["tokens"], "token"), counted(figures["documents"], "document")
        files = f" in {len(figures['files'])} files" if len(figures["files"]) > 1 else ""
        lines.append(f"{split}: {tokens} of {figures['bytes'] / figures['tokens']:.2f} bytes, {documents}{files}")
    size = sum(figures["bytes"] for figures in meta["splits"].values())
    rate = f"{size / 1e6:.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"
    lines.append(f"{directory}: {rate if size > 1e5 else f'{size:,} bytes'}, vocabulary of {meta['vocab_size']:,}")
    name, place = directory.name, f" --data_dir={shlex.quote(str(directory.parent))}"
    place = "" if directory.parent == Path("data") else place
    if name in RECIPES and not place:
        lines.append(f"next: python train.py config/{RECIPES[name]}.py")
    else:
        recipe = "train_gpt2" if meta["splits"]["train"]["tokens"] > 1e8 else "quickstart"
        lines.append(f"next: python train.py config/{recipe}.py --dataset={name}{place} --out_dir=out-{name}")
    print(escaped("\n".join(lines)), file=sys.stderr)


if __name__ == "__main__":
    run_script(main, less_memory="--threads")
