"""Operations that move elements and change none; a format passes through them where blocks stay whole."""

from __future__ import annotations

from typing import Any, ClassVar

from xdsl.dialects.builtin import ArrayAttr, IndexType, IntegerAttr, TensorType, UnitAttr
from xdsl.ir import Attribute
from xdsl.irdl import (
    AttrConstraint,
    BaseAttr,
    irdl_op_definition,
    operand_def,
    opt_prop_def,
    prop_def,
    result_def,
    var_operand_def,
    var_result_def,
)

from ._integer_meaning import all_fixed
from ._shapes import UNKNOWN, Shape, broadcast, product, same, shape_of, text
from ._torch_operation import Aten, TorchOperation

SIZE: AttrConstraint = BaseAttr(IntegerAttr) | BaseAttr(UnitAttr)
"""A number, or `unit` where a symbolic size of `symbols` stands."""


class Movement(TorchOperation):
    """An operation on the places of elements."""

    def computes_in(self) -> Attribute | None:
        """Fixed-point numbers move as they are."""
        return None if all_fixed(self) else super().computes_in()

    def known(self, number: Any) -> int:
        """A size as a number: UNKNOWN for a symbolic one."""
        return number if isinstance(number, int) else UNKNOWN

    def axis(self, dim: int, rank: int) -> int:
        """`dim` counted from the front; raises VerifyException where it is none of `rank` dimensions."""
        self.require(-rank <= dim < rank, f"dimension {dim} is not one of the {rank} there are")
        return dim % rank


