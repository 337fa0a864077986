"""Typed settings: a dataclass filled from its defaults, then recipe files, then flags.

python train.py config/train_shakespeare_char.py --batch_size=32
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import glob
import inspect
import itertools
import os
import re
import runpy
import sys
import textwrap
import types
import typing
from typing import Annotated, Any, Literal

from plaingpt.console import UserError, closest, note, one_line


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
