"""Contractions: operations that sum products along reduced dimensions; what quantization is about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Self

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, TensorType, UnitAttr, f32, f64
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import irdl_op_definition, operand_def, opt_operand_def, opt_prop_def, result_def

from ..accumulator import AccumulatorAttr
from ..formats import MixedType, default_scale_rule, is_wide, takes_scale_rule
from ..windows import WindowAttr
from ._operation import AsCodes, Call
from ._origin import is_weight
from ._shapes import UNKNOWN, Shape, ShapeOf, broadcast, element_of, fits, product, same, shape_of, text
from ._torch_operation import Argument, Aten, TorchOperation
from .cast import CastOp
from .parameter import ParameterOp

Reduced = dict[str, tuple[int, ...]]


class Contraction(TorchOperation):
    """Sums of products: as torch forms them in f32, or as the accumulator says where the operation states one."""

    def reduced(self) -> Reduced:
        """For each operand that is multiplied, the dimensions (counted from the end) along which its blocks run."""
        raise NotImplementedError(f"{self.name} does not say what it sums over")


@irdl_op_definition
class LinearOp(Contraction):
    """Input times transposed weight, plus bias: summed wide, rounded once into the result's type.

    input [..., K], weight [N, K] ([K, N] when `transposed`; a bias then wants an input [M, K]), bias [N] -> [..., N].
    With an accumulator `acc` both operands are of formats, and `contractions.linear` says how they are summed; with a
    `window` it is `windows.windowed`.
    """

    name = "mx.linear"
    ATEN: ClassVar = (
        Aten("aten.linear.default"),
        Aten(
            "aten.addmm.default",
            names={"self": "bias", "mat1": "input", "mat2": "weight"},
            implied={"alpha": 1, "beta": 1},
            sets={"transposed": UnitAttr()},
        ),
        Aten(
            "aten.matmul.default",
            names={"self": "input", "other": "weight"},
            sets={"transposed": UnitAttr()},
        ),
    )

    input = operand_def(TensorType)
    weight = operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    transposed = opt_prop_def(UnitAttr)
    acc = opt_prop_def(AccumulatorAttr)
    window = opt_prop_def(WindowAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        _check_accumulator(self)
        self.require(self.acc is None or self.window is None, "it sums into an accumulator or a window, not both")
        given, weight = shape_of(self.input), shape_of(self.weight)
        self.require(len(weight) == 2, f"the weight must be a matrix, got {text(weight)}")
        self.require(len(given) >= 1, "the input needs a dimension to sum over, got a scalar")
        self.require(
            same(given[-1], self._reduced_size()),
            f"weight {text(weight)} sums over {self._reduced_size()} values, "
            f"but the input {text(given)} ends in {given[-1]}",
        )
        if self.bias is not None:
            expected = (self._outputs(),)
            got = shape_of(self.bias)
            self.require(fits(expected, got), f"the bias must be {text(expected)}, got {text(got)}")
        if self.transposed is not None and self.bias is not None:
            self.require(len(given) == 2, f"transposed and with a bias, it needs a matrix as input, got {text(given)}")
        _check_window(self)

    @classmethod
    def from_arguments(
        cls, aten: Aten, arguments: Iterable[Argument], result_types: Sequence[Attribute]
    ) -> Self | None:
        """A matrix product is a linear where its second operand is a matrix of parameters, and the first is not."""
        arguments = list(arguments)
        if aten.target == "aten.matmul.default":
            given, weight = (argument.value for argument in arguments)
            if len(shape_of(weight)) != 2 or not is_weight(weight) or is_weight(given):
                return None
        return super().from_arguments(aten, arguments, result_types)

    def result_shape(self) -> Shape:
        return (*shape_of(self.input)[:-1], self._outputs())

    def macs(self, shapes: ShapeOf = shape_of) -> int:
        return product(shapes(self.result)) * self._reduced_size()

    def reduced(self) -> Reduced:
        return {"input": (-1,), "weight": (-2,) if self.transposed is not None else (-1,)}

    def operator(self) -> Aten:
        if self.transposed is None:
            return self.ATEN[0]
        return self.ATEN[1 if self.bias is not None else 2]

    def call(self) -> Call:
        if self.window is not None:
            return self._windowed(self.window)
        if self.acc is None:
            return super().call()
        from ..contractions import linear

        weight = AsCodes(self.weight, self.transposed is not None)
        return Call(linear, (AsCodes(self.input), weight, self.bias, self.acc), {}, f32)

    def shape_call(self) -> Call:
        return super().call()

    def _windowed(self, window: WindowAttr) -> Call:
        from ..windows import windowed_codes, windowed_linear

        width, lsb = window.width.data, window.lsb.data
        if has_float_scales(self):
            codes = (AsCodes(self.input), AsCodes(self.weight, self.transposed is not None))
            return Call(windowed_codes, (*codes, self.bias, width, lsb), {}, f64)
        operands = (self.input, self.weight, self.bias, self.transposed is not None)
        return Call(windowed_linear, (*operands, width, lsb, segment_of(self)), {}, f64)

    def _outputs(self) -> int:
        return shape_of(self.weight)[1 if self.transposed is not None else 0]

    def _reduced_size(self) -> int:
        return shape_of(self.weight)[0 if self.transposed is not None else 1]


def _check_accumulator(operation: LinearOp | ExpertLinearOp) -> None:
    if operation.acc is not None and (reason := why_no_accumulator(operation)) is not None:
        operation.require(False, f"no accumulator: {reason}")


def why_no_accumulator(operation: LinearOp | ExpertLinearOp) -> str | None:
    """Why an operation cannot state an accumulator: its operands have no codes; None where they have."""
    from ..contractions import why_no_codes

    for name, value in (("input", operation.input), ("weight", operation.weight)):
        element = element_of(value)
        if is_wide(element):
            return f"the {name} is {element}, not quantized"
        if (reason := why_no_codes(element)) is not None:
            return f"the {name}: {reason}"
        if not isinstance(value.owner, CastOp | ParameterOp) and not _keeps_codes(element):
            return f"the {name} is a value of {element} whose scales are not kept: let an mx.cast make it"
    return None


def _check_window(operation: LinearOp | MatmulOp) -> None:
    if operation.window is not None and (reason := why_no_window(operation)) is not None:
        operation.require(False, f"no window: {reason}")


def why_no_window(operation: LinearOp | MatmulOp) -> str | None:
    """Why an operation cannot sum into a window; None where it can."""
    from ..windows import why_no_window_operand, why_not_exact

    for name, value, _ in _multiplied(operation):
        if (reason := why_no_window_operand(element_of(value))) is not None:
            return f"the {name}: {reason}"
    if not has_float_scales(operation):
        return None
    (_, one, a), (_, other, b) = _multiplied(operation)
    if isinstance(operation, MatmulOp):
        return f"scales of {element_of(one)} and {element_of(other)} are no powers of two, and both are computed"
    for name, value, _ in _multiplied(operation):
        kept = isinstance(value.owner, CastOp | ParameterOp) or _keeps_codes(element_of(value))
        if isinstance(element_of(value), MixedType) or not kept:
            return f"the {name} is a value of {element_of(value)} whose codes are not kept beside scales in float"
    return why_not_exact((element_of(one), a), (element_of(other), b), shape_of(one)[-1])


def has_float_scales(operation: Contraction) -> bool:
    """Whether a scale of an operand is no power of two, so that values alone do not say what the sums are."""
    from ..windows import scale_digits

    return any(scale_digits(element_of(value)) for _, value, _ in _multiplied(operation))


def segment_of(operation: Contraction) -> int:
    """The length of the segments of K in which both operands keep one scale; more than any K where none changes."""
    from ..windows import common_segment

    (_, one, a), (_, other, b) = _multiplied(operation)
    return common_segment((element_of(one), a), (element_of(other), b), shape_of(one)[-1])


def _multiplied(operation: Contraction) -> list[tuple[str, SSAValue, int]]:
    """The multiplied operands, each with the dimension that is summed over, counted from the end."""
    return [(name, getattr(operation, name), along[0]) for name, along in operation.reduced().items()]


def _keeps_codes(fmt: Attribute) -> bool:
    """Whether values alone give the sums of their products: they have no scale, or powers of two."""
    return default_scale_rule(fmt) is None or takes_scale_rule(fmt)


@irdl_op_definition
class MatmulOp(Contraction):
    """Matrix product of two values: input [..., M, K], other [..., K, N] -> [..., M, N]; vectors as in torch.

    With a `window` both operands are of formats, and `windows.windowed` says how they are summed.
    """

    name = "mx.matmul"
    ATEN: ClassVar = (Aten("aten.matmul.default"),)

    input = operand_def(TensorType)
    other = operand_def(TensorType)
    window = opt_prop_def(WindowAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        a, b = shape_of(self.input), shape_of(self.other)
        self.require(bool(a) and bool(b), f"operands need a dimension to sum over, got {text(a)} and {text(b)}")
        self.require(
            same(a[-1], b[max(len(b) - 2, 0)]),
            f"{text(a)} times {text(b)}: the first ends in {a[-1]}, the second sums over {b[max(len(b) - 2, 0)]}",
        )
        self.require(broadcast(a[:-2], b[:-2]) is not None, f"batches of {text(a)} and {text(b)} do not broadcast")
        self.require(self.window is None or min(len(a), len(b)) > 1, "a window takes matrices, no vectors")
        _check_window(self)

    def result_shape(self) -> Shape:
        a, b = shape_of(self.input), shape_of(self.other)
        return (*(broadcast(a[:-2], b[:-2]) or ()), *a[-2:-1], *(b[-1:] if len(b) > 1 else ()))

    def macs(self, shapes: ShapeOf = shape_of) -> int:
        return product(shapes(self.result)) * shapes(self.input)[-1]

    def reduced(self) -> Reduced:
        return {"input": (-1,), "other": (-2,) if len(shape_of(self.other)) > 1 else (-1,)}

    def call(self) -> Call:
        if self.window is None:
            return super().call()
        from ..windows import windowed

        numbers = (self.window.width.data, self.window.lsb.data, segment_of(self))
        return Call(windowed, (self.input, self.other, None, *numbers), {}, f64)

    def shape_call(self) -> Call:
        return super().call()


def weights_of(operation: Contraction) -> tuple[str, ...]:
    """The names of the multiplied operands that follow from parameters alone."""
    values = {name: getattr(operation, name) for name in operation.reduced()}
    return tuple(name for name, value in values.items() if isinstance(value, SSAValue) and is_weight(value))


def is_outer_product(operation: Contraction) -> bool:
    """Whether a product sums over one value, as positions times frequencies do: nothing is accumulated."""
    return isinstance(operation, MatmulOp) and shape_of(operation.input)[-1] == 1


@irdl_op_definition
class ConvOp(Contraction):
    """Convolution: input [B, C, *spatial], weight [N, C / groups, *kernel], bias [N] -> [B, N, *spatial]."""

    name = "mx.conv"
    ATEN: ClassVar = tuple(Aten(f"aten.conv{rank}d.default") for rank in (1, 2, 3))

    input = operand_def(TensorType)
    weight = operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    stride = opt_prop_def(ArrayAttr[IntegerAttr])
    padding = opt_prop_def(ArrayAttr[IntegerAttr])
    dilation = opt_prop_def(ArrayAttr[IntegerAttr])
    groups = opt_prop_def(IntegerAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        given, weight = shape_of(self.input), shape_of(self.weight)
        self.require(
            len(given) == len(weight) and 3 <= len(weight) <= 5,
            f"input and weight must both be [_, channels, *spatial], got {text(given)} and {text(weight)}",
        )
        channels = weight[1] * self._groups()
        self.require(
            same(given[1], channels),
            f"weight {text(weight)} in {self._groups()} groups reads {channels} channels, "
            f"but the input {text(given)} has {given[1]}",
        )
        if self.bias is not None:
            got = shape_of(self.bias)
            self.require(fits(weight[:1], got), f"the bias must be {text(weight[:1])}, got {text(got)}")

    def result_shape(self) -> Shape:
        given, weight = shape_of(self.input), shape_of(self.weight)
        sizes = zip(given[2:], weight[2:], *map(self.per_dimension, ("stride", "padding", "dilation")), strict=True)
        return (given[0], weight[0], *(window_positions(*size) for size in sizes))

    def macs(self, shapes: ShapeOf = shape_of) -> int:
        return product(shapes(self.result)) * product(shape_of(self.weight)[1:])

    def reduced(self) -> Reduced:
        rank = len(shape_of(self.weight))
        return {"input": (1 - rank,), "weight": tuple(range(1 - rank, 0))}

    def operator(self) -> Aten:
        return self.ATEN[len(shape_of(self.weight)) - 3]

    def _groups(self) -> int:
        return self.groups.value.data if self.groups is not None else 1

    def per_dimension(self, name: str) -> list[int]:
        """The numbers of stride, padding or dilation, one for each spatial dimension."""
        spatial = len(shape_of(self.weight)) - 2
        given = self.properties.get(name)
        if given is None:
            return [0 if name == "padding" else 1] * spatial
        numbers = [item.value.data for item in given]  # pyright: ignore[reportGeneralTypeIssues]
        return numbers * spatial if len(numbers) == 1 else numbers


def window_positions(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """How many positions a window has along one dimension."""
    return UNKNOWN if size == UNKNOWN else (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@irdl_op_definition
class ExpertLinearOp(Contraction):
    """Each row times the weight of its own expert (mixture of experts).

    input [S, K], weight [E, N, K] ([E, K, N] when `transposed`), bias [E, N], index [S] -> [S, N].
    With an accumulator `acc`, as in `mx.linear`, `contractions.expert_linear` says how products are summed.
    """

    name = "mx.expert_linear"
    ATEN: ClassVar = (Aten("mxloom.expert_linear.default"),)

    input = operand_def(TensorType)
    weight = operand_def(TensorType)
    index = operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    transposed = opt_prop_def(UnitAttr)
    acc = opt_prop_def(AccumulatorAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        _check_accumulator(self)
        given, weight = shape_of(self.input), shape_of(self.weight)
        self.require(
            len(given) == 2 and len(weight) == 3,
            f"needs input [rows, K] and weight [experts, N, K], got {text(given)} and {text(weight)}",
        )
        reduced = weight[1 if self.transposed is not None else 2]
        self.require(
            same(given[1], reduced),
            f"weight {text(weight)} sums over {reduced} values, but the input {text(given)} ends in {given[1]}",
        )
        got = shape_of(self.index)
        self.require(fits(given[:1], got), f"needs one expert index a row, {text(given[:1])}, got {text(got)}")

    def result_shape(self) -> Shape:
        return (shape_of(self.input)[0], shape_of(self.weight)[2 if self.transposed is not None else 1])

    def macs(self, shapes: ShapeOf = shape_of) -> int:
        return product(shapes(self.result)) * shapes(self.input)[-1]

    def reduced(self) -> Reduced:
        return {"input": (-1,), "weight": (-2,) if self.transposed is not None else (-1,)}

    def call(self) -> Call:
        if self.acc is None:
            return super().call()
        from ..contractions import expert_linear

        weight = AsCodes(self.weight, self.transposed is not None)
        return Call(expert_linear, (AsCodes(self.input), weight, self.index, self.bias, self.acc), {}, f32)

    def shape_call(self) -> Call:
        return super().call()


@irdl_op_definition
class EmbeddingOp(TorchOperation):
    """Rows of a table: weight [V, D], indices [...] -> [..., D]."""

    name = "mx.embedding"
    ATEN: ClassVar = (Aten("aten.embedding.default", implied={"scale_grad_by_freq": False, "sparse": False}),)

    weight = operand_def(TensorType)
    indices = operand_def(TensorType)
    padding_idx = opt_prop_def(IntegerAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        weight = shape_of(self.weight)
        self.require(len(weight) == 2, f"the table must be a matrix, got {text(weight)}")

    def result_shape(self) -> Shape:
        return (*shape_of(self.indices), shape_of(self.weight)[1])
