"""Reductions and pooling."""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, TensorType, UnitAttr, f64
from xdsl.ir import TypeAttribute
from xdsl.irdl import irdl_op_definition, operand_def, opt_prop_def, prop_def, result_def

from ..integer_attribute import IntegerMeaningAttr
from ._integer_meaning import pair, require_fixed
from ._operation import Call
from ._shapes import UNKNOWN, Shape, shape_of, text
from ._torch_operation import Aten, TorchOperation
from .contraction import window_positions


class Reduction(TorchOperation):
    """Dimensions `dim` (all of them where it is left out) become one number, kept as size 1 by `keepdim`."""

    input = operand_def(TensorType)
    dim = opt_prop_def(ArrayAttr[IntegerAttr])
    keepdim = opt_prop_def(UnitAttr)
    dtype = opt_prop_def(TypeAttribute)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        given = shape_of(self.input)
        named = [dim.value.data for dim in self.dim] if self.dim is not None else []
        for dim in named:
            self.require(-len(given) <= dim < len(given), f"dimension {dim} is not one of those of {text(given)}")
        dims = {dim % len(given) for dim in named} or set(range(len(given)))
        if self.keepdim is not None:
            return tuple(1 if i in dims else size for i, size in enumerate(given))
        return tuple(size for i, size in enumerate(given) if i not in dims)


@irdl_op_definition
class MeanOp(Reduction):
    """Arithmetic mean."""

    name = "mx.mean"
    ATEN: ClassVar = (Aten("aten.mean.dim"),)

    integer = opt_prop_def(IntegerMeaningAttr)

    def check(self) -> None:
        if self.integer is not None:
            self.require(self.dtype is None, "computed in integers, it computes in no dtype: leave it out")
            _require_mean(self)

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_meanings import mean

        rank = len(shape_of(self.input))
        dims = tuple(dim.value.data for dim in self.dim or ()) or tuple(range(rank))
        formats = (pair(self.input), pair(self.result))
        return Call(mean, (self.input, dims, self.keepdim is not None, *formats), {}, f64)

    def shape_call(self) -> Call:
        return super().call()


@irdl_op_definition
class SumOp(Reduction):
    """Sum."""

    name = "mx.sum"
    ATEN: ClassVar = (Aten("aten.sum.dim_IntList"),)


@irdl_op_definition
class TopkOp(TorchOperation):
    """The `k` largest values along `dim` and where they stand."""

    name = "mx.topk"
    ATEN: ClassVar = (Aten("aten.topk.default"),)

    input = operand_def(TensorType)
    k = prop_def(IntegerAttr)
    dim = opt_prop_def(IntegerAttr)
    largest = opt_prop_def(IntegerAttr)
    sorted = opt_prop_def(IntegerAttr)
    values = result_def(TensorType)
    indices = result_def(TensorType)

    def result_shape(self) -> Shape:
        given = list(shape_of(self.input))
        dim = self.dim.value.data if self.dim is not None else -1
        self.require(-len(given) <= dim < len(given), f"dimension {dim} is not one of those of {text(given)}")
        given[dim] = self.k.value.data
        return tuple(given)


class Pool(TorchOperation):
    """A window over the last dimensions."""

    input = operand_def(TensorType)
    kernel_size = prop_def(ArrayAttr[IntegerAttr])
    stride = opt_prop_def(ArrayAttr[IntegerAttr])
    padding = opt_prop_def(ArrayAttr[IntegerAttr])
    ceil_mode = opt_prop_def(UnitAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape | None:
        if self.ceil_mode is not None:
            return None
        given, kernel = shape_of(self.input), _numbers(self.kernel_size)
        spatial = given[len(given) - 2 :]
        windows = zip(
            spatial,
            _pair(kernel),
            _pair(_numbers(self.stride) or kernel),
            _pair(_numbers(self.padding) or [0]),
            _pair(_numbers(self.properties.get("dilation")) or [1]),
            strict=True,
        )
        return (*given[: len(given) - 2], *(window_positions(*window) for window in windows))


def _numbers(attribute: object) -> list[int]:
    return [item.value.data for item in attribute] if isinstance(attribute, ArrayAttr) else []


def _pair(numbers: list[int]) -> list[int]:
    return numbers * 2 if len(numbers) == 1 else numbers


@irdl_op_definition
class MaxPoolOp(Pool):
    """The largest value of each window: input [..., C, H, W]."""

    name = "mx.max_pool"
    ATEN: ClassVar = (Aten("aten.max_pool2d.default"),)

    dilation = opt_prop_def(ArrayAttr[IntegerAttr])


@irdl_op_definition
class WindowPoolOp(Pool):
    """The mean of each window: input [..., C, H, W]."""

    name = "mx.window_pool"
    ATEN: ClassVar = (Aten("aten.avg_pool2d.default", implied={"divisor_override": None}),)

    count_include_pad = opt_prop_def(IntegerAttr)
    integer = opt_prop_def(IntegerMeaningAttr)

    def check(self) -> None:
        if self.integer is not None:
            whole = self.ceil_mode is None and not any(_numbers(self.padding))
            self.require(whole, "computed in integers, its windows lie inside: no padding, no ceil_mode")
            _require_mean(self)

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_meanings import window_mean

        kernel = _pair(_numbers(self.kernel_size))
        stride = _pair(_numbers(self.stride)) or kernel
        formats = (pair(self.input), pair(self.result))
        return Call(window_mean, (self.input, tuple(kernel), tuple(stride), *formats), {}, f64)

    def shape_call(self) -> Call:
        return super().call()


@irdl_op_definition
class AveragePoolOp(TorchOperation):
    """Means over windows that give `output_size` positions: input [..., C, H, W] -> [..., C, *output_size]."""

    name = "mx.avg_pool"
    ATEN: ClassVar = (Aten("aten.adaptive_avg_pool2d.default"),)

    input = operand_def(TensorType)
    output_size = prop_def(ArrayAttr[IntegerAttr])
    integer = opt_prop_def(IntegerMeaningAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        return (*shape_of(self.input)[:-2], *_pair(_numbers(self.output_size)))

    def check(self) -> None:
        if self.integer is not None:
            sizes, wanted = shape_of(self.input)[-2:], _pair(_numbers(self.output_size))
            even = all(w == 1 or (s != UNKNOWN and s % w == 0) for s, w in zip(sizes, wanted, strict=True))
            self.require(
                UNKNOWN not in sizes and even,
                f"computed in integers, its windows have one known size: {text(sizes)} gives no {text(wanted)} so",
            )
            _require_mean(self)

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_meanings import window_mean

        sizes = zip(shape_of(self.input)[-2:], _pair(_numbers(self.output_size)), strict=True)
        kernel = tuple(size // wanted for size, wanted in sizes)
        return Call(window_mean, (self.input, kernel, kernel, pair(self.input), pair(self.result)), {}, f64)

    def shape_call(self) -> Call:
        return super().call()


def _require_mean(operation: MeanOp | WindowPoolOp | AveragePoolOp) -> None:
    """Raise VerifyException unless the operands of a mean are fixed point and its shifts fit 64 bits."""
    require_fixed(operation, {"input": operation.input, "result": operation.result})
    (_, given), (_, found) = pair(operation.input), pair(operation.result)
    operation.require(
        abs(found - given) <= 20,
        f"computed in integers, input and result have their points within 20 bits, got {given} and {found}",
    )
