"""What a user gets to read about settings: --help, and suggestions for a name or a file that does not exist."""

import dataclasses
import glob
import os
import shlex
import sys
import typing
from collections.abc import Iterable
from typing import Annotated, Any, NoReturn

from plaingpt.console import closest

TYPES = {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT"}


def show_help(cls: type, positional: str) -> NoReturn:
    """Print the fields of a dataclass with their docstrings, grouped by the dataclasses it inherits from, and exit."""
    import tyro  # a tenth of a second that nothing else needs

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def describe(info: Any) -> Any:
        kinds = [getattr(kind, "__origin__", kind) for kind in typing.get_args(info.type) or [info.type]]
        if kinds := [TYPES.get(kind, kind) for kind in kinds if kind in TYPES or isinstance(kind, str)]:
            return tyro.constructors.PrimitiveConstructorSpec(1, "|".join(kinds), str, lambda value: True, _shown)

    groups = [base for base in cls.__bases__ if dataclasses.is_dataclass(base)]
    members = [(group.__name__.removesuffix("Settings"), tyro.conf.OmitArgPrefixes[group], group()) for group in groups]
    recipes = "Python files that assign settings; flags override them" if positional == "recipes" else None
    look = tyro.conf.arg(metavar=f"[{positional.upper()} ...]", help_behavior_hint="", help=recipes)
    members.insert(0, (positional, tyro.conf.Positional[Annotated[str, look]], ""))
    bases, frozen = () if groups else (cls,), cls.__dataclass_params__.frozen
    parser = dataclasses.make_dataclass("Help", members, bases=bases, frozen=frozen)
    print(sys.modules[cls.__module__].__doc__ or "")
    config = (tyro.conf.FlagConversionOff,)
    tyro.cli(parser, args=["--help"], description="", use_underscores=True, config=config, registry=registry)


def _shown(default: Any) -> list[str]:
    return [repr(default)[1:-1] if isinstance(default, str) else str(default)]  # a line break as \n


def no_setting(name: str, source: str, cls: type, names: Iterable[str]) -> str:
    """The message for a setting that does not exist; `source` is the flag or the file that has it."""
    meant = getattr(cls, "SYNONYMS", {}).get(name, name)
    if name.startswith("no_") and name[3:] in names:
        return f"{source}: there is no setting {name}; did you mean --{name[3:]}=False?"
    if source.startswith("--"):
        return f"{source}: there is no setting {name}{closest(meant, names, '--') or '; --help lists them'}"
    remedy = closest(meant, names) or "; --help lists them, and a variable of your own begins with _"
    return f"{source}: there is no setting {name}{remedy}"


def no_recipe(path: str, cls: type) -> str:
    """The message for an argument that is not a file."""
    meant = getattr(cls, "SYNONYMS", {}).get("")
    remedy = closest(os.path.basename(path), glob.glob("*.py", root_dir="config"), "config/")
    if "=" in path:
        remedy = f"; did you mean --{path}?"
    elif os.path.isdir(path):
        remedy = f"; did you mean --out_dir={shlex.quote(path)}?"
    elif not remedy and meant and not path.endswith(".py"):
        remedy = f"; did you mean --{meant}={shlex.quote(path)}?"
    return f"{path}: no such recipe file{remedy or '; settings are written --name=value'}"
