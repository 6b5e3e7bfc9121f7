"""Operations on each element alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, StringAttr, TensorType, f64
from xdsl.ir import Attribute
from xdsl.irdl import (
    AttrConstraint,
    BaseAttr,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
)

from ..integer_attribute import IntegerMeaningAttr
from ._integer_meaning import pair, require_exponential, require_fixed, require_table
from ._operation import Call
from ._shapes import Shape, broadcast, element_of, shape_of, text
from ._torch_operation import Argument, Aten, TorchOperation
from ._values import torch_dtype

NUMBER: AttrConstraint = BaseAttr(IntegerAttr) | BaseAttr(FloatAttr)
"""A number as Python wrote it: 2 and 2.0 stay apart."""

_SECOND = {"other": ("other", "scalar")}


class Pointwise(TorchOperation):
    """One tensor in, each element changed alone."""

    input = operand_def(TensorType)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        return shape_of(self.input)


class Curve(Pointwise):
    """A function that hardware computes from a table where the property `integer` says so."""

    integer = opt_prop_def(IntegerMeaningAttr)

    def curve(self) -> str:
        """The function's name in `integer.CURVES`."""
        return self.name.removeprefix("mx.")

    def check(self) -> None:
        if self.integer is not None:
            require_fixed(self, {"input": self.input, "result": self.result})
            require_table(self, self.curve(), self.input, self.result, self.integer)

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_meanings import curve

        formats = (pair(self.input), pair(self.result))
        return Call(curve, (self.input, self.curve(), *formats, self.integer.table_bits.data), {}, f64)

    def shape_call(self) -> Call:
        return super().call()


class Binary(TorchOperation):
    """Two tensors that broadcast, or a tensor and a number (`scalar`)."""

    input = operand_def(TensorType)
    other = opt_operand_def(TensorType)
    scalar = opt_prop_def(NUMBER)
    result = result_def(TensorType)

    def check(self) -> None:
        self.require(
            (self.other is None) != (self.scalar is None),
            "needs one second operand: either a tensor or scalar = number",
        )
        if self.other is not None:
            one, other = shape_of(self.input), shape_of(self.other)
            self.require(broadcast(one, other) is not None, f"{text(one)} and {text(other)} do not broadcast")

    def result_shape(self) -> Shape | None:
        return shape_of(self.input) if self.other is None else broadcast(shape_of(self.input), shape_of(self.other))


@irdl_op_definition
class AddOp(Binary):
    """input + other."""

    name = "mx.add"
    ATEN: ClassVar = (Aten("aten.add.Tensor", names=_SECOND, implied={"alpha": 1}),)


@irdl_op_definition
class SubOp(Binary):
    """input - other."""

    name = "mx.sub"
    ATEN: ClassVar = (Aten("aten.sub.Tensor", names=_SECOND, implied={"alpha": 1}),)


@irdl_op_definition
class MulOp(Binary):
    """input · other."""

    name = "mx.mul"
    ATEN: ClassVar = (Aten("aten.mul.Tensor", names=_SECOND),)


@irdl_op_definition
class DivOp(Binary):
    """input / other."""

    name = "mx.div"
    ATEN: ClassVar = (Aten("aten.div.Tensor", names=_SECOND),)


@irdl_op_definition
class NegOp(Pointwise):
    """-input."""

    name = "mx.neg"
    ATEN: ClassVar = (Aten("aten.neg.default"),)


@irdl_op_definition
class ExpOp(Pointwise):
    """e to the input."""

    name = "mx.exp"
    ATEN: ClassVar = (Aten("aten.exp.default"),)

    integer = opt_prop_def(IntegerMeaningAttr)

    def check(self) -> None:
        if self.integer is not None:
            require_fixed(self, {"input": self.input, "result": self.result})
            require_exponential(self, pair(self.input))

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_meanings import exponential

        formats = (pair(self.input), pair(self.result))
        return Call(exponential, (self.input, *formats, self.integer.table_bits.data), {}, f64)

    def shape_call(self) -> Call:
        return super().call()


@irdl_op_definition
class ReluOp(Pointwise):
    """max(input, 0)."""

    name = "mx.relu"
    ATEN: ClassVar = (Aten("aten.relu.default"),)


@irdl_op_definition
class SiluOp(Curve):
    """input · sigmoid(input)."""

    name = "mx.silu"
    ATEN: ClassVar = (Aten("aten.silu.default"),)


@irdl_op_definition
class TanhOp(Curve):
    """Hyperbolic tangent."""

    name = "mx.tanh"
    ATEN: ClassVar = (Aten("aten.tanh.default"),)


@irdl_op_definition
class SigmoidOp(Curve):
    """1 / (1 + exp(-input))."""

    name = "mx.sigmoid"
    ATEN: ClassVar = (Aten("aten.sigmoid.default"),)


@irdl_op_definition
class RsqrtOp(Pointwise):
    """1 / sqrt(input)."""

    name = "mx.rsqrt"
    ATEN: ClassVar = (Aten("aten.rsqrt.default"),)


@irdl_op_definition
class PowOp(Pointwise):
    """input to the power of `exponent`."""

    name = "mx.pow"
    ATEN: ClassVar = (Aten("aten.pow.Tensor_Scalar"),)

    exponent = prop_def(NUMBER)


@irdl_op_definition
class GeluOp(Curve):
    """input · Φ(input), exactly or by the tanh approximation (`approximate = "tanh"`); Hendrycks and Gimpel 2016."""

    name = "mx.gelu"
    ATEN: ClassVar = (Aten("aten.gelu.default"),)

    approximate = opt_prop_def(StringAttr)

    def check(self) -> None:
        if self.approximate is not None:
            self.require(
                self.approximate.data in ("none", "tanh"), f'approximate is "none" or "tanh", got {self.approximate}'
            )
        super().check()

    def curve(self) -> str:
        return "gelu_tanh" if self.approximate is not None and self.approximate.data == "tanh" else "gelu"


@irdl_op_definition
class SoftplusOp(Pointwise):
    """log(1 + exp(beta · input)) / beta; the input itself above `threshold`."""

    name = "mx.softplus"
    ATEN: ClassVar = (Aten("aten.softplus.default"),)

    beta = opt_prop_def(NUMBER)
    threshold = opt_prop_def(NUMBER)


@irdl_op_definition
class ClampOp(Pointwise):
    """The input held between `min` and `max`."""

    name = "mx.clamp"
    ATEN: ClassVar = (Aten("aten.clamp.default"),)

    min = opt_prop_def(NUMBER)
    max = opt_prop_def(NUMBER)


@irdl_op_definition
class ConvertOp(Pointwise):
    """The same numbers in the result's (wide) type, as torch converts them."""

    name = "mx.convert"
    ATEN: ClassVar = (Aten("aten._to_copy.default"),)

    @classmethod
    def from_arguments(
        cls, aten: Aten, arguments: Iterable[Argument], result_types: Sequence[Attribute]
    ) -> Self | None:
        """The type wanted is the result's own."""
        return super().from_arguments(aten, [a for a in arguments if a.name != "dtype"], result_types)

    def call(self) -> Call:
        return Call(super().call().target, (self.input,), {"dtype": torch_dtype(element_of(self.result))})
