"""Capture: a model becomes one functional FX graph in which attention is one node."""

from __future__ import annotations

import inspect
import io
import sys
import threading
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

from ..dialects.errors import MxloomError, did_you_mean, first_line
from ._quiet import quiet_torch
from .attention_interface import register, structured
from .decomposition import decomposed
from .dynamic_sizes import Dims, advice, dynamic_dims, frozen, model_frame
from .part_counts import uncovered
from .placeholders import beside, on_meta, placed
from .precision import wide, widened
from .products import composites

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

__all__ = ["CaptureError", "capture", "register", "structured"]


_CAPTURING = threading.RLock()


class CaptureError(MxloomError):
    """A model that cannot be captured: where its code stops the export, by which rule, and what to do."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off and running statistics are used; afterwards each part has the mode it had."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def capture(
    model: nn.Module, example: Mapping[str, Tensor], *, dynamic: bool | Mapping[str, Collection[int]] = True
) -> ExportedProgram:
    """The model's forward as a functional graph, in f32, for inputs by the names of forward's arguments.

    `dynamic` says which sizes may change later: True, the batch (dimension 0) of every input and the length
    (dimension 1) of every input of integers or booleans; a mapping, the dimensions of each input; False, none. The
    example's dynamic sizes must be 2 or more. Raises CaptureError with the line of the model's code that stops the
    export, or that makes a constant of a size which should stay dynamic.
    """
    import torch

    _check_arguments(model, example)
    example = _apart(beside(model, widened(example)))
    wanted = dynamic_dims(example, dynamic)
    _check_example(model, example, wanted)
    without_values = on_meta(model)
    shapes = {name: dict.fromkeys(dims, torch.export.Dim.AUTO) for name, dims in wanted.items()}

    def export() -> ExportedProgram:
        return torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)

    # What export switches on holds for the whole process, so one thread captures at a time.
    with _CAPTURING, _evaluating(model), structured(model), wide(model), placed(model), _plain_modes(), quiet_torch():
        try:
            # torch prints the graph so far to stderr before it raises; the error says it better.
            with redirect_stderr(io.StringIO()) as printed:
                program = export()
        except Exception as error:
            fault = None if without_values else _fault_of_example(model, example)
            raise CaptureError(fault or _explain(error, model)) from error
        sys.stderr.write(printed.getvalue())
        found = frozen(program, wanted, export) or uncovered(program, wanted, export)
        if found is not None:
            raise CaptureError(
                f"{type(model).__name__}: {found.rule}\n  at {_place(found.frame)}\n"
                "  because that code was captured for the example's sizes and holds for no others\n"
                "  do: write it for every size (-1, or the input's own shape), or name the dimensions that may change: "
                f"{advice(found, example, wanted)}"
            )
        try:
            return _functional(program, wanted)
        except Exception as error:
            raise CaptureError(_explain(error, model)) from error


def _functional(program: ExportedProgram, wanted: Dims) -> ExportedProgram:
    """The program in functional operators; einsum and its like as the product that they are, if no size gets fixed."""
    rewritten = decomposed(program, composites())
    return rewritten if frozen(rewritten, wanted, lambda: None) is None else decomposed(program)


@contextmanager
def _plain_modes() -> Iterator[None]:
    """No gradients, and no autocast of a caller: it would become part of the model."""
    import torch

    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _apart(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The example with a tensor of its own for each name: export makes one input of one tensor given twice."""
    return {name: tensor.view(tensor.shape) for name, tensor in example.items()}


def _check_example(model: nn.Module, example: Mapping[str, Tensor], wanted: Dims) -> None:
    for name, dims in wanted.items():
        for dim in dims:
            if example[name].shape[dim] < 2:
                raise CaptureError(
                    f"{type(model).__name__}: the example {name} has size {example[name].shape[dim]} in dimension "
                    f"{dim}, which shall stay dynamic\n  because a size of 0 or 1 means something else to export\n"
                    "  do: give an example of size 2 or more there"
                )


def _check_arguments(model: nn.Module, example: Mapping[str, Tensor]) -> None:
    """Every input is a tensor and an argument of forward, and every argument without a default is given."""
    import torch

    for name, value in example.items():
        if not isinstance(value, torch.Tensor):
            raise CaptureError(
                f"{type(model).__name__}: the example's {name!r} is a {type(value).__name__}; every input is a tensor. "
                "Other arguments of forward: wrap the model in a module that sets them"
            )
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    named = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY)]
    unknown = [name for name in example if name not in named]
    if unknown:
        raise CaptureError(
            f"{type(model).__name__}: the example has {unknown[0]!r}, which is no argument of its forward"
            f"{did_you_mean(unknown[0], named)}; these are: {', '.join(named)}"
        )
    missing = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in example]
    if missing:
        raise CaptureError(f"{type(model).__name__}: the example lacks {missing[0]!r}, which its forward needs")


def _fault_of_example(model: nn.Module, example: Mapping[str, Tensor]) -> str | None:
    """The message where the model itself, run as it is, does not take the example."""
    try:
        model(**example)
    except Exception as error:
        where = _place(model_frame(traceback.extract_tb(error.__traceback__)))
        return (
            f"{type(model).__name__} does not run on the example: {first_line(error)}\n  at {where}\n"
            f"  do: give example inputs that model(**example) takes; these have the shapes {_shapes(example)}"
        )
    return None


def _shapes(example: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in example.items())


def _explain(error: Exception, model: nn.Module) -> str:
    """One message: the model's own file and line, the rule, what to do."""
    kind = type(error).__name__
    if "GuardOnDataDependent" in kind:
        rule = "a Python branch depends on a tensor's value"
        advice = "write it with torch.where or torch.cond, or keep the branch outside the model"
    else:
        rule = first_line(error)
        if isinstance(error, IndexError | AssertionError):
            rule = f"torch's export does not take it ({rule}); gradient modes that a forward sets "
            rule += "(torch.no_grad, torch.set_grad_enabled) are known for that"
        advice = "export needs a forward that is free of side effects and takes the example's inputs by name"
    where = _place(model_frame(traceback.extract_tb(error.__traceback__)))
    return f"{type(model).__name__} cannot be captured\n  at {where}\n  because {rule}\n  do: {advice}"


def _place(frame: Any) -> str:
    return "a place that torch does not tell" if frame is None else f"{frame.filename}:{frame.lineno}: {frame.line}"
