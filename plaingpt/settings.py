"""Typed settings: a dataclass filled from its defaults, then recipe files, then flags; and `--help`.

python train.py config/train_shakespeare_char.py --batch_size=32
"""

import argparse
import ast
import builtins
import contextlib
import dataclasses
import glob
import inspect
import itertools
import math
import os
import runpy
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple, NoReturn

from plaingpt.console import UserError, closest, note, one_line


class Range(NamedTuple):
    """Which numbers a setting accepts: in words, and as a test, which has to reject infinity and NaN."""

    words: str
    accepts: Callable[[float], bool]


PositiveInt = Annotated[int, Range("at least 1", lambda n: 1 <= n < 2**63)]
Size = Annotated[int, Range("from 1 to 1,048,576", lambda n: 1 <= n <= 2**20)]
NonNegativeInt = Annotated[int, Range("at least 0", lambda n: 0 <= n < 2**63)]
Positive = Annotated[float, Range("above 0, at most 1e30", lambda x: 0 < x <= 1e30)]
NonNegative = Annotated[float, Range("from 0 to 1e30", lambda x: 0 <= x <= 1e30)]
Fraction = Annotated[float, Range("from 0 to 1", lambda x: 0 <= x <= 1)]
BelowOne = Annotated[float, Range("from 0 to 0.999999", lambda x: 0 <= x <= 0.999999)]
PathName = Annotated[str, os.path.expanduser]  # ~ is the home directory, as in a shell
SWITCH = {"true": True, "1": True, "false": False, "0": False}


def load_settings(cls: type, argv: list[str] | None = None, positional: str = "recipes") -> tuple[Any, dict[str, str]]:
    """Return an instance of dataclass `cls`, and for each setting that was given the file or flag it came from.

    Positional arguments are recipes, or elements of the field `positional`. `cls.RETIRED`: why a name is ignored.
    """
    argv = sys.argv[1:] if argv is None else argv
    hints = typing.get_type_hints(cls, include_extras=True)
    hints = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    if {"-h", "--help"} & {*argv}:
        _show_help(cls, positional, hints)
    retired, values, given = getattr(cls, "RETIRED", {}), {}, {}
    # Retired names count as switches: the word after one is not its value.
    files, flags = _split(argv, hints | dict.fromkeys(retired, bool))
    if hint := hints.pop(positional, None):
        values[positional], files = [check_value(positional, file, hint, file) for file in files], []
    # A generator: a recipe runs after `values` has the assignments of those before it, which it can read.
    from_recipes = ((path, name, value) for path in files for name, value in _read_recipe(path, cls, values).items())
    from_flags = ((f"--{name}", name, _parse(text, hints.get(name))) for name, text in flags)
    for source, name, value in itertools.chain(from_recipes, from_flags):
        if name in retired:
            note(f"{named(source, name)}: {retired[name]}")
        elif name in hints:
            values[name], given[name] = check_value(name, value, hints[name], source), source
        else:
            raise UserError(_no_setting(name, source, hints))
    return cls(**values), given


def named(source: str, name: str) -> str:
    """A setting as messages name it: its flag, or the file that sets it and its name."""
    return source if source in (name, f"--{name}") else f"{source}: {name}"


def flags_of(given: dict[str, str]) -> dict[str, str]:
    """The settings in `given` that came from flags, not from recipes."""
    return {name: source for name, source in given.items() if source.startswith("--")}


def _split(argv: list[str], hints: dict[str, Any]) -> tuple[list[str], list[tuple[str, str]]]:
    """The files, and the name and text of each flag: --name=text, --name text, or --name alone if it is a switch."""
    files, flags, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        name = flag[2:].replace("-", "_")
        if word == "-" or not word.startswith("-"):
            files.append(word)
        elif not word.startswith("--"):
            raise UserError(f"{word}: flags begin with --")
        elif name not in hints:
            raise UserError(_no_setting(name, flag, hints))
        elif equals:
            flags.append((name, text))
        elif bool in _leaves(hints[name]) and (words[0] if words else "").lower() not in (*SWITCH, "none"):
            flags.append((name, "True"))
        elif words and not words[0].startswith("--"):
            flags.append((name, words.pop(0)))
        else:
            raise UserError(f"{flag} needs a value: {flag}=…")
    return files, flags


def _no_setting(name: str, source: str, names: Iterable[str]) -> str:
    own = "" if source.startswith("--") else f" (for a variable of your own, write _{name})"
    return f"{source}: unknown setting {name}{closest(name, names) or '; --help lists them'}{own}"


