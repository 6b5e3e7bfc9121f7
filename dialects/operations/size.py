"""Sizes that are known at run time only."""

from typing import ClassVar

from xdsl.dialects.builtin import IndexType, IntegerAttr, TensorType
from xdsl.irdl import irdl_op_definition, operand_def, prop_def, result_def

from ._shapes import shape_of, text
from ._torch_operation import Aten, TorchOperation


@irdl_op_definition
class SizeOp(TorchOperation):
    """The size of dimension `dim` of a tensor, as a number that other operations take."""

    name = "mx.size"
    ATEN: ClassVar = (Aten("aten.sym_size.int"),)

    input = operand_def(TensorType)
    dim = prop_def(IntegerAttr)
    result = result_def(IndexType)

    def check(self) -> None:
        given, dim = shape_of(self.input), self.dim.value.data
        self.require(-len(given) <= dim < len(given), f"dimension {dim} is not one of those of {text(given)}")
