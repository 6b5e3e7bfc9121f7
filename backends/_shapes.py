"""The shape of every value of a module for stated input shapes, found with fake tensors: no data is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xdsl.dialects.builtin import ModuleOp, TensorType
from xdsl.ir import SSAValue

from ..dialects.errors import MxloomError
from ..dialects.operations._operation import Operation
from ..dialects.operations._shapes import element_of, fits, shape_of, text
from ..dialects.operations._values import torch_dtype
from ..dialects.operations.parameter import ParameterOp
from .reference import body, results

Shapes = dict[SSAValue, tuple[int, ...]]


def shapes_of(module: ModuleOp, sizes: Sequence[tuple[int, ...]]) -> Shapes:
    """Sizes of every tensor value when the module's inputs have the given `sizes`.

    Raises MxloomError where the sizes do not fit the module's inputs.
    """
    return shapes_in(values_of(module, sizes))


def shapes_in(values: Mapping[SSAValue, Any]) -> Shapes:
    """The sizes of those values that are tensors."""
    return {value: tuple(held.shape) for value, held in values.items() if isinstance(value.type, TensorType)}


def values_of(module: ModuleOp, sizes: Sequence[tuple[int, ...]]) -> dict[SSAValue, Any]:
    """Every value as `shapes_of` has it: tensors as fakes of their sizes without data, numbers as they are."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    block = body(module)
    values: dict[SSAValue, Any] = {}
    with FakeTensorMode(), torch.no_grad():
        for argument, size in zip(block.args, sizes, strict=True):
            if not fits(shape_of(argument), size):
                raise MxloomError(f'input "{argument.name_hint}" is {text(shape_of(argument))}, got {text(size)}')
            values[argument] = torch.empty(size, dtype=torch_dtype(element_of(argument)))
        for op in block.ops:
            if isinstance(op, ParameterOp):
                values[op.result] = torch.empty(shape_of(op.result), dtype=torch_dtype(element_of(op.result)))
            elif isinstance(op, Operation):
                values.update(zip(op.results, results(op, op.shape_call(), values), strict=True))
    return values
