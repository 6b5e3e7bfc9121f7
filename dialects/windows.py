"""Contractions that sum into a window: exact inside a segment, shifted and rounded once, added with saturation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import floor, gcd, log2
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import DYNAMIC_INDEX, IntAttr, f8E8M0FNU
from xdsl.ir import Attribute, ParametrizedAttribute
from xdsl.irdl import irdl_attr_definition, param_def
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from .contractions import (
    Coded,
    bounds_of_format,
    exact_dot,
    fits_f64,
    in_segments,
    segment_length,
    sum_to_odd,
    to_odd,
    why_no_codes,
)
from .formats import BlockType, MixedType, is_wide
from .formats._builtin import numbers_of
from .formats._element import Minifloat
from .formats._plain import Plain

if TYPE_CHECKING:
    from torch import Tensor

NARROWEST, WIDEST = 8, 50
"""Bits of a window; f64 holds every sum of two numbers of the widest."""


@irdl_attr_definition
class WindowAttr(ParametrizedAttribute):
    """`#mx.window<W, lsb>`: sums are two's complement numbers of W bits whose lowest bit stands for 2^lsb.

    Each segment of the sum (its blocks, or all of it where no scale changes) is summed exactly, rounded once to a
    multiple of 2^lsb (ties to even), and added; what leaves the range saturates. This is what dataflow hardware builds.
    """

    name = "mx.window"
    width: IntAttr = param_def(converter=IntAttr.get)
    lsb: IntAttr = param_def(converter=IntAttr.get)

    @property
    def label(self) -> str:
        """`window 40 at 2^-20`."""
        return f"window {self.width.data} at 2^{self.lsb.data}"

    def verify(self) -> None:
        if not NARROWEST <= self.width.data <= WIDEST:
            raise VerifyException(f"a window has {NARROWEST} to {WIDEST} bits, got {self.width.data}")
        if not -200 <= self.lsb.data <= 200:
            raise VerifyException(f"a window's lowest bit lies between 2^-200 and 2^200, got 2^{self.lsb.data}")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            width = parser.parse_integer()
            parser.parse_punctuation(",")
            return IntAttr(width), IntAttr(parser.parse_integer())

    def print_parameters(self, printer: Printer) -> None:
        printer.print_string(f"<{self.width.data}, {self.lsb.data}>")


def windowed(input: Tensor, weight: Tensor, bias: Tensor | None, width: int, lsb: int, segment: int) -> Tensor:
    """input [..., M, K] times weight [..., K, N], plus bias [N], in f64: multiples of 2^lsb in `width` bits.

    K is cut into segments of `segment`, the last of which may be shorter. The sum starts as the bias, rounded; every
    segment's exact sum is rounded to a multiple of 2^lsb, ties to even; both, and each sum, saturate. Operands are of
    formats whose elements have at most 8 exponents' worth of digits under factors that are powers of two, one for each
    segment, so that values alone say what the sums are. A row that meets a NaN is NaN.
    """
    import torch

    x, w = input.to(torch.float64), weight.to(torch.float64)
    segments = range(0, x.shape[-1], segment)
    terms = (_exact(x[..., start : start + segment], w[..., start : start + segment, :]) for start in segments)
    batch = torch.broadcast_shapes(x.shape[:-2], w.shape[:-2])
    return _summed(terms, bias, width, lsb, x.new_zeros((*batch, x.shape[-2], w.shape[-1])))


def _summed(terms: Iterable[Tensor], bias: Tensor | None, width: int, lsb: int, zero: Tensor) -> Tensor:
    """The window's sum of exact terms on top of the bias; `zero` has its shape."""
    lowest, top = -(2.0 ** (width - 1)), 2.0 ** (width - 1) - 1

    def held(number: Tensor) -> Tensor:
        return (number.to(zero.dtype) * 2.0**-lsb).round().clamp(lowest, top)

    total = zero if bias is None else zero + held(bias)
    for term in terms:
        total = (total + held(term)).clamp(lowest, top)
    return total * 2.0**lsb


def windowed_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool, width: int, lsb: int, segment: int
) -> Tensor:
    """`windowed` with a weight [N, K], or [K, N] where it is `transposed`, as linear layers have it."""
    weight = weight if transposed else weight.T
    return windowed(input[None], weight, bias, width, lsb, segment)[0]


_NARROW = 2.0**-15
"""Below this part of a segment's largest value lie the digits that are summed apart."""


def _exact(x: Tensor, w: Tensor) -> Tensor:
    """The sums of products of one segment: exact, or rounded to odd, which a later rounding does not see.

    Both operands are brought below 2 and cut in two where they span more than f64 sums exactly.
    """
    import torch

    x, ex = _normalized(x, -1)
    w, ew = _normalized(w, -2)
    xs, ws = x.abs() < _NARROW, w.abs() < _NARROW
    if not bool((xs & (x != 0)).any()) and not bool((ws & (w != 0)).any()):
        return torch.ldexp(x @ w, ex + ew)
    xl, wl = x.masked_fill(xs, 0.0), w.masked_fill(ws, 0.0)
    xs, ws = x - xl, w - wl
    return torch.ldexp(sum_to_odd([xl @ wl, xl @ ws, xs @ wl, xs @ ws]), ex + ew)