@irdl_op_definition
class ReshapeOp(Movement):
    """The same elements in order, in another `shape`; one size may be -1, which follows from the others."""

    name = "mx.reshape"
    ATEN: ClassVar = (Aten("aten.reshape.default"),)

    input = operand_def(TensorType)
    symbols = var_operand_def(IndexType)
    shape = prop_def(ArrayAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        sizes = [self.known(size) for size in self.fields()["shape"]]
        total = product(shape_of(self.input))
        if -1 in sizes:
            others = product(size for size in sizes if size != -1)
            missing = UNKNOWN if UNKNOWN in (total, others) or not others else total // others
            sizes = [missing if size == -1 else size for size in sizes]
        self.require(
            same(product(sizes), total),
            f"{text(shape_of(self.input))} holds {total} elements, {text(sizes)} {product(sizes)}",
        )
        return tuple(sizes)


@irdl_op_definition
class FlattenOp(Movement):
    """Dimensions `start_dim` to `end_dim` become one."""

    name = "mx.flatten"
    ATEN: ClassVar = (Aten("aten.flatten.using_ints"),)

    input = operand_def(TensorType)
    start_dim = opt_prop_def(IntegerAttr)
    end_dim = opt_prop_def(IntegerAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        given = shape_of(self.input)
        first = self.axis(self.start_dim.value.data if self.start_dim else 0, len(given))
        last = self.axis(self.end_dim.value.data if self.end_dim else -1, len(given))
        return (*given[:first], product(given[first : last + 1]), *given[last + 1 :])


@irdl_op_definition
class TransposeOp(Movement):
    """Dimensions `dim0` and `dim1` change places."""

    name = "mx.transpose"
    ATEN: ClassVar = (Aten("aten.transpose.int"),)

    input = operand_def(TensorType)
    dim0 = prop_def(IntegerAttr)
    dim1 = prop_def(IntegerAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        sizes = list(shape_of(self.input))
        first, second = (self.axis(dim.value.data, len(sizes)) for dim in (self.dim0, self.dim1))
        sizes[first], sizes[second] = sizes[second], sizes[first]
        return tuple(sizes)


@irdl_op_definition
class PermuteOp(Movement):
    """Dimension i of the result is dimension `dims[i]` of the input."""

    name = "mx.permute"
    ATEN: ClassVar = (Aten("aten.permute.default"),)

    input = operand_def(TensorType)
    dims = prop_def(ArrayAttr[IntegerAttr])
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        given = shape_of(self.input)
        dims = [self.axis(dim.value.data, len(given)) for dim in self.dims]
        self.require(
            sorted(dims) == list(range(len(given))), f"{dims} does not name each of {len(given)} dimensions once"
        )
        return tuple(given[dim] for dim in dims)


@irdl_op_definition
class UnsqueezeOp(Movement):
    """A new dimension of size 1 at `dim`."""

    name = "mx.unsqueeze"
    ATEN: ClassVar = (Aten("aten.unsqueeze.default"),)

    input = operand_def(TensorType)
    dim = prop_def(IntegerAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        given = shape_of(self.input)
        dim = self.axis(self.dim.value.data, len(given) + 1)
        return (*given[:dim], 1, *given[dim:])


@irdl_op_definition
class SqueezeOp(Movement):
    """Dimension `dim`, where it is of size 1, is dropped."""

    name = "mx.squeeze"
    ATEN: ClassVar = (Aten("aten.squeeze.dim"),)

    input = operand_def(TensorType)
    dim = prop_def(IntegerAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape | None:
        given = shape_of(self.input)
        dim = self.axis(self.dim.value.data, len(given))
        if given[dim] == UNKNOWN:
            return None
        return (*given[:dim], *given[dim + 1 :]) if given[dim] == 1 else given


@irdl_op_definition
class ExpandOp(Movement):
    """Dimensions of size 1 repeated to `size`; -1 keeps a dimension."""

    name = "mx.expand"
    ATEN: ClassVar = (Aten("aten.expand.default", implied={"implicit": False}),)

    input = operand_def(TensorType)
    symbols = var_operand_def(IndexType)
    size = prop_def(ArrayAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        given = shape_of(self.input)
        sizes = [self.known(size) for size in self.fields()["size"]]
        self.require(len(sizes) >= len(given), f"{text(given)} has more dimensions than {text(sizes)}")
        padded = (1,) * (len(sizes) - len(given)) + given
        sizes = [old if new == -1 else new for old, new in zip(padded, sizes, strict=True)]
        self.require(broadcast(given, sizes) is not None, f"{text(given)} does not expand to {text(sizes)}")
        return tuple(sizes)


@irdl_op_definition
class ConcatOp(Movement):
    """Tensors one after another along `dim`."""

    name = "mx.concat"
    ATEN: ClassVar = (Aten("aten.cat.default"),)

    tensors = var_operand_def(TensorType)
    dim = opt_prop_def(IntegerAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        shapes = [shape_of(tensor) for tensor in self.tensors]
        self.require(bool(shapes), "needs a tensor at least")
        dim = self.axis(self.dim.value.data if self.dim else 0, len(shapes[0]))
        for shape in shapes[1:]:
            same_rest = len(shape) == len(shapes[0]) and all(
                same(a, b) for i, (a, b) in enumerate(zip(shapes[0], shape, strict=True)) if i != dim
            )
            self.require(same_rest, f"{text(shapes[0])} and {text(shape)} differ outside dimension {dim}")
        along = [shape[dim] for shape in shapes]
        return (*shapes[0][:dim], UNKNOWN if UNKNOWN in along else sum(along), *shapes[0][dim + 1 :])


@irdl_op_definition
class SliceOp(Movement):
    """Every `step`-th element from `start` up to (not including) `end` along `dim`."""

    name = "mx.slice"
    ATEN: ClassVar = (Aten("aten.slice.Tensor"),)

    input = operand_def(TensorType)
    symbols = var_operand_def(IndexType)
    dim = opt_prop_def(IntegerAttr)
    start = opt_prop_def(SIZE)
    end = opt_prop_def(SIZE)
    step = opt_prop_def(SIZE)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        given, fields = shape_of(self.input), self.fields()
        dim = self.axis(fields.get("dim", 0), len(given))
        bounds = [fields.get("start"), fields.get("end"), fields.get("step")]
        known = given[dim] != UNKNOWN and all(bound is None or isinstance(bound, int) for bound in bounds)
        size = len(range(*slice(*bounds).indices(given[dim]))) if known else UNKNOWN
        return (*given[:dim], size, *given[dim + 1 :])


@irdl_op_definition
class SelectOp(Movement):
    """The slice at `index` along `dim`, which is dropped."""

    name = "mx.select"
    ATEN: ClassVar = (Aten("aten.select.int"),)

    input = operand_def(TensorType)
    symbols = var_operand_def(IndexType)
    dim = prop_def(IntegerAttr)
    index = prop_def(SIZE)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        given = shape_of(self.input)
        dim = self.axis(self.dim.value.data, len(given))
        return (*given[:dim], *given[dim + 1 :])


@irdl_op_definition
class SplitOp(Movement):
    """Consecutive parts along `dim`: of `split_sizes`, or all of `split_size` but the last."""

    name = "mx.split"
    ATEN: ClassVar = (Aten("aten.split_with_sizes.default"), Aten("aten.split.Tensor"))

    input = operand_def(TensorType)
    symbols = var_operand_def(IndexType)
    split_sizes = opt_prop_def(ArrayAttr)
    split_size = opt_prop_def(SIZE)
    dim = opt_prop_def(IntegerAttr)
    parts = var_result_def(TensorType)

    def operator(self) -> Aten:
        return self.ATEN[0 if self.split_sizes is not None else 1]

    def check(self) -> None:
        self.require((self.split_sizes is None) != (self.split_size is None), "needs either split_sizes or split_size")
        given = shape_of(self.input)
        dim = self.axis(self.dim.value.data if self.dim else 0, len(given))
        sizes = [shape_of(part)[dim] for part in self.parts]
        total = UNKNOWN if UNKNOWN in sizes else sum(sizes)
        self.require(
            same(total, given[dim]), f"parts of {text(sizes)} do not make up the {given[dim]} of {text(given)}"
        )


@irdl_op_definition
class RepeatOp(Movement):
    """Each element along `dim` repeated `repeats` times, copies side by side."""

    name = "mx.repeat"
    ATEN: ClassVar = (Aten("aten.repeat_interleave.self_int", implied={"output_size": None}),)

    input = operand_def(TensorType)
    symbols = var_operand_def(IndexType)
    repeats = prop_def(SIZE)
    dim = opt_prop_def(IntegerAttr)
    result = result_def(TensorType)

    def result_shape(self) -> Shape:
        given, fields = shape_of(self.input), self.fields()
        repeats = self.known(fields["repeats"])
        if "dim" not in fields:
            return (product((*given, repeats)),)
        dim = self.axis(fields["dim"], len(given))
        return (*given[:dim], product((given[dim], repeats)), *given[dim + 1 :])
