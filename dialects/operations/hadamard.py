"""Rotation by a Hadamard matrix, block by block."""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects.builtin import IntegerAttr, TensorType
from xdsl.irdl import irdl_op_definition, operand_def, opt_prop_def, prop_def, result_def

from ..hadamard import additions, factor, sizes
from ._shapes import UNKNOWN, Shape, ShapeOf, product, shape_of, text
from ._torch_operation import Aten, TorchOperation

SHOWN = 12
"""How many sizes an error names."""


@irdl_op_definition
class HadamardOp(TorchOperation):
    """Each run of `size` elements along `dim` (the last, if it is left out) times a normalized Hadamard matrix.

    The matrix is orthogonal: (H_k x H_2^m) diag(signs) / sqrt(size), the signs following from `seed`, 1 without one. A
    product of two operands that are both rotated along what is summed over is what it was (arXiv 2404.00456,
    section 4; in blocks: arXiv 2511.04214). It has no weights, and takes additions alone (`hadamard.hadamard`).
    """

    name = "mx.hadamard"
    ATEN: ClassVar = (Aten("mxloom.hadamard.default"),)

    input = operand_def(TensorType)
    size = prop_def(IntegerAttr)
    dim = opt_prop_def(IntegerAttr)
    seed = opt_prop_def(IntegerAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        given, size = shape_of(self.input), self.size.value.data
        dim = -1 if self.dim is None else self.dim.value.data
        self.require(-len(given) <= dim < len(given), f"dimension {dim} is not one of the {len(given)} there are")
        self.require(self.seed is None or self.seed.value.data >= 0, "a seed is 0 or more")
        self.require(size > 1 and factor(size) is not None, f"there is no Hadamard matrix of order {size}")
        width = given[dim]
        if width != UNKNOWN and width % size:
            named = ", ".join(map(str, sizes(width)[-SHOWN:])) or "none"
            self.require(False, f"{text(given)} has {width} elements along {dim}, no multiple of {size}; fit: {named}")

    def result_shape(self) -> Shape:
        return shape_of(self.input)

    def additions(self, shapes: ShapeOf = shape_of) -> int:
        """Additions and subtractions for the stated shapes."""
        return product(shapes(self.result)) * additions(self.size.value.data)
