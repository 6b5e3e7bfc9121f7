"""The command `mxloom`: finds the commands by their files, runs one, turns errors into messages and exit statuses."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import NoReturn, Protocol, cast

from .. import __version__
from ..dialects.errors import UsageError, did_you_mean
from . import commands
from ._failures import reported


class Command(Protocol):
    """A file of `compiler/commands/`: named as the command (`_` for its hyphens), heavy imports inside `run`.

    Its docstring is the command's help, `summary` the line in the list of commands.
    """

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (the run failed), 2 (usage) or 130 (interrupted)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return reported("mxloom", lambda: _run(given), debug="--debug" in given)


def all_commands() -> dict[str, Command]:
    """Every command by its name, which is its file's name with hyphens."""
    files = (found.name for found in iter_modules(commands.__path__) if not found.name.startswith("_"))
    return {file.replace("_", "-"): cast(Command, import_module(f"{commands.__name__}.{file}")) for file in files}


def _run(given: list[str]) -> int:
    known = all_commands()
    parsers = {"": _Parser("mxloom", "A quantization compiler: a number format is the element type of a tensor.")}
    parsers[""].add_argument("--version", action="version", version=f"mxloom {__version__}")
    listed = parsers[""].add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in known.items():
        parsers[name] = listed.add_parser(name, help=command.summary, description=command.__doc__)
        command.arguments(parsers[name])
    name = next((word for word in given if not word.startswith("-")), None)
    if name is not None and name not in known:
        raise UsageError(f'there is no command "{name}"{did_you_mean(name, known)}; see mxloom --help')
    parsed, rest = parsers[""].parse_known_args(given)
    if rest:
        options = parsers[parsed.command or ""]._option_string_actions
        raise UsageError(
            f'"{rest[0]}" is not understood{did_you_mean(rest[0], options)}; see mxloom {name or ""} --help'
        )
    if parsed.command is None:
        parsers[""].print_help()
        return 0
    return known[parsed.command].run(parsed)


class _Parser(argparse.ArgumentParser):
    """argparse with its errors as ours, options written in full, help as the docstrings lay it out, and `--debug`."""

    def __init__(self, prog: str, description: str | None = None):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=style, allow_abbrev=False)
        hint = "show the traceback of an error"
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=hint)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")
