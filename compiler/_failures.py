"""What both scripts do with errors: one message on stderr and an exit status, never a traceback unless asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from ..dialects.errors import MxloomError, first_line

INTERRUPTED = 130
"""128 and the number of SIGINT, as shells report it."""


def reported(program: str, run: Callable[[], int], *, debug: bool = False) -> int:
    """The exit status of `run`: its own, 1 or an MxloomError's own where it failed, or 130 where it was interrupted.

    With `debug` an error is raised as it came, so that Python shows where. What is no error of the input or of the
    system is a fault of mxloom, and the message says so.
    """
    _prepare_streams()
    try:
        status = run()
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _failed(program, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except Exception as error:
        if debug:
            raise
        try:
            sys.stdout.flush()
        except OSError:  # the disk is full: Python would complain once more at exit
            _drop_stdout()
        return _failed(program, *_explained(error))


def _explained(error: Exception) -> tuple[str, int]:
    if isinstance(error, MxloomError):
        return str(error), error.exit_status
    if isinstance(error, OSError):
        # one that names no file comes from a stream: files are opened by name
        return (str(error) if error.filename else f"the output cannot be written: {error.strerror or error}"), 1
    if isinstance(error, MemoryError):
        return "there is not enough memory", 1
    return f"this is a fault of mxloom: {first_line(error)}; --debug shows where", 1


def _prepare_streams() -> None:
    """Streams that a caller closed lead nowhere; a character that the terminal's encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        with suppress(AttributeError, ValueError):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Whoever read our output has gone; Python would complain when it flushes stdout at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(program: str, message: str, status: int) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return status
