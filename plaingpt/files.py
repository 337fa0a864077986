"""Files and directories that are complete or absent, and their checksums."""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from plaingpt.console import UserError, errors_of_library, note, one_line

WINDOWS = os.name == "nt"
SUMS = "SHA256SUMS"  # in the format of `sha256sum -c`
UNCHECKED = (".bin", ".md", ".png")  # token files, whose checksums are in meta.json, and what people edit


@contextlib.contextmanager
def new_file(path: Path, mode: str = "w") -> Iterator[IO]:
    """Open a file for writing ("w": UTF-8, or "wb") that replaces `path` when the block ends without an error.

    Use it for every file created in a directory that others may write to: a link that already has the name of the file
    is removed, never written through. Until the block ends, and if anything fails, `path` stays as it was.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it exists but is not a file", str(path))  # /dev/null would become one
    temporary = _sibling(path, "new")
    try:
        delete(temporary)
        with open(temporary, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError) or error.filename not in (None, str(temporary)):
            raise
        # the error names `path`, not the temporary file
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """Create a directory to fill with files; it replaces `final` when the block ends without an error.

    Until then, and if anything fails, `existing(final)` stays as it was.
    """
    final = final.resolve()
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(final, "new")
    make_way(temporary)
    temporary.mkdir()
    try:
        yield temporary
        put_in_place(temporary, final)
    except BaseException:
        delete(temporary)
        raise


def put_in_place(new: Path, final: Path) -> None:
    """Add SHA256SUMS to the directory `new`, sync it to disk and rename it to `final`, replacing what was there.

    A directory cannot be renamed over another, so for an instant only `.final.old` exists: see `existing`.
    """
    final = final.resolve()  # if `final` is a link to another disk, it remains one
    old = _sibling(final, "old")
    delete(new / SUMS)  # of an interrupted attempt
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(new.iterdir()) if path.suffix not in UNCHECKED]
    (new / SUMS).write_text("".join(lines), newline="\n")
    for path in new.iterdir():
        with contextlib.suppress(OSError):  # some file systems refuse it
            shutil.copymode(new / SUMS, path)  # files that safetensors writes are private
        fsync(path)
    fsync(new)
    if final.exists():
        make_way(old)
        rename(final, old)
    rename(new, final)
    fsync(final.parent)
    delete(old)


def rename(path: Path, new: Path) -> None:
    """Rename a file or a directory; a file may replace another. On Windows this fails while a program, such as a virus
    scanner, reads the file or one in the directory, so it is tried for some seconds."""
    for pause in (0.1, 0.3, 1, 3, None):
        try:
            return path.replace(new)
        except PermissionError:
            if not (WINDOWS and pause):
                raise
            time.sleep(pause)


def existing(final: Path) -> Path | None:
    """`final`, or the directory that an interrupted `put_in_place` left instead of it, or None."""
    old = _sibling(Path(os.path.realpath(final)), "old")
    # `final` again: a save may finish between the first two checks. os.path.isdir accepts names of any length.
    return next((path for path in (final, old, final) if os.path.isdir(path)), None)


def check_writable(directory: Path) -> None:
    """UserError if `directory`, which need not exist yet, cannot be written to. Call it before work is spent."""
    nearest = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise UserError(f"{directory} cannot be written to: {error.strerror}; choose another directory") from error


def claim(out_dir: Path) -> FileLock:
    """Lock a run's directory until `release` or the end of the process; UserError if another run has locked it."""
    lock = FileLock(out_dir / "run.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another run is still using {out_dir}; stop it, or choose another --out_dir") from error
    except PermissionError as error:
        problem = f"another user's run may be using {out_dir}: {lock.lock_file} is theirs"
        raise UserError(f"{problem}; delete it if no run is, or choose another --out_dir") from error
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    return lock


