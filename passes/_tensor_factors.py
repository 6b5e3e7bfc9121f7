"""Factors of whole tensors (NVFP4) as multiplications by powers of two that are known before hardware is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, log2
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import FloatAttr, NoneAttr, StringAttr, TensorType, f64
from xdsl.ir import SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from ..dialects.formats import BlockType, is_wide
from ..dialects.formats._element import Fixed, Minifloat
from ..dialects.formats._scale import minifloat_of_scale
from ..dialects.operations._operation import Operation
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations._values import hint_of, path_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import LinearOp, MatmulOp
from ..dialects.operations.parameter import ParameterOp
from ..dialects.operations.pointwise import MulOp
from ._ranges import Ranges
from ._sites import rounding_properties

if TYPE_CHECKING:
    from ..backends.weight_store import WeightStore

HEADROOM = 2.0
"""A computed value's blocks hold so many times what was seen, as fixed-point numbers do."""


def fold_tensor_factors(chip: list[Operation], ranges: Ranges, weights: WeightStore) -> None:
    """Give the operands of linear layers and products blocks without a factor of the tensor.

    x in blocks under a factor becomes x 2^-k in blocks without one, and the result is multiplied by 2^k. 2^k is the
    smallest power of two that is no less than the factor: (HEADROOM x) the largest magnitude / (the element's largest x
    the scale's largest). The multiplications move points alone.
    """
    folding = _Folding(ranges, weights)
    for op in chip:
        if isinstance(op, LinearOp | MatmulOp):
            names = ("input", "weight") if isinstance(op, LinearOp) else ("input", "other")
            exponent = sum(folding.operand(op, name) for name in names)
            if exponent:
                folding.result(op, exponent)


@dataclass
class _Folding:
    """The casts without a factor that stand for those with one, each with the exponent of its factor."""

    ranges: Ranges
    weights: WeightStore
    made: dict[SSAValue, tuple[SSAValue, int]] = field(default_factory=dict)

    def operand(self, op: Operation, name: str) -> int:
        """Take the factor off an operand; returns its exponent, 0 where there was none."""
        old = getattr(op, name)
        cast, format = old.owner, element_of(old)
        if not isinstance(cast, CastOp) or not is_wide(element_of(cast.input)):
            return 0
        if not isinstance(format, BlockType) or format.tensor_scale == NoneAttr():
            return 0
        if old not in self.made:
            self.made[old] = self._cast(cast, format, f"{path_of(op.results[0])}.{name}")
        new, exponent = self.made[old]
        op.operands[list(op.operands).index(old)] = new
        if not list(old.uses):
            Rewriter.erase_op(cast)
        return exponent

    def _cast(self, cast: CastOp, format: BlockType, name: str) -> tuple[SSAValue, int]:
        """A cast of the operand times 2^-k into blocks without a factor, and k."""
        if isinstance(cast.input.owner, ParameterOp):
            exponent = _exponent(self._largest(cast.input), format)
            value = self._parameter(cast.input, -exponent)
        else:
            exponent = _exponent(HEADROOM * self.ranges.largest.get(cast.input, 0.0), format)
            value = self._times(cast.input, -exponent, name, InsertPoint.before(cast))
        type = TensorType(BlockType.of(format.dims, format.element, format.scale), shape_of(value))
        new = CastOp.build(operands=[value, None], result_types=[type], properties=rounding_properties(cast.how()))
        new.result.name_hint = hint_of(f"{path_of(value)}.blocks")
        Rewriter.insert_op(new, InsertPoint.before(cast))
        self.ranges.largest[new.result] = self.ranges.largest.get(value, 0.0)
        return new.result, exponent

    def _largest(self, parameter: SSAValue) -> float:
        """The largest magnitude of a parameter, or of all that share its range with it."""
        if parameter in self.ranges.largest:
            return self.ranges.largest[parameter]
        assert isinstance(parameter.owner, ParameterOp)
        wide = self.weights.wide(parameter.owner.source.data)
        return float(wide.abs().max()) if wide.numel() else 0.0

    def result(self, op: LinearOp | MatmulOp, exponent: int) -> None:
        """Multiply the result by 2^`exponent`, and let the bias be added before."""
        if isinstance(op, LinearOp) and op.bias is not None:
            bias = op.bias
            if isinstance(bias.owner, ParameterOp):
                scaled = self._parameter(bias, -exponent)
            else:
                scaled = self._times(bias, -exponent, f"{path_of(op.results[0])}.bias", InsertPoint.before(op))
            op.operands[list(op.operands).index(bias)] = scaled
        old, name = op.results[0], path_of(op.results[0])
        readers = [(use.operation, use.index) for use in old.uses]
        largest = self.ranges.largest.get(old, 0.0)
        self.ranges.largest[old] = largest * 2.0**-exponent
        new = self._times(old, exponent, name, InsertPoint.after(op))
        old.name_hint = hint_of(f"{name}.scaled")
        for reader, index in readers:
            reader.operands[index] = new

    def _parameter(self, value: SSAValue, exponent: int) -> SSAValue:
        """A parameter times a power of two, as a parameter of its own."""
        owner = value.owner
        assert isinstance(owner, ParameterOp)
        source = f"{owner.source.data}.times_2^{exponent}"
        if source not in self.weights:
            self.weights.put(source, self.weights.wide(owner.source.data) * 2.0**exponent)
        new = ParameterOp.build(result_types=[value.type], properties={"source": StringAttr(source)})
        new.result.name_hint = hint_of(source)
        Rewriter.insert_op(new, InsertPoint.after(owner))
        self.ranges.largest[new.result] = self._largest(value) * 2.0**exponent
        return new.result

    def _times(self, value: SSAValue, exponent: int, name: str, where: InsertPoint) -> SSAValue:
        """A value times a power of two."""
        scalar = FloatAttr(2.0**exponent, f64)
        new = MulOp.build(operands=[value, []], result_types=[value.type], properties={"scalar": scalar})
        new.result.name_hint = hint_of(name)
        Rewriter.insert_op(new, where)
        self.ranges.moved(value, new.result)
        self.ranges.largest[new.result] = self.ranges.largest.get(value, 0.0) * 2.0**exponent
        return new.result


def _exponent(largest: float, format: BlockType) -> int:
    element = format.scaling((1,) * len(format.dims)).element
    assert isinstance(element, Fixed | Minifloat)
    reach = element.largest * minifloat_of_scale(format.scale).largest
    return ceil(log2(largest / reach)) if largest > 0 else 0