def _read_recipe(path: str, cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """Run a recipe, the user's own code, with the names that nanoGPT gave it, and return what it assigns."""
    if not os.path.isfile(path):
        near = closest(os.path.basename(path), glob.glob("*.py", root_dir="config")).replace("mean ", "mean config/")
        near, example = ("", f", such as --out_dir={path}") if os.path.isdir(path) else (near, "")
        raise UserError(f"{path}: recipe not found{near}; settings are written --name=value{example}")
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    modules = {name: sys.modules.get(name) for name in ("os", "sys", "time", "math", "torch", "numpy")}
    modules["np"] = modules.pop("numpy")
    try:  # as builtins, so that only the recipe's own assignments are among its names
        names = runpy.run_path(path, {"__builtins__": vars(builtins) | modules | defaults | values})
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = f", line {lines[-1]}" if lines else ""
        raise UserError(f"{path}{line}: the recipe failed: {type(error).__name__}: {one_line(error)}") from error
    skipped = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    kept = {name: value for name, value in names.items() if name[0] != "_" and not isinstance(value, skipped)}
    # NumPy's and torch's numbers become Python's
    return {name: value.item() if getattr(value, "shape", None) == () else value for name, value in kept.items()}


def _leaves(hint: Any) -> list[Any]:
    """What a type hint consists of: types, the values of a Literal, and what Annotated adds."""
    return [leaf for part in typing.get_args(hint) for leaf in _leaves(part)] or [hint]


def _kinds(hint: Any) -> str:
    """What a setting accepts, for people: `int`, `float`, `ddp|fsdp`."""
    kinds = [leaf for leaf in _leaves(hint) if isinstance(leaf, type | str) and leaf is not types.NoneType]
    return "|".join("True|False" if kind is bool else getattr(kind, "__name__", kind) for kind in kinds)


def _parse(text: str, hint: Any) -> Any:
    """The value of a flag's text. Text that fits no type stays text, for `check_value` to refuse."""
    allowed = _leaves(hint)
    with contextlib.suppress(ValueError, KeyError):
        if text in ("None", "none") and types.NoneType in allowed:
            return None
        if bool in allowed:
            return SWITCH[text.lower()]
        if int in allowed or float in allowed:
            return int(text) if text.lstrip("+-").isdigit() else float(text)
    return text


def check_value(name: str, value: Any, hint: Any, source: str) -> Any:
    """`value` as the type that `hint` asks for. Raises UserError if it has another type or is out of range."""
    allowed, setting = _leaves(hint), named(source or name, name)
    if type(value) is int and float in allowed:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is float and int in allowed and value.is_integer():
        value = int(value)  # people write 1e5 for 100000
    ranges = [leaf for leaf in allowed if isinstance(leaf, Range)]
    fits = type(value) in allowed or (type(value) is str and value in allowed)
    if not fits or (value is not None and not all(numbers.accepts(value) for numbers in ranges)):
        wanted = _kinds(hint) + "".join(f" ({numbers.words})" for numbers in ranges)
        raise UserError(f"{setting} must be {wanted}, not {value!r:.100}")
    if value is None or os.path.expanduser not in allowed:  # not a PathName
        return value
    if not value:
        raise UserError(f"{setting} is empty")
    return os.path.expanduser(value)


def _show_help(cls: type, positional: str, hints: dict[str, Any]) -> NoReturn:
    """Print the fields of a dataclass with their docstrings, grouped by the dataclasses it inherits from, and exit."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s [{positional.upper()} ...] [--name=value ...]",
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for group in [base for base in cls.__bases__ if dataclasses.is_dataclass(base)] or [cls]:
        section = parser.add_argument_group("Settings" if group is cls else group.__name__.removesuffix("Settings"))
        meanings = _docstrings(group)
        for setting in dataclasses.fields(group):
            about, name, kind = meanings[setting.name], f"--{setting.name}", _kinds(hints[setting.name])
            if setting.name == positional:
                name, kind = positional, positional.upper()
            elif setting.default is not None:
                about += f" (default: {setting.default!r})"
            section.add_argument(name, metavar=kind, help=about.replace("%", "%%"))
    if positional not in hints:
        parser.add_argument_group(positional.capitalize(), "Python files that assign settings; flags override them.")
    parser.print_help()
    sys.exit(0)


def _docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    statements = itertools.pairwise(ast.parse(inspect.getsource(cls)).body[0].body)
    return {field.target.id: text.value.value for field, text in statements if isinstance(text, ast.Expr)}
