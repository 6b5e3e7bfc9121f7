"""Convolutions as linear layers on patches: what hardware builds of them."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import StringAttr, TensorType
from xdsl.ir import Operation, SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from ..dialects.formats import is_wide
from ..dialects.instances import format_of, name_of
from ..dialects.operations._shapes import UNKNOWN, Shape, element_of, shape_of
from ..dialects.operations._values import encode, hint_of, path_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import ConvOp, LinearOp
from ..dialects.operations.movement import PermuteOp
from ..dialects.operations.parameter import ParameterOp
from ..dialects.operations.patches import PatchesOp
from ._ranges import Ranges
from ._sites import root

if TYPE_CHECKING:
    from ..backends.weight_store import WeightStore


def unfold_convolutions(operations: Iterable[Operation], ranges: Ranges, weights: WeightStore) -> None:
    """Put patches, a linear layer and a permutation in the place of each convolution that hardware has.

    Both operands are rounded again from what stands under their casts, in their own formats and by their own rules,
    blocks along a patch.
    """
    for op in operations:
        if isinstance(op, ConvOp) and why_no_patches(op) is None:
            _Unfolding(op, ranges, weights).run()


def why_no_patches(op: ConvOp) -> str | None:
    """Why a convolution does not become a linear layer on patches; None where it does."""
    if op.groups is not None and op.groups.value.data != 1:
        return f"mx.conv: {op.groups.value.data} groups have no hardware: only one"
    if len(shape_of(op.weight)) > 4:
        return "mx.conv: windows of three dimensions have no hardware: only of one or two"
    if UNKNOWN in shape_of(op.input)[1:]:
        return f"mx.conv: its input {op.input.type} has sizes that are not known: capture the model with fixed ones"
    for name in ("input", "weight"):
        value: SSAValue = getattr(op, name)
        owner = value.owner
        if not isinstance(owner, CastOp) or is_wide(element_of(value)) or not is_wide(element_of(root(value))):
            return f"mx.conv: its {name} is rounded by no cast of wide numbers: quantize it before"
        if owner.sensitivity is not None:
            return (
                f"mx.conv: the cast of its {name} has a sensitivity for each channel: only those of rows have hardware"
            )
    if not isinstance(root(op.weight).owner, ParameterOp):
        return "mx.conv: its weight is computed, and no parameter"
    return None


class _Unfolding:
    """One convolution and what takes its place."""

    def __init__(self, op: ConvOp, ranges: Ranges, weights: WeightStore) -> None:
        self.op, self.ranges, self.weights = op, ranges, weights
        self.path = path_of(op.result)

    def run(self) -> None:
        op, shape = self.op, shape_of(self.op.result)
        input = self._rounded(self._patches(), op.input)
        weight = self._rounded(self._rows(), op.weight)
        linear = LinearOp.build(
            operands=[input, weight, [] if op.bias is None else op.bias],
            result_types=[TensorType(element_of(op.result), _channels_last(shape))],
        )
        linear.attributes.update(op.attributes)
        found = self._placed(linear, self.path, op.result)
        if (seen := self.ranges.shapes.get(op.result)) is not None:
            self.ranges.shapes[found] = _channels_last(seen)
        back = PermuteOp.build(
            operands=[found],
            result_types=[op.result.type],
            properties={"dims": encode([0, len(shape) - 1, *range(1, len(shape) - 1)])},
        )
        op.result.replace_all_uses_with(self._placed(back, f"{self.path}.channels_first", op.result))
        read = (op.input, op.weight)
        Rewriter.erase_op(op)
        for value in read:
            _drop_unread(value)

    def _patches(self) -> SSAValue:
        """What the windows see of the numbers that stand under the cast."""
        op, given = self.op, root(self.op.input)
        kernel = shape_of(op.weight)[2:]
        shape = (*_channels_last(shape_of(op.result))[:-1], prod(shape_of(op.weight)[1:]))
        made = PatchesOp.build(
            operands=[given],
            result_types=[TensorType(element_of(given), shape)],
            properties={"kernel_size": encode(kernel)}
            | {name: encode(op.per_dimension(name)) for name in ("stride", "padding", "dilation")},
        )
        return self._placed(made, f"{self.path}.patches", given)

    def _rows(self) -> SSAValue:
        """The weight as a parameter of its own: a row for each output, taps and channels in the order of a patch."""
        parameter = root(self.op.weight).owner
        assert isinstance(parameter, ParameterOp)
        source = f"{parameter.source.data}.rows"
        if source not in self.weights:
            wide = self.weights.wide(parameter.source.data)
            self.weights.put(source, wide.movedim(1, -1).flatten(1).contiguous())
        made = ParameterOp.build(
            result_types=[TensorType(element_of(parameter.result), self.weights.shape(source))],
            properties={"source": StringAttr(source)},
        )
        return self._placed(made, source, parameter.result)

    def _rounded(self, value: SSAValue, old: SSAValue) -> SSAValue:
        """The value as the cast that gives `old` rounds, blocks along its last dimension."""
        cast, shape = old.owner, shape_of(value)
        assert isinstance(cast, CastOp)
        name = name_of(element_of(old))
        made = CastOp.build(
            operands=[value, None],
            result_types=[TensorType(format_of(name, rank=len(shape), dims=(-1,)), shape)],
            properties=dict(cast.properties),
        )
        return self._placed(made, f"{path_of(value)}.{name}", value)

    def _placed(self, made: Operation, path: str, like: SSAValue) -> SSAValue:
        """The result of an operation in front of the convolution; its numbers are as large as those of `like`."""
        Rewriter.insert_op(made, InsertPoint.before(self.op))
        (result,) = made.results
        result.name_hint = hint_of(path)
        if like in self.ranges.largest:
            self.ranges.largest[result] = self.ranges.largest[like]
        return result


def _channels_last(shape: Shape) -> Shape:
    return (shape[0], *shape[2:], shape[1])


def _drop_unread(value: SSAValue) -> None:
    """Erase a cast, and the parameter that stood under it alone."""
    while isinstance(value.owner, CastOp | ParameterOp) and not value.uses:
        unread = value.owner
        if isinstance(unread, CastOp):
            value = unread.input
        Rewriter.erase_op(unread)
        if isinstance(unread, ParameterOp):
            return
