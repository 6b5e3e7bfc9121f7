"""What a convolution's window sees at each of its positions, as rows of a matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, TensorType
from xdsl.irdl import irdl_op_definition, operand_def, opt_prop_def, prop_def, result_def

from ._operation import Call
from ._shapes import UNKNOWN, Shape, product, shape_of, text
from ._torch_operation import Aten
from .contraction import window_positions
from .movement import Movement

if TYPE_CHECKING:
    from torch import Tensor

Sizes = tuple[int, ...]


@irdl_op_definition
class PatchesOp(Movement):
    """The numbers under a window at each of its positions: input [B, C, *spatial] -> [B, *positions, kernel x C].

    A position's numbers come tap by tap, the channels of each tap side by side; padding gives zeros. A convolution is a
    linear layer on them (K. Chellapilla, S. Puri, P. Simard, High performance convolutional neural networks for
    document processing, 2006), and blocks that divide the channels hold what they hold in the convolution.
    """

    name = "mx.patches"
    ATEN: ClassVar[tuple[Aten, ...]] = ()

    input = operand_def(TensorType)
    kernel_size = prop_def(ArrayAttr[IntegerAttr])
    stride = opt_prop_def(ArrayAttr[IntegerAttr])
    padding = opt_prop_def(ArrayAttr[IntegerAttr])
    dilation = opt_prop_def(ArrayAttr[IntegerAttr])
    result = result_def(TensorType)

    @property
    def windows(self) -> tuple[Sizes, Sizes, Sizes, Sizes]:
        """(kernel, stride, padding, dilation), a number for each spatial dimension."""
        kernel, *others = (self.fields().get(name) for name in ("kernel_size", "stride", "padding", "dilation"))
        assert kernel is not None
        stride, padding, dilation = (
            tuple(given or [default] * len(kernel)) for given, default in zip(others, (1, 0, 1), strict=True)
        )
        return tuple(kernel), stride, padding, dilation

    def check(self) -> None:
        given = shape_of(self.input)
        kernel, *others = self.windows
        self.require(len(given) >= 3, f"the input is [B, C, *spatial], got {text(given)}")
        self.require(
            all(len(sizes) == len(given) - 2 for sizes in (kernel, *others)),
            f"kernel_size, stride, padding and dilation have {len(given) - 2} numbers each for {text(given)}",
        )
        self.require(UNKNOWN not in given[1:2], f"the channels are known, got {text(given)}")

    def result_shape(self) -> Shape:
        given = shape_of(self.input)
        kernel, *others = self.windows
        sizes = zip(given[2:], kernel, *others, strict=True)
        return (given[0], *(window_positions(*size) for size in sizes), product(kernel) * given[1])

    def call(self) -> Call:
        return Call(patches, (self.input, *self.windows), {}, self.computes_in())


def patches(x: Tensor, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes) -> Tensor:
    """The meaning of `mx.patches`."""
    import torch

    around = [amount for each in reversed(padding) for amount in (each, each)]
    x = torch.nn.functional.pad(x, around)
    for dim, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    spatial = len(kernel)
    taps = range(2 + spatial, 2 + 2 * spatial)
    return x.permute(0, *range(2, 2 + spatial), *taps, 1).flatten(1 + spatial)
