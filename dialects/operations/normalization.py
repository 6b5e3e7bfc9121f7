"""Normalizations and softmax."""

from __future__ import annotations

from math import isfinite
from typing import ClassVar

from xdsl.dialects.builtin import ArrayAttr, FloatAttr, IntegerAttr, TensorType, UnitAttr, f64
from xdsl.ir import SSAValue, TypeAttribute
from xdsl.irdl import (
    AttrSizedOperandSegments,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
)

from ..integer_attribute import IntegerMeaningAttr
from ._integer_meaning import (
    WIDEST_WEIGHT,
    pair,
    pair_of,
    require_bias,
    require_exponential,
    require_fixed,
    require_root,
    require_row,
)
from ._operation import Call
from ._shapes import Shape, fits, shape_of, text
from ._torch_operation import Aten, TorchOperation


class Normalization(TorchOperation):
    """An operation that keeps its input's shape."""

    input = operand_def(TensorType)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        return shape_of(self.input)

    def check(self) -> None:
        eps = self.properties.get("eps")
        if isinstance(eps, FloatAttr):
            value = eps.value.data
            self.require(isfinite(value) and value >= 0, f"eps is a number of 0 or more, got {value}")

    def require_vector(self, role: str, value: SSAValue | None, expected: Shape) -> None:
        """Raise VerifyException unless the operand, where it is given, has the expected shape."""
        if value is not None:
            got = shape_of(value)
            self.require(fits(expected, got), f"the {role} must be {text(expected)}, got {text(got)}")


@irdl_op_definition
class RMSNormOp(Normalization):
    """input / sqrt(mean(input²) + eps) · weight along the last dimension; `unit_offset`: times 1 + weight (Gemma).

    Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
    """

    name = "mx.rms_norm"
    ATEN: ClassVar = (Aten("mxloom.rms_norm.default"),)

    input = operand_def(TensorType)
    weight = opt_operand_def(TensorType)
    eps = prop_def(FloatAttr)
    unit_offset = opt_prop_def(UnitAttr)
    integer = opt_prop_def(IntegerMeaningAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        super().check()
        self.require_vector("weight", self.weight, shape_of(self.input)[-1:])
        if self.integer is not None:
            self.require(self.unit_offset is None, "computed in integers, it takes 1 + weight as its weight")
            require_fixed(self, {"input": self.input, "result": self.result})
            require_fixed(self, {"weight": self.weight}, WIDEST_WEIGHT)
            require_row(self, self.input)
            require_root(self, self.input, 0, self.eps.value.data)

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_meanings import rms_norm

        formats = (pair(self.input), pair_of(self.weight), pair(self.result))
        return Call(rms_norm, (self.input, self.weight, *formats, self.eps.value.data), {}, f64)

    def shape_call(self) -> Call:
        return super().call()


@irdl_op_definition
class LayerNormOp(Normalization):
    """(input - mean) / sqrt(variance + eps) · weight + bias over the last dimensions (`normalized_shape`)."""

    name = "mx.layer_norm"
    ATEN: ClassVar = (Aten("aten.layer_norm.default", ignored=("cudnn_enable",)),)

    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    input = operand_def(TensorType)
    weight = opt_operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    normalized_shape = prop_def(ArrayAttr[IntegerAttr])
    eps = opt_prop_def(FloatAttr)
    integer = opt_prop_def(IntegerMeaningAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        super().check()
        normalized = tuple(size.value.data for size in self.normalized_shape)
        given = shape_of(self.input)
        self.require(
            fits(given[len(given) - len(normalized) :], normalized),
            f"the input {text(given)} does not end in the normalized shape {text(normalized)}",
        )
        self.require_vector("weight", self.weight, normalized)
        self.require_vector("bias", self.bias, normalized)
        if self.integer is not None:
            self.require(
                len(normalized) == 1, f"computed in integers, it normalizes one dimension, got {text(normalized)}"
            )
            require_fixed(self, {"input": self.input, "bias": self.bias, "result": self.result})
            require_fixed(self, {"weight": self.weight}, WIDEST_WEIGHT)
            require_row(self, self.input)
            require_root(self, self.input, 1, self._eps())
            require_bias(self, self.input, self.weight, self.bias)

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_meanings import layer_norm

        formats = (pair(self.input), pair_of(self.weight), pair_of(self.bias), pair(self.result))
        return Call(layer_norm, (self.input, self.weight, self.bias, *formats, self._eps()), {}, f64)

    def shape_call(self) -> Call:
        return super().call()

    def _eps(self) -> float:
        """torch's own where none is stated."""
        return self.eps.value.data if self.eps is not None else 1e-5


@irdl_op_definition
class BatchNormOp(Normalization):
    """(input - running_mean) / sqrt(running_var + eps) · weight + bias, a number of each for every channel."""

    name = "mx.batch_norm"
    ATEN: ClassVar = (
        Aten(
            "aten.batch_norm.default",
            implied={"training": False, "momentum": 0.0, "cudnn_enabled": False},
            ignored=("momentum", "cudnn_enabled"),
        ),
    )

    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    input = operand_def(TensorType)
    running_mean = operand_def(TensorType)
    running_var = operand_def(TensorType)
    weight = opt_operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    eps = prop_def(FloatAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        super().check()
        channels = shape_of(self.input)[1:2]
        for role in ("running_mean", "running_var", "weight", "bias"):
            self.require_vector(role, getattr(self, role), channels)


@irdl_op_definition
class GroupNormOp(Normalization):
    """Normalization of each of `num_groups` groups of channels, then · weight + bias for every channel."""

    name = "mx.group_norm"
    ATEN: ClassVar = (Aten("aten.group_norm.default", ignored=("cudnn_enabled",)),)

    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    input = operand_def(TensorType)
    weight = opt_operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    num_groups = prop_def(IntegerAttr)
    eps = opt_prop_def(FloatAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        super().check()
        channels = shape_of(self.input)[1:2]
        self.require_vector("weight", self.weight, channels)
        self.require_vector("bias", self.bias, channels)


@irdl_op_definition
class SoftmaxOp(Normalization):
    """exp(input) / sum(exp(input)) along `dim`, computed in `dtype` where it is given."""

    name = "mx.softmax"
    ATEN: ClassVar = (Aten("aten.softmax.int"),)

    input = operand_def(TensorType)
    dim = prop_def(IntegerAttr)
    dtype = opt_prop_def(TypeAttribute)
    integer = opt_prop_def(IntegerMeaningAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        super().check()
        rank, dim = len(shape_of(self.input)), self.dim.value.data
        self.require(-rank <= dim < rank, f"dim {dim} is not one of {rank} dimensions")
        if self.integer is not None:
            self.require(dim in (-1, rank - 1), f"computed in integers, it runs along the last dimension, not {dim}")
            self.require(self.dtype is None, "computed in integers, it computes in no dtype: leave it out")
            require_fixed(self, {"input": self.input, "result": self.result})
            require_row(self, self.input)
            require_exponential(self, pair(self.input))

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_meanings import softmax

        formats = (pair(self.input), pair(self.result))
        return Call(softmax, (self.input, *formats, self.integer.table_bits.data), {}, f64)

    def shape_call(self) -> Call:
        return super().call()
