"""`mxloom-opt`: xDSL's optimiser driver with our dialect, passes and targets, and errors without tracebacks."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import IO, ClassVar, NoReturn

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass, PassPipeline
from xdsl.utils.arg_spec import parse_spec
from xdsl.utils.exceptions import ArgSpecParseError, DiagnosticException, ParseError, ShrinkException
from xdsl.xdsl_opt_main import xDSLOptMain

from ..dialects.errors import MxloomError, UsageError, first_line
from ..dialects.parsing import ModuleParser
from ._failures import reported
from .pipeline import failures_of, parse_passes
from .universe import MXLOOM_UNIVERSE, all_dialects, all_passes, all_targets, own_passes

XDSL_ERRORS = (ParseError, DiagnosticException, ShrinkException)
"""What xDSL's driver reports itself where its options ask for it."""


class MxloomOptMain(xDSLOptMain):
    """xDSL's driver, extended by what `compiler/universe.py` finds.

    Our dialect is registered even where the package runs from a checkout and announces no entry point. An output file
    is written when everything has succeeded, not before.
    """

    version_format: ClassVar[str] = "mxloom-opt built on xdsl {xdsl_version}"

    def run(self) -> None:
        self.result = _Result()
        super().run()
        if self.args.output_file is not None:
            Path(self.args.output_file).write_text(self.result.getvalue(), encoding="utf-8")

    def register_all_dialects(self) -> None:
        for name, factory in all_dialects().items():
            self.ctx.register_dialect(name, factory)

    def register_all_frontends(self) -> None:
        super().register_all_frontends()
        self.available_frontends["mlir"] = self._parse

    def _parse(self, text: IO[bytes]) -> ModuleOp:
        parser = ModuleParser(self.ctx, text.read(), self.get_input_name())
        return parser.parse_module(not self.args.no_implicit_module)

    def register_all_passes(self) -> None:
        self.available_passes = {**own_passes(), **all_passes()}

    def register_all_targets(self) -> None:
        self.available_targets |= {**MXLOOM_UNIVERSE.all_targets, **all_targets()}

    def register_all_arguments(self, arg_parser: argparse.ArgumentParser) -> None:
        super().register_all_arguments(arg_parser)
        arg_parser.description = _described(arg_parser.description)
        arg_parser.add_argument("--debug", action="store_true", help="Show the traceback of an error")
        arg_parser.error = _refused

    def prepare_input(self) -> tuple[list[tuple[IO[bytes], int]], str]:
        _check_name(self.args.input_file)
        _check_output(self.args.output_file)
        try:
            return super().prepare_input()
        except ValueError as error:
            raise UsageError(
                f"{self.get_input_name()}: {error}; the extension must be .mlir, or give -f mlir"
            ) from error

    def prepare_output(self) -> IO[str]:
        return sys.stdout if self.args.output_file is None else self.result

    def parse_chunk(self, chunk: IO[bytes], file_extension: str, start_offset: int = 0) -> ModuleOp | None:
        """The module in the text, whatever it holds; what xDSL's parser did not foresee is an error of the text too."""
        try:
            return super().parse_chunk(chunk, file_extension, start_offset)
        except (MxloomError, OSError, MemoryError, *XDSL_ERRORS):
            raise
        except UnicodeDecodeError as error:
            raise MxloomError(f"{self.get_input_name()}: not UTF-8 text (byte {error.start})") from error
        except Exception as error:
            raise MxloomError(f"{self.get_input_name()}: cannot be read as a module: {first_line(error)}") from error

    def setup_pipeline(self) -> None:
        super_passes, self.args.passes = self.args.passes, ""
        super().setup_pipeline()  # makes the callback that verifies, prints and times between passes
        self.args.passes = super_passes
        passes = tuple(_Guarded(step) for step in parse_passes(super_passes, all_passes()))
        self.pipeline = PassPipeline(passes, self.pipeline.callback)

    def output_resulting_program(self, prog: ModuleOp) -> str:
        """The module's text in the target's language; a target that cannot write it is named."""
        try:
            return super().output_resulting_program(prog)
        except (MxloomError, *XDSL_ERRORS):
            raise
        except Exception as error:
            name = parse_spec(self.args.target).name
            raise MxloomError(f"the target {name!r} cannot write this module: {first_line(error)}") from error


class _Result(StringIO):
    """Text for a file, still there after xDSL's driver has closed it."""

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Guarded(ModulePass):
    """A pass whose failures name it; xDSL's own errors stay what they are, since options of its driver report them."""

    step: ModulePass

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.step.name

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        with failures_of(self.step, XDSL_ERRORS):
            self.step.apply(ctx, op)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mxloom-opt`; returns the exit status: 0, 1 (input or pass failed) or 2 (usage)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return reported("mxloom-opt", lambda: _run(given), debug="--debug" in given)


def _run(given: list[str]) -> int:
    try:
        MxloomOptMain("mxloom's optimiser driver", given).run()
    except ArgSpecParseError as error:  # not an Exception; only --target's text is parsed where it can come from
        raise UsageError(f"argument -t/--target: {str(error).splitlines()[-1].strip()}") from None
    except FileNotFoundError as error:
        raise UsageError(f"there is no file {error.filename}") from error
    except XDSL_ERRORS as error:
        raise MxloomError(str(error).strip()) from error
    return 0


def _described(title: str | None) -> str:
    """What stands above the long lists of the help: which passes and targets are mxloom's own."""
    targets = ", ".join(MXLOOM_UNIVERSE.all_targets) or "none yet"
    return (
        f"{title}. mxloom's own passes, and those announced to it: {', '.join(own_passes())}. "
        f"Its own targets: {targets}. All others are xDSL's."
    )


def _check_name(name: str | None) -> None:
    if name is not None and (not name or "\0" in name):
        raise UsageError(f"{name!r} is no file's name")


def _check_output(name: str | None) -> None:
    """Refuse what could not be written, before the work and not after it."""
    _check_name(name)
    if name is not None and (Path(name).is_dir() or not Path(name).parent.is_dir()):
        raise UsageError(f"-o {name}: it must name a file in a folder that is there")


def _refused(message: str) -> NoReturn:
    raise UsageError(f"{message}; see mxloom-opt --help")
