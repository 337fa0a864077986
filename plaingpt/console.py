"""What a script prints for people: notes, errors on one line, and the exit status."""

import contextlib
import difflib
import errno
import gc
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator

CONNECTION_FAILED = "the connection to the other processes failed"
# RuntimeErrors of torch on CPUs (Linux, Windows) and on Apple's and NVIDIA's GPUs; OSErrors
NO_MEMORY = re.compile("can't allocate memory|not enough memory|(backend|error:) out of memory|Cannot allocate memory")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but tab and line break


class UserError(Exception):
    """A mistake of the user, whose message is one line with the remedy."""


class TooLittleMemory(UserError):
    """A model or a batch that does not fit."""


class RunFailed(Exception):
    """A failure that is not the user's mistake; its message is one line."""


def run_script(main: Callable[[], int | None], less_memory: str = "model") -> None:
    """Run `main` and exit with the status it returns.

    An error that has an explanation ends the process with one line on standard error. The status is 2 for a user's
    mistake or an unusable file, 1 for other failures. less_memory: what to reduce if memory is too small.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by `startup`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, errors in (sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"):
        if hasattr(stream, "reconfigure"):  # not in Jupyter
            stream.reconfigure(encoding="utf-8", errors=errors)
    gc.freeze()  # the collector skips what has been imported
    gc.enable()
    try:
        status = main()
        gc.freeze()  # skips Python's last garbage collection: half a second for torch's 300,000 objects
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as in `python sample.py | head`
        os._exit(141)
    except BaseException as error:
        status, message = _explain(error, less_memory)
        if not message:
            raise
        script = os.path.basename(sys.argv[0]) + ("" if is_rank_0() else f" [rank {os.environ['RANK']}]")
        line = escaped(f"{script}: {message}").replace("\n", " ")
        with contextlib.suppress(OSError):  # a closed terminal
            print(line, file=sys.stderr)
        _report_to_torchrun(line, is_cause=not message.startswith(CONNECTION_FAILED))
        sys.exit(status)


def _explain(error: BaseException, less_memory: str) -> tuple[int, str]:
    """The exit status and the message for an error; no message for one that only a traceback explains."""
    text = one_line(error)
    if isinstance(error, UserError | RunFailed):
        return 2 if isinstance(error, UserError) else 1, str(error)
    if out_of_memory(error):
        return 1, f"out of memory: {text.rpartition('DefaultCPUAllocator: ')[2]}; try a smaller {less_memory}"
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EMFILE)):
        return 2, text
    if "gloo/transport" in text or type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return 1, f"{CONNECTION_FAILED}: {text}; if one ended, its error is the cause"
    if type(error).__name__ == "PanicException":  # a Rust library's, and not an Exception
        return 1, f"a library failed: {text}"
    return 1, ""


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or bool(NO_MEMORY.search(str(error)))


def _report_to_torchrun(line: str, is_cause: bool) -> None:
    """Make torchrun end with `line` instead of the traceback that torch's `record` has written.

    is_cause: date it a second earlier than errors of other processes, which follow from it.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()) - is_cause)}}}
        with contextlib.suppress(OSError):
            with open(f"{path}.new", "w") as file:
                json.dump(report, file)
            os.replace(file.name, path)  # torchrun may read it at any time


def is_rank_0() -> bool:
    """Whether torchrun started this process as rank 0, or did not start it."""
    return (os.environ.get("RANK") or "0") == "0"


def note(message: str) -> None:
    """Print a message to standard error; under torchrun, only rank 0 does."""
    if is_rank_0():
        with contextlib.suppress(OSError):  # a closed terminal does not stop a run
            print(escaped(message), file=sys.stderr)


def escaped(text: str) -> str:
    """`text` with control characters, which names in files may contain and terminals obey, written as \\x1b."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def closest(name: str, names: Iterable[str]) -> str:
    """A clause that suggests the most similar of `names`; empty if none is similar."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(error: BaseException) -> str:
    """An exception's message on one line of at most 300 characters; its class if it has no message."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the error number
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        text += "; raise the limit: ulimit -n 10000" if error.errno == errno.EMFILE else ""
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:199]} … {text[-98:]}"  # the reason is often at the end


@contextlib.contextmanager
def errors_of_library(message: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """Turn whatever a library raises into a UserError, or another `kind`. Rust's panics are BaseExceptions."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if out_of_memory(error):
            raise
        raise kind(f"{message}: {one_line(error)}") from error


def counted(n: int, thing: str) -> str:
    """A number with its noun: 1 document, 2,000 documents."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"
