"""A module that came as text: read, and checked to be one that can run, before anything else asks."""

from __future__ import annotations

from pathlib import Path

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, ModuleOp, StringAttr
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.utils.exceptions import DiagnosticException, ParseError

from ..dialects.errors import MxloomError, shortened
from ..dialects.mx import parse_module
from ..dialects.operations._operation import Operation


def read_module(path: Path, limit: int) -> ModuleOp:
    """The module in a file of at most `limit` bytes; MxloomError names the file, and the line of a fault in the text.

    xDSL's parser fails in many ways on text that nobody wrote; each is a fault of the text.
    """
    if path.stat().st_size > limit:
        raise MxloomError(f"{path}: more than {limit} bytes.")
    try:
        module = parse_module(path.read_text(encoding="utf-8"), str(path))
        check_module(module)
        return module
    except ParseError as error:
        place = error.span.input
        line = place.content[: error.span.start].count("\n") + 1  # pyright: ignore[reportArgumentType, reportCallIssue]
        raise MxloomError(f"{path}:{line}: {error.msg}") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise MxloomError(
            f"{path}: {lines[-1] if isinstance(error, DiagnosticException) else lines[0]:.500}"
        ) from error


def check_module(module: ModuleOp) -> None:
    """MxloomError unless the module is one function of mx operations with names for its outputs, each of them known.

    That is what `mxloom.compile` makes; every part of mxloom that reads a module may rely on it.
    """
    functions = list(module.body.block.ops)
    if len(functions) != 1 or not isinstance(functions[0], FuncOp):
        found = ", ".join(op.name for op in functions[:4]) or "nothing"
        raise MxloomError(f"a module holds one function and nothing else; this one holds {found}.")
    function = functions[0]
    if len(function.body.blocks) != 1:
        raise MxloomError(
            f"the function @{function.sym_name.data} must have one block, not {len(function.body.blocks)}."
        )
    block = function.body.block
    if not isinstance(block.last_op, ReturnOp):
        raise MxloomError(f"the function @{function.sym_name.data} does not end in func.return.")
    _check_outputs(function, len(block.last_op.operands))
    for op in block.ops:
        if isinstance(op, Operation):
            _check_call(op)
        elif op is not block.last_op:
            raise MxloomError(f"{op.name} is not an operation of mx, and nothing else may stand in the function.")


def _check_outputs(function: FuncOp, results: int) -> None:
    names, absent = function.attributes.get("outputs"), function.attributes.get("absent")
    if names is None:
        if results != 1 or absent is not None:
            raise MxloomError(f"the function yields {results} values without names: the attribute outputs is missing.")
        return
    found = [name for name in names if isinstance(name, StringAttr)] if isinstance(names, ArrayAttr) else []
    places = [place for place in absent if isinstance(place, IntegerAttr)] if isinstance(absent, ArrayAttr) else []
    if len(found) != results + len(places):
        raise MxloomError(
            f"outputs = {shortened(str(names))}: it must be a list of {results + len(places)} names, one for each "
            f"result{' and one for each that is absent' if places else ''}."
        )
    if absent is None:
        return
    wanted = {place.value.data for place in places}
    listed = isinstance(absent, ArrayAttr) and len(wanted) == len(absent.data) > 0
    if not listed or not wanted < set(range(len(found))):
        raise MxloomError(f"absent = {shortened(str(absent))}: it must be a list of places among the outputs.")


def _check_call(op: Operation) -> None:
    """What the operation stands for is there: a torch operator that mxloom allows, with these arguments."""
    from ..dialects.operations.parameter import ParameterOp

    if isinstance(op, ParameterOp):
        return
    try:
        op.call()
    except MxloomError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        name = next((result.name_hint for result in op.results if result.name_hint), None)
        raise MxloomError(f"{op.name}{f' %{name}' if name else ''}: {first}") from error
