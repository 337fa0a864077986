"""What a script says to a person: errors in one line, notes, exit statuses."""

import contextlib
import difflib
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


class RunFailed(Exception):
    """What no setting was wrong for: one line, and exit status 1."""


def run_script(main: Callable[[], int | None]) -> None:
    """Run `main` as the process: UserError, or a file that may not be read or written, becomes one line on
    standard error and status 2; RunFailed, and want of memory, status 1."""
    rank = os.environ.get("RANK", "0")
    for stream in (sys.stdout, sys.stderr):
        # whatever a pipe's code page is on this machine, Windows has many, and a name of a file that is no UTF-8
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        status = main()
        gc.freeze()  # Python's last search for garbage among torch's 300,000 objects takes half a second
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `python sample.py | head`
        os._exit(141)
    except Exception as error:
        if isinstance(error, PermissionError):
            error = UserError(one_line(error))
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # which is torch's
        if not out_of_memory and not isinstance(error, (UserError, RunFailed)):
            raise
        what = f"out of memory: {one_line(error)}; a smaller --batch_size needs less" if out_of_memory else error
        where = "" if rank == "0" else f" [rank {rank}]"
        line = f"{os.path.basename(sys.argv[0])}{where}: {what}"
        print(line, file=sys.stderr)
        _tell_torchrun(line)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _tell_torchrun(line: str) -> None:
    """Have torchrun's last lines repeat `line`, and not the traceback that torch's `record` left there for it."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        told = {"message": {"message": line, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            with open(f"{path}.new", "w") as file:
                json.dump(told, file)
            os.replace(file.name, path)  # torchrun ends us when another process failed, and chokes on half a file


def note(message: str) -> None:
    """Tell the person at the terminal one line; under torchrun, only rank 0 speaks."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # nobody listens any more: no reason to end
            print(message, file=sys.stderr)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def closest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """A clause that suggests the most similar of `names`; empty if none is similar."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of bounded length; its class where it says nothing."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(said.split())[:300] or type(error).__name__


def counted(n: int, thing: str) -> str:
    """How many of a thing there are, as in `1 document` and `2,000 documents`."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def millions(number: int) -> str:
    return f"{number:,}" if number < 1e5 else f"{number / 1e6:,.{2 if number < 1e7 else 0}f}M"


def perplexity(loss: float) -> str:
    value = math.exp(min(loss, 700))  # a float has no more
    return f"{value:.2f}" if value < 1e6 else f"{value:.1e}"
