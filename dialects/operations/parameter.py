"""Weights by their name in the checkpoint."""

from xdsl.dialects.builtin import StringAttr, TensorType
from xdsl.irdl import irdl_op_definition, prop_def, result_def

from ._operation import Operation


@irdl_op_definition
class ParameterOp(Operation):
    """A weight, buffer or constant: its name in the checkpoint, and the format in which the store holds it.

    Its bytes stay in the weight store and never enter the IR.
    """

    name = "mx.parameter"

    source = prop_def(StringAttr)
    result = result_def(TensorType)

    assembly_format = "$source attr-dict `:` type($result)"
