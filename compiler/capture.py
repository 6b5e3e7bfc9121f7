"""Capture: a model becomes one functional FX graph in which attention is one node."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dialects.errors import MxloomError
from .attention_interface import register, structured

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

__all__ = ["CaptureError", "capture", "register", "structured"]


class CaptureError(MxloomError):
    """A model that cannot be captured: where its code stops the export, by which rule, and what to do."""


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

    wanted = _dynamic_dims(example, dynamic)
    _check_example(model, example, wanted)
    model.eval()
    shapes = {name: dict.fromkeys(dims, torch.export.Dim.AUTO) for name, dims in wanted.items()}
    with structured(model), _wide(model), torch.no_grad():
        try:
            program = _export(model, example, shapes)
        except Exception as error:
            raise CaptureError(_explain(error, model)) from error
        _check_dynamic(program, model, wanted)
        return program.run_decompositions({})


def _export(model: nn.Module, example: Mapping[str, Tensor], shapes: dict[str, Any]) -> ExportedProgram:
    import torch

    with warnings.catch_warnings():
        # torch copies its own pytree specs in a way that it deprecates itself.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        return torch.export.export(model, (), dict(example), dynamic_shapes=shapes, strict=False)


def _dynamic_dims(
    example: Mapping[str, Tensor], dynamic: bool | Mapping[str, Collection[int]]
) -> dict[str, tuple[int, ...]]:
    """The dimensions of each input that are to stay dynamic."""
    if isinstance(dynamic, Mapping):
        return {name: tuple(dynamic.get(name, ())) for name in example}
    if not dynamic:
        return dict.fromkeys(example, ())
    return {
        name: (0, 1) if tensor.ndim > 1 and not tensor.is_floating_point() else (0,) if tensor.ndim else ()
        for name, tensor in example.items()
    }


def _check_example(model: nn.Module, example: Mapping[str, Tensor], wanted: Mapping[str, Collection[int]]) -> None:
    for name, dims in wanted.items():
        for dim in dims:
            if example[name].shape[dim] < 2:
                raise CaptureError(
                    f"{type(model).__name__}: the example {name} has size {example[name].shape[dim]} in dimension "
                    f"{dim}, which shall stay dynamic\n  because a size of 0 or 1 means something else to export\n"
                    "  do: give an example of size 2 or more there"
                )


@contextmanager
def _wide(model: nn.Module) -> Iterator[None]:
    """Inside, every parameter and buffer of 16 bits is f32, rotary frequencies computed anew; afterwards as before.

    This is the guard of rotary tables: `model.to(bfloat16)` rounds `inv_freq` too, which is wrong by whole turns at
    long positions, so the captured frequencies never come from the rounded buffer.
    """
    import torch

    low = (torch.bfloat16, torch.float16)
    before = [
        (held, name, tensor)
        for part in model.modules()
        for held in (part._parameters, part._buffers)
        for name, tensor in held.items()
        if tensor is not None and tensor.dtype in low
    ]
    rebuilt = _rebuilt_buffers(model, low)
    widened: dict[int, Any] = {}
    try:
        for held, name, tensor in before:
            if id(tensor) not in widened:
                wide = rebuilt.get(id(tensor), tensor.detach().float())
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                widened[id(tensor)] = torch.nn.Parameter(wide, tensor.requires_grad) if is_parameter else wide
            held[name] = widened[id(tensor)]
        yield
    finally:
        for held, name, tensor in before:
            held[name] = tensor


def _rebuilt_buffers(model: nn.Module, low: tuple[Any, ...]) -> dict[int, Tensor]:
    """Buffers of 16 bits that no checkpoint holds, as the module's own constructor computes them from its config.

    One that does not round to what the model holds is left out: somebody has set it on purpose.
    """
    found: dict[int, Tensor] = {}
    for part in model.modules():
        buffers = {name: part._buffers[name] for name in part._non_persistent_buffers_set}
        rounded = {name: buffer for name, buffer in buffers.items() if buffer is not None and buffer.dtype in low}
        if rounded and hasattr(part, "config"):
            fresh = type(part)(part.config)
            for name, buffer in rounded.items():
                wide = fresh._buffers.get(name)
                if wide is not None and wide.shape == buffer.shape and bool((wide.to(buffer) == buffer).all()):
                    found[id(buffer)] = wide.to(buffer.device)
    return found


def _check_dynamic(program: ExportedProgram, model: nn.Module, wanted: Mapping[str, Collection[int]]) -> None:
    """Raise CaptureError where export has made a constant of a size that was to stay dynamic."""
    import torch

    inputs = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    for name, dims in wanted.items():
        tensor = inputs.get(name)
        if tensor is None:
            continue
        for dim in dims:
            size = tensor.shape[dim]
            if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
                raise CaptureError(
                    f"{type(model).__name__}: dimension {dim} of input {name} became the constant {int(size)}\n"
                    f"  at {_freezing_place(tensor, name, dim)}\n"
                    "  because that code holds only for this size\n"
                    f"  do: write it for every size (-1, or x.shape[{dim}]), or leave the dimension fixed with "
                    "capture(..., dynamic={input: dimensions})"
                )


def _freezing_place(tensor: Any, name: str, dim: int) -> str:
    return "unknown place"


def _explain(error: Exception, model: nn.Module) -> str:
    """One message: the model's own file and line, the rule, what to do."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_foreign(frame.filename)]
    where = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "unknown place"
    kind = type(error).__name__
    if "GuardOnDataDependent" in kind:
        rule = "a Python branch depends on a tensor's value"
        advice = "write it with torch.where or torch.cond, or keep the branch outside the model"
    else:
        rule = f"{kind}: {str(error).splitlines()[0][:200]}" if str(error) else kind
        advice = "export needs a forward that is free of side effects and takes the example's inputs by name"
    return f"{type(model).__name__} cannot be captured\n  at {where}\n  because {rule}\n  do: {advice}"


def _is_foreign(filename: str) -> bool:
    """Whether a frame is torch's or our own, not the model's."""
    import torch

    own = {str(Path(torch.__file__).parent), str(Path(__file__).parent)}
    return any(filename.startswith(folder) for folder in own) or filename.endswith("contextlib.py")