def _normalized(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(x times a power of two, below 2 along `dim`; the power's exponent)."""
    import torch

    largest = x.abs().amax(dim, keepdim=True) if x.numel() else x.new_zeros(())
    exponent = torch.frexp(largest)[1].to(torch.int64) - 1
    return torch.ldexp(x, -exponent), exponent


def windowed_codes(input: Coded, weight: Coded, bias: Tensor | None, width: int, lsb: int) -> Tensor:
    """The same for operands under factors of any kind: input [..., K], weight [N, K] -> [..., N] f64.

    Factors of a segment are multiplied exactly; a factor of a whole tensor is multiplied at the end, once.
    """
    import torch

    length = segment_length(input.length, weight.length, input.size)
    leading = input.codes.shape[:-1]
    x, sx = in_segments(input, length)
    w, sw = in_segments(weight, length)
    x, sx = x.reshape(-1, *x.shape[-2:]), sx.reshape(-1, sx.shape[-1])
    exact = fits_f64(input.bounds, weight.bounds, length)

    def term(segment: int) -> Tensor:
        scale = sx[:, segment, None].to(torch.float64) * sw[None, :, segment].to(torch.float64)
        return exact_dot(x[:, segment], w[:, segment], exact) * scale

    zero = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64, device=x.device)
    total = _summed(map(term, range(x.shape[1])), bias, width, lsb, zero).reshape(*leading, w.shape[0])
    return _times(total, [over for over in (input.over, weight.over) if over is not None])


def _times(total: Tensor, factors: list[Tensor]) -> Tensor:
    """The total times f32 factors of the whole tensor: exact, or rounded to odd where f64 does not hold the product.

    What follows is one rounding to 24 bits at most, which odd digits keep right.
    """
    import torch

    if not factors:
        return total
    factor = torch.ones((), dtype=torch.float64, device=total.device)
    for each in factors:  # two of 24 digits each
        factor = factor * each.to(torch.float64)
    product = total * factor
    (a, b), (c, d) = _split(total), _split(factor)
    rest = ((a * c - product) + a * d + b * c) + b * d
    return to_odd(product, rest)


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of 26 digits (Dekker, "A floating-point technique for extending the available precision", 1971)."""
    large = x * (2.0**27 + 1)
    high = large - (large - x)
    return high, x - high


def why_no_window_operand(fmt: Attribute) -> str | None:
    """Why a contraction into a window does not take operands of a format; None where it does."""
    if is_wide(fmt):
        return f"it is {fmt}, not quantized"
    if isinstance(fmt, MixedType):
        return why_no_codes(fmt.low) or why_no_codes(fmt.high)
    return why_no_codes(fmt)


def common_segment(one: tuple[Attribute, int], other: tuple[Attribute, int], size: int) -> int:
    """The length of the segments in which operands of two formats keep one scale, each with its summed dimension.

    A size that a format does not divide, or that is not known, is `WHOLE` where no scale changes along it.
    """
    lengths = [length for fmt, along in (one, other) if (length := _length(fmt, along, size)) is not None]
    return gcd(*lengths) if lengths else WHOLE


WHOLE = 1 << 40
"""A segment longer than any sum."""


def why_not_exact(one: tuple[Attribute, int], other: tuple[Attribute, int], size: int) -> str | None:
    """Why f64 does not hold the products of two formats (each with the dimension it is summed along) and their scales.

    Scales that are powers of two change no digits; others add theirs to those of the products' sum.
    """
    length = min(common_segment(one, other, size), size if size != DYNAMIC_INDEX else WHOLE)
    bounds = [bounds_of_format(fmt) for fmt, _ in (one, other)]
    digits = sum(scale_digits(fmt) for fmt, _ in (one, other))
    needed = sum(log2(each.largest / each.step) for each in bounds) + log2(max(length, 1)) + digits
    if not digits or needed <= 53:
        return None
    return (
        f"sums of {length} products of {one[0]} and {other[0]} with their scales take {floor(needed) + 1} digits, "
        "and the definition has 53: use scales that are powers of two"
    )


def _length(fmt: Attribute, along: int, size: int) -> int | None:
    """The block's length along a dimension, None where one scale holds for all of it."""
    block = fmt.low if isinstance(fmt, MixedType) else fmt
    if not isinstance(block, BlockType):
        return None
    own = block.dims[along] if len(block.dims) >= -along else 1
    return None if own == DYNAMIC_INDEX or (size != DYNAMIC_INDEX and own >= size) else own


def scale_digits(fmt: Attribute) -> int:
    """Binary digits of a format's scale: 0 where it is a power of two, or where there is none."""
    if isinstance(fmt, MixedType):
        return max(scale_digits(fmt.low), scale_digits(fmt.high))
    if not isinstance(fmt, BlockType) or fmt.scale == f8E8M0FNU:
        return 0
    numbers = numbers_of(fmt.scale)
    element = numbers.element_numbers if isinstance(numbers, Plain) else None
    return element.precision + 1 if isinstance(element, Minifloat) else 24


def needed_bits(largest: float, window: WindowAttr) -> int:
    """Bits of a window with the same lowest bit that holds a magnitude."""
    return max(0, floor(log2(max(largest, 1e-300))) + 1 - window.lsb.data) + 1
