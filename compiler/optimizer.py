"""`mxloom-opt`: xDSL's optimiser driver with our dialect, passes and targets, and errors without tracebacks."""

import os
import sys
from collections.abc import Sequence
from typing import IO, ClassVar

from xdsl.passes import PassPipeline
from xdsl.utils.exceptions import DiagnosticException, ParseError, VerifyException
from xdsl.xdsl_opt_main import xDSLOptMain

from ..dialects.errors import MxloomError, UsageError
from .pipeline import parse_passes
from .universe import all_dialects, all_passes, all_targets


class MxloomOptMain(xDSLOptMain):
    """xDSL's driver, extended by what `compiler/universe.py` finds.

    Our dialect is registered even where the package runs from a checkout and announces no entry point.
    """

    version_format: ClassVar[str] = "mxloom-opt built on xdsl {xdsl_version}"

    def register_all_dialects(self) -> None:
        for name, factory in all_dialects().items():
            self.ctx.register_dialect(name, factory)

    def register_all_passes(self) -> None:
        self.available_passes.update(all_passes())

    def register_all_targets(self) -> None:
        self.available_targets.update(all_targets())

    def prepare_input(self) -> tuple[list[tuple[IO[bytes], int]], str]:
        try:
            return super().prepare_input()
        except ValueError as error:
            raise UsageError(
                f"{self.get_input_name()}: {error}; the extension must be .mlir, or give -f mlir"
            ) from error

    def setup_pipeline(self) -> None:
        super_passes, self.args.passes = self.args.passes, ""
        super().setup_pipeline()  # makes the callback that verifies, prints and times between passes
        self.args.passes = super_passes
        self.pipeline = PassPipeline(parse_passes(super_passes), self.pipeline.callback)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `mxloom-opt`; returns the exit status: 0, 1 (input or pass failed) or 2 (usage)."""
    try:
        MxloomOptMain("mxloom's optimiser driver", arguments).run()
    except MxloomError as error:
        return _failed(str(error), error.exit_status)
    except (ParseError, DiagnosticException, VerifyException) as error:
        return _failed(str(error).strip(), 1)
    except FileNotFoundError as error:
        return _failed(f"there is no file {error.filename}", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _failed(message: str, status: int) -> int:
    print(f"mxloom-opt: {message}", file=sys.stderr)
    return status