def release(lock: FileLock) -> None:
    if lock.is_locked:
        with contextlib.suppress(OSError):  # Windows cannot delete an open file
            Path(lock.lock_file).unlink()
        lock.release()


def holds_run(out_dir: Path) -> bool:
    """Whether the directory contains checkpoints of an earlier run; UserError if it contains something else or if a run
    is using it."""
    if (out_dir / SUMS).exists():
        raise UserError(f"{out_dir} is a model or a data set, not the directory of a run; choose another --out_dir")
    paths = [out_dir / "last", out_dir / "best", *out_dir.glob("step-[0-9]*[0-9]")]
    found = [directory for path in paths if (directory := existing(path))]
    is_run = any((place / name).exists() for place in found for name in ("config.json", "training.json"))
    if not is_run and (foreign := [path for path in paths if os.path.lexists(path)]):
        raise UserError(f"{foreign[0]} exists but is not a checkpoint; choose another --out_dir")
    if out_dir.is_dir():
        release(claim(out_dir))
    return is_run


def set_aside(out_dir: Path) -> None:
    """Rename the directory of an earlier run, if there is one: a new run never destroys it.

    If `out_dir` is a link, the directory is renamed on its own disk and the new run writes to that disk, too.
    """
    if holds_run(out_dir):
        directory = Path(os.path.realpath(out_dir))
        try:
            if Path.cwd().is_relative_to(directory):
                raise OSError("it is the current directory")
            free = rename_aside(directory)
            if out_dir.is_symlink():
                directory.mkdir()
        except OSError as error:  # a mount point, for example
            problem = f"{out_dir} contains an earlier run and cannot be renamed ({one_line(error)})"
            raise UserError(f"{problem}; choose another --out_dir") from error
        resume = f"--init_from=resume --out_dir={shlex.quote(str(free))}"
        note(f"moved the earlier run in {out_dir} to {free}; to continue it: {resume}")


def rename_aside(path: Path) -> Path:
    """Rename it to the first of path.1, path.2, … that does not exist. Returns the new name."""
    free = next(free for i in itertools.count(1) if not (free := Path(f"{path}.{i}")).exists())
    path.rename(free)
    return free


def check_sums(directory: Path) -> None:
    """Compare the files with SHA256SUMS, if there is one; UserError if a file is missing or was changed."""
    sums = directory / SUMS
    if not sums.is_file():
        return  # a directory that another tool made
    with errors_of_library(f"{directory} is damaged"):
        for line in sums.read_text().splitlines():
            digest, _, name = line.partition("  ")
            if sha256(path := directory / Path(name).name) != digest:  # and nothing outside of it
                problem = f"{path} is damaged: it differs from its checksum"
                raise UserError(f"{problem}; if you changed it on purpose, delete {sums}")


def read_json(path: Path) -> dict:
    """The JSON object in a file; UserError if it is missing or damaged."""
    with errors_of_library(f"{path} is missing or damaged"):
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return found


def json_or_empty(path: Path) -> dict:
    """The object in one of our files; {} if it is missing, or was left empty or truncated by a power loss.

    A file that cannot be read now is an error: it may record days of work.
    """
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Wait until the file or directory is on disk, so that what is written later may rely on it after a power loss."""
    try:
        descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)  # Windows syncs only writable files
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.EIO or not path.is_dir():  # Windows and some file systems cannot sync a directory
            raise


def _sibling(path: Path, suffix: str) -> Path:
    """A hidden name beside `path`. We delete such files without asking, and `books.old` may be somebody's copy."""
    return path.parent / f".{path.name}.{suffix}"  # `with_name` fails for "/"


def delete(path: Path) -> None:
    """Delete a file, a link (but not its target), or a directory and all it contains, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_way(path: Path) -> None:
    """Delete `path`, or rename it if that fails: its files may be another user's, or open on a network file system."""
    delete(path)
    if os.path.lexists(path):
        note(f"{path} cannot be deleted; renamed it to {rename_aside(path)}")
