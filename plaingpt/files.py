"""Directories that are whole or absent, and checksums: what checkpoints and token files both stand on."""

import contextlib
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from plaingpt.console import UserError, note, one_line

SUMS = "SHA256SUMS"  # in the form of `sha256sum -c`
UNCHECKED = (".bin", ".md", ".png")  # token files, whose sums are in meta.json, and what people read and may change


@contextlib.contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Give a new directory to fill with files; when the block ends without an error it takes the place of `final`.

    Until then, and if anything fails, `final` stays as it was.
    """
    final = Path(final).resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(final, "new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def put_in_place(whole: Path, final: Path) -> None:
    """Add SHA256SUMS to the directory `whole`, flush it to disk and let it take the place of `final`.

    For an instant only `.final.old` exists, since no directory is renamed over a full one: `existing` looks there too.
    """
    final = Path(final).resolve()  # a link, to another disk say, stays a link
    old = _sibling(final, "old")
    (whole / SUMS).unlink(missing_ok=True)  # of an attempt before
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(whole.iterdir()) if path.suffix not in UNCHECKED]
    (whole / SUMS).write_text("".join(lines))
    for path in [*whole.iterdir(), whole]:
        flush(path)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)  # a leftover: `final` is there, so it is not needed
        final.rename(old)
    whole.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def existing(final: Path) -> Path | None:
    """`final`, or what an interrupted `whole_directory` left in its place, or None."""
    final = Path(final)
    return next((path for path in (final, _sibling(Path(os.path.realpath(final)), "old")) if path.is_dir()), None)


def claim(out_dir: Path) -> FileLock:
    """The lock of a run's folder, held until `release` or the end of the process; UserError while a run has it."""
    lock = FileLock(out_dir / "run.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another run is still going on in {out_dir}; end it, or choose another --out_dir") from error
    except (OSError, NotImplementedError):
        pass  # a disk that knows no locks; if nothing can be written there, others tell so
    return lock


def release(lock: FileLock) -> None:
    with contextlib.suppress(OSError):  # on Windows a file that is open stays
        Path(lock.lock_file).unlink()
    lock.release()


def set_aside(out_dir: Path) -> None:
    """An earlier run in the same folder is kept under another name: a new run never destroys it."""
    if (out_dir / SUMS).exists():
        raise UserError(f"{out_dir} is a model or a data set, not the folder of a run; choose another --out_dir")
    if out_dir.is_dir():
        release(claim(out_dir))
    if existing(out_dir / "last") or existing(out_dir / "best") or next(out_dir.glob("step-*"), None):
        free = next(path for i in itertools.count(1) if not (path := Path(f"{out_dir}.{i}")).exists())
        try:
            out_dir.rename(free)
        except OSError as error:  # a mount point, say
            raise UserError(
                f"{out_dir} holds an earlier run and cannot be renamed; choose another --out_dir"
            ) from error
        note(f"{out_dir} held an earlier run: it is now {free} (--init_from=resume goes on with a run)")


def check_sums(directory: Path) -> None:
    """Compare the files with SHA256SUMS, where there is one; UserError if one is missing or another than was written.

    Token files are not in it: they can be huge, and meta.json has their sums, which are compared once for each
    state of a file. Nor is a model's card with its picture.
    """
    sums = directory / SUMS
    if not sums.is_file():
        return  # a directory that other tools made
    try:
        expected = dict(reversed(line.split("  ", 1)) for line in inside(directory, SUMS).read_text().splitlines())
        changed = [name for name, digest in expected.items() if sha256(inside(directory, name)) != digest]
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} is damaged: {error}") from error
    if changed:
        raise UserError(
            f"{directory / changed[0]} is not as it was written: it is damaged; "
            f"if you changed it on purpose, remove {sums}"
        )


def inside(directory: Path, name: str) -> Path:
    """The file `name` of `directory`; UserError if it is missing, not a file, or leads out of the directory.

    A directory may be a stranger's: neither a name written in it nor a link makes us read elsewhere,
    and nobody waits for a pipe. The hub's cache is made of links, from snapshots/ to blobs/ beside it.
    """
    path, home = directory / name, directory.resolve()
    home = home.parents[1] if home.parent.name == "snapshots" else home
    try:
        if Path(name).name != name or not path.resolve().is_relative_to(home):
            raise UserError(f"{path} leads out of {directory}: it is not followed; put the file itself there")
        if not path.is_file():
            raise UserError(f"{path} is missing or damaged: {'not a file' if path.exists() else 'no such file'}")
    except (OSError, RuntimeError, ValueError) as error:  # no permission, links in a circle, a name that cannot be
        raise UserError(f"{path} is missing or damaged: {one_line(error)}") from error
    return path


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sibling(path: Path, suffix: str) -> Path:
    """A hidden name, which is removed without asking: `books.old` may be somebody's copy."""
    return path.parent / f".{path.name}.{suffix}"  # `with_name` has no answer for "/"


def flush(path: Path) -> None:
    """Have the file or directory on the disk itself, for what is written later to rely on it after a loss of power."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no way to flush a directory
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
