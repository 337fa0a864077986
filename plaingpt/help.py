"""What a user reads about settings: --help, and suggestions for a name or a file that does not exist."""

import argparse
import ast
import dataclasses
import glob
import inspect
import itertools
import os
import shlex
import sys
from collections.abc import Iterable
from typing import NoReturn

from plaingpt.console import closest


def show_help(cls: type, positional: str, kinds: dict[str, str]) -> NoReturn:
    """Print the fields of a dataclass with their docstrings, grouped by the dataclasses it inherits from, and exit.

    kinds: what each setting accepts, for people.
    """
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s [{positional.upper()} ...] [--name=value ...]",
        description=sys.modules[cls.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for group in [base for base in cls.__bases__ if dataclasses.is_dataclass(base)] or [cls]:
        section = parser.add_argument_group("Settings" if group is cls else group.__name__.removesuffix("Settings"))
        meanings = docstrings(group)
        for setting in dataclasses.fields(group):
            about = meanings[setting.name].replace("%", "%%")
            if setting.name == positional:
                section.add_argument(positional, metavar=positional.upper(), help=about)
                continue
            if setting.default is not None:
                about += f" (default: {setting.default!r})".replace("%", "%%")
            section.add_argument(f"--{setting.name}", metavar=kinds[setting.name], help=about)
    if positional not in kinds:
        parser.add_argument_group(positional.capitalize(), "Python files that assign settings; flags override them.")
    parser.print_help()
    sys.exit(0)


def docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    lines = itertools.pairwise(ast.parse(inspect.getsource(cls)).body[0].body)
    return {
        field.target.id: text.value.value
        for field, text in lines
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def no_setting(name: str, source: str, cls: type, names: Iterable[str]) -> str:
    """The message for a setting that does not exist; `source` is the flag or the file that has it."""
    meant = getattr(cls, "SYNONYMS", {}).get(name, name)
    if name.startswith("no_") and name[3:] in names:
        return f"{source}: there is no setting {name}; did you mean --{name[3:]}=False?"
    if source.startswith("--"):
        return f"{source}: there is no setting {name}{closest(meant, names, '--') or '; --help lists them'}"
    remedy = closest(meant, names) or "; --help lists them. Start a variable of your own with _"
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
