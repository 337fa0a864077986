"""What --help prints."""

import argparse
import ast
import dataclasses
import inspect
import itertools
import sys
from typing import NoReturn


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
            about, name, kind = meanings[setting.name], f"--{setting.name}", kinds[setting.name]
            if setting.name == positional:
                name, kind = positional, positional.upper()
            elif setting.default is not None:
                about += f" (default: {setting.default!r})"
            section.add_argument(name, metavar=kind, help=about.replace("%", "%%"))
    if positional not in kinds:
        parser.add_argument_group(positional.capitalize(), "Python files that assign settings; flags override them.")
    parser.print_help()
    sys.exit(0)


def docstrings(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass."""
    statements = itertools.pairwise(ast.parse(inspect.getsource(cls)).body[0].body)
    return {field.target.id: text.value.value for field, text in statements if isinstance(text, ast.Expr)}
