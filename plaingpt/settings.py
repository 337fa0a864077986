"""Typed settings: a dataclass filled from its defaults, then recipe files, then flags.

python train.py config/train_shakespeare_char.py --batch_size=32
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import gc
import glob
import inspect
import itertools
import json
import math
import os
import re
import runpy
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong and what to do."""


class RunFailed(Exception):
    """What no setting was wrong for: one line, and exit status 1."""


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, both included; `above` excludes its own value."""

    min: float | None = None
    max: float | None = None
    above: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and abs(value) != float("inf")
        )

    def __str__(self) -> str:
        bounds = [("at least", self.min), ("at most", self.max), ("more than", self.above)]
        return " and ".join(f"{word} {bound}" for word, bound in bounds if bound is not None and bound < 2**62)


PositiveInt = Annotated[int, Range(min=1)]
NonNegativeInt = Annotated[int, Range(min=0, max=2**63 - 1)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(min=0)]
Fraction = Annotated[float, Range(min=0, max=1)]
Decay = Annotated[float, Range(min=0, max=0.999999)]


def load_settings(cls: type, argv: list[str] | None = None, positional: str = "recipes") -> tuple[Any, dict[str, str]]:
    """Return (an instance of dataclass `cls`, {name of each setting given: where it was given}).

    A positional argument is a recipe file, unless `positional` names the field of `cls` that takes
    the list of them. Raises UserError for an unknown name, a wrong type or an impossible value.
    """
    parser = _parser(cls, positional)
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    fields = _fields(cls)
    retired = getattr(cls, "RETIRED", {})
    for flag in unknown:
        if not flag.startswith("--"):
            raise UserError(f"{flag}: what is this? Settings are written --name=value")
        name = flag[2:].split("=")[0]
        raise UserError(_unknown(name, flag.split("=")[0], set(fields) - {positional}))

    values, given = {}, {}
    files = getattr(arguments, positional)
    if positional in fields:
        values[positional], files = files, []
    for path in files:
        for name, value in _read_recipe(path).items():
            if name in retired:
                note(f"{path}: {name}: {retired[name]}")
            elif name not in fields:
                raise UserError(_unknown(name, path, fields))
            else:
                values[name], given[name] = check_value(name, value, fields[name], path), path
    for name, text in vars(arguments).items():
        if name in retired and text is not None:
            note(f"--{name}: {retired[name]}")
        elif name != positional and text is not None:
            values[name] = check_value(name, _parse(text, fields[name]), fields[name], f"--{name}")
            given[name] = f"--{name}"
    return cls(**values), given


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


def closest(name: str, names: typing.Iterable[str]) -> str:
    """A clause that names the nearest of `names`, or nothing where none is near."""
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


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


def _unknown(name: str, source: str, fields: typing.Iterable[str]) -> str:
    return f"{source}: there is no setting {name}{closest(name, fields) or '; --help lists them'}"


def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _docstrings(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        valueless = re.fullmatch(r"argument (--\w+): expected one argument", message)
        remedy = "give it one with =, True or False if it is a switch"
        raise UserError(f"{valueless[1]} has no value: {remedy}" if valueless else message)


def _parser(cls: type, positional: str) -> argparse.ArgumentParser:
    module_doc = sys.modules[cls.__module__].__doc__
    parser = _Parser(
        description=module_doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage=f"%(prog)s [{positional.upper()} ...] [--setting=value ...]",
    )
    docs = _docstrings(cls)
    parser.add_argument(positional, nargs="*", help=docs.get(positional, "Python files of plain assignments"))
    for field in dataclasses.fields(cls):
        if field.name != positional:
            shown = repr(field.default)[1:-1] if isinstance(field.default, str) else field.default  # a line break as \n
            default = "" if field.default in (None, "") else f" [{shown}]"
            text = (docs[field.name] + default).replace("%", "%%")
            parser.add_argument(f"--{field.name}", metavar=_type_name(_fields(cls)[field.name]), help=text)
    for name in getattr(cls, "RETIRED", {}):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser


def _read_recipe(path: str) -> dict[str, Any]:
    """The plain values that a recipe assigns. A recipe is the user's own code, and is run."""
    if os.path.isdir(path):
        raise UserError(f"{path}: a folder, no recipe; settings are written --name=value")
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "config"
        near = difflib.get_close_matches(os.path.basename(path), glob.glob("*.py", root_dir=folder), n=1)
        remedy = f"did you mean {folder}/{near[0]}?" if near else "settings are written --name=value"
        raise UserError(f"{path}: no such recipe file; {remedy}")
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: the recipe does not run: {type(error).__name__}: {one_line(error)}") from error
    skipped = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, skipped)}


def _alternatives(hint: Any) -> tuple[list[Any], Range | None]:
    """Split a type hint into its allowed types and literals, and its range."""
    if typing.get_origin(hint) is Annotated:
        base, bounds = typing.get_args(hint)[:2]
        return _alternatives(base)[0], bounds
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [_alternatives(part) for part in typing.get_args(hint)]
        return [kind for kinds, _ in parts for kind in kinds], next((b for _, b in parts if b), None)
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint)), None
    return [hint], None


def _type_name(hint: Any) -> str:
    kinds, bounds = _alternatives(hint)
    names = [kind.__name__ if isinstance(kind, type) else str(kind) for kind in kinds if kind is not type(None)]
    return "|".join(names) + (f" ({bounds})" if bounds else "")


def _parse(text: str, hint: Any) -> Any:
    """The value that a flag's text stands for; text that fits no type stays text, for `check_value` to refuse."""
    kinds, _ = _alternatives(hint)
    if bool in kinds and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    if type(None) in kinds and text == "None":
        return None
    if int in kinds or float in kinds:
        for kind in (int, float):  # `check_value` takes 1e5 for 100000 and refuses 2.5 where it has to be whole
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def check_value(name: str, value: Any, hint: Any, source: str) -> Any:
    """`value` as the type that `hint` asks for; UserError if it is of another or outside its range."""
    kinds, bounds = _alternatives(hint)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value) if abs(value) < 1e300 else float("inf")
    if isinstance(value, float) and value.is_integer() and int in kinds:
        value = int(value)  # 1e5 is how people write 100000
    fits = any(type(value) is kind if isinstance(kind, type) else value == kind for kind in kinds)
    if not fits or (bounds and value is not None and value not in bounds):
        raise UserError(f"{source}: {name} must be {_type_name(hint)}, not {value!r}")
    return value
