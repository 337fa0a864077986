"""One data set in preparation: what all processes that work on it share, and how the last one completes it.

data/.<name>.partial contains plan.json, the tokenizer, the progress of each part, and the shards. It survives a
failure: the same command continues it. Another command for the same name is refused once there is progress to lose.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import secrets
from pathlib import Path

import xxhash
from filelock import AcquireReturnProxy, FileLock, Timeout

from plaingpt.console import RunFailed, UserError, counted, note
from plaingpt.files import delete, fsync, json_or_empty, new_file, put_in_place, read_json
from plaingpt.text.config import PrepareConfig
from plaingpt.text.pipeline import Part, encode_part
from plaingpt.text.sources import Source
from plaingpt.tokenizer import Tokenizer, gpt2, make_tokenizer
from plaingpt.tokens import FORMAT_VERSION, SPLITS

FORMAT = 10  # version of the .partial directory; work in another version cannot be continued
# If validation would get at least this many documents on average, it gets entire ones; otherwise the tail of each.
MANY_VALIDATION_DOCUMENTS = 10


@dataclasses.dataclass(frozen=True)
class Job:
    """What is prepared, and which part of it by this process."""

    directory: Path
    source: Source
    config: PrepareConfig
    kind: str  # what meta.json calls the tokenizer
    tokenizer: Tokenizer | None  # if it exists already
    part: int  # from 1
    parts: int

    @functools.cached_property
    def partial(self) -> Path:
        directory = self.directory.resolve() if self.directory.is_symlink() else self.directory  # a link stays one
        return directory.with_name(f".{directory.name}.partial")

    @property
    def shards(self) -> Path:
        return self.partial / "shards"

    @functools.cached_property
    def digests(self) -> list[str]:
        """Two digests of the source and the settings, equal on every machine: with this --bad_files, and with
        --bad_files=stop. Work with either is continued: after invalid text, another --bad_files may finish it."""
        source = self.source.description, self.source.files, secrets.token_hex(8) if self.source.once else None
        ignored = dict(sources=[], name=None, part="", threads=None, data_dir="")  # no effect on ids, or in `source`
        ignored |= dict(config=None, split="", revision=None)  # in `source`, with the revision that was newest then
        config = dataclasses.replace(self.config, tokenizer=self.kind, **ignored)
        configs = config, dataclasses.replace(config, bad_files="stop")
        keys = [repr((FORMAT, source, config, self.parts)) for config in configs]
        return [hashlib.sha256(key.encode()).hexdigest() for key in keys]

    def is_done(self) -> bool:
        return json_or_empty(self.directory / "meta.json").get("plan") in self.digests

    def has_begun(self) -> bool:
        """Whether `partial` is the work of this job."""
        return json_or_empty(self.partial / "plan.json").get("digest") in self.digests and self.shards.exists()

    def is_useless(self) -> bool:
        """Whether nothing in `partial` can be continued. (Other parts may be waiting to make the plan.)"""
        return self.source.once or (self.parts == 1 and not self.shards.exists())

    def lock(self, path: Path, wait: bool = False) -> AcquireReturnProxy:
        """Acquire a lock; UserError if another process has it, unless this one may wait for it."""
        try:
            return FileLock(path, blocking=wait).acquire()
        except Timeout as error:
            raise UserError(f"{self.directory} is being prepared by another process ({path} is locked)") from error


def prepare(job: Job, threads: int) -> dict | None:
    """Do one part. The last part to finish completes the data set and returns the content of its meta.json."""
    job.partial.parent.mkdir(parents=True, exist_ok=True)
    # Locked while the plan is made and at the end. The file is outside of the directory that the last part removes.
    plan_lock = job.partial.with_suffix(".lock")
    with contextlib.ExitStack() as until_done:  # this part's lock, which outlasts the plan's, and the removal
        with job.lock(plan_lock, wait=job.parts > 1):  # the parts start together, and one makes the plan
            if job.parts > 1 and job.is_done():
                if not job.shards.exists():  # else it is the work of another command
                    remove(job)
                note(f"{job.directory} is already prepared; to prepare it again, delete it first")
                return None
            job.partial.mkdir(exist_ok=True)
            until_done.enter_context(job.lock(job.partial / f"part-{job.part}.lock"))
            until_done.push(lambda failed, *_: remove(job) if failed and job.is_useless() else None)
            part = make_part(job)
            if part.finished:  # by an earlier process, perhaps interrupted before it completed the data set
                return finish(job, part)
        encode_part(part, threads)
        with job.lock(plan_lock, wait=True):
            return finish(job, part)


def make_part(job: Job) -> Part:
    """Continue this part, or begin it."""
    has_begun = job.has_begun()
    if not has_begun:
        remove_other_work(job)
    source = job.source.fetched(job.partial, job.config)
    if has_begun:  # GPT-2's own encodes faster than a loaded one
        tokenizer = gpt2() if job.kind == "gpt2" else Tokenizer.load(job.partial)
    else:
        tokenizer = make_plan(job, source)
    by_content = read_json(job.partial / "plan.json")["by_content"]
    inputs = source.inputs()[job.part - 1 :: job.parts]
    return Part(job.shards, job.partial / f"part-{job.part}.json", job.part, inputs, job.config, tokenizer, by_content)


def remove_other_work(job: Job) -> None:
    """Empty `partial`, except for locks. UserError if progress would be lost, or if another process works there."""
    for path in job.partial.glob("part-*.lock"):
        if int(path.stem[5:]) != job.part:
            job.lock(path).lock.release()
    if job.shards.exists():
        plan = json_or_empty(job.partial / "plan.json")
        problem = f"{job.partial} contains unfinished work on {plan.get('source', 'another text'):.300}"
        if any(job.partial.glob("part-*.json")) and not plan.get("once"):
            remedy = "finish it with the same text, settings and --revision, or delete that directory to start over"
            raise UserError(f"{problem}, with other settings or before it changed: {remedy}")
        note(f"{problem}: removing it")
    (job.partial / "plan.json").unlink(missing_ok=True)  # first: without it, the rest is ignored
    for path in job.partial.iterdir():
        if path.suffix != ".lock":
            delete(path)


def make_plan(job: Job, source: Source) -> Tokenizer:
    """Decide how documents are divided, make the tokenizer, and save both in `partial`."""
    many = math.ceil(MANY_VALIDATION_DOCUMENTS / job.config.val_fraction)
    digests = set()  # of different documents; of a large text file, of its first piece
    texts = (itertools.takewhile(lambda text: text.start == 0, found.texts(job.config)) for found in source.inputs())
    for text in itertools.chain.from_iterable(texts):
        digests.add(xxhash.xxh3_64_intdigest(text.data))
        if len(digests) >= many:
            break
    if not digests:
        raise UserError(f"{source.description:.300} contains no text")
    tokenizer = job.tokenizer or make_tokenizer(job.kind, source.texts(job.config), job.config.vocab_size)
    if job.tokenizer:
        texts = [text[:10_000] for text in itertools.islice(source.texts(job.config), 20)]
        if any(tokenizer.decode(tokenizer.encode(text)).strip() != text.strip() for text in texts):
            note("the tokenizer does not reproduce this text exactly: bits per byte will be too low")
    tokenizer.save(job.partial)
    for path in job.partial.glob("tokenizer*.json"):
        fsync(path)
    job.shards.mkdir()
    with new_file(job.partial / "plan.json") as file:  # last: it means that the rest is complete
        plan = {"digest": job.digests[0], "source": source.description, "once": source.once}
        json.dump(plan | {"by_content": len(digests) >= many}, file)
    return tokenizer


def finish(job: Job, part: Part) -> dict | None:
    """Complete the data set if this was the last part: its meta.json, or None. It appears complete, or not at all."""
    if not job.has_begun():
        raise UserError(f"{job.partial} was removed or replaced by another process; run again")
    part.save()
    progress = [json_or_empty(job.partial / f"part-{number}.json") for number in range(1, job.parts + 1)]
    if missing := sum(not found.get("finished") for found in progress):
        note(f"part {job.part} of {job.parts} is done; {counted(missing, 'part')} left")
        return None
    splits, shards, tokenizer = {}, job.shards, part.tokenizer
    for split in SPLITS:
        files = [file for found in progress for file in found["splits"][split]["files"]]
        if not files:
            remove(job)  # running again would give the same result
            raise UserError(f"too little text: the {split} split is empty; give more text, or another --val_fraction")
        sums = {key: sum(found["splits"][split][key] for found in progress) for key in ("tokens", "bytes", "documents")}
        for i, file in enumerate(files):
            made = shards / file["name"]
            file["name"] = f"{split}.bin" if len(files) == 1 else f"{split}_{i:06}.bin"
            if made.exists():  # not renamed before an interruption
                made.rename(shards / file["name"])
        if sum(path.stat().st_size for path in shards.glob(f"{split}*.bin")) != sums["tokens"] * part.dtype.itemsize:
            raise RunFailed(f"a file in {shards} is missing: delete {job.partial} and run every part again")
        splits[split] = sums | {"files": files}
    tokenizer.save(shards)
    meta = {
        "format_version": FORMAT_VERSION,
        "tokenizer": job.kind,
        "vocab_size": tokenizer.vocab_size,
        "dtype": part.dtype.name,
        "end_of_text": tokenizer.end_of_text,
        "source": job.source.description,
        "plan": read_json(job.partial / "plan.json")["digest"],
        "splits": splits,
    }
    (shards / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    put_in_place(shards, job.directory)
    remove(job)
    return meta


def remove(job: Job) -> None:
    """Delete `partial` and the lock of its plan."""
    with contextlib.suppress(OSError):  # Windows cannot delete an open file: there it stays
        job.partial.with_suffix(".lock").unlink(missing_ok=True)
    delete(job.partial)
