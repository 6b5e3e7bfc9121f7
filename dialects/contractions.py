"""What a contraction with an accumulator computes: exact inside a segment, then added as the accumulator says.

The definition on torch tensors, for every format whose values have codes; native kernels give its bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor, gcd, log2
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import NoneAttr

from .formats import BlockType, Encoded, MixedType, Rounding
from .formats._builtin import numbers_of
from .formats._element import Element, Fixed, Minifloat
from .formats._format import Given, Parts
from .formats._plain import Plain, refuse_scale_options, working_dtype
from .formats._scaled import Scales

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import Attribute

    from .accumulator import AccumulatorAttr

LARGEST_CODE = (1 << 15) - 1
"""Codes up to this are whole numbers of the element's smallest step; elements beyond stand for themselves."""

_F64_DIGITS = 53
_DIGITS = 3
"""Mantissa bits of the elements that stand for themselves, at most (`why_no_codes`)."""


@dataclass(frozen=True)
class Bounds:
    """What a format says about its codes: the largest magnitude, and what they are whole multiples of."""

    largest: float
    step: float


@dataclass(frozen=True, eq=False)
class Coded:
    """A tensor [..., K] as codes under one factor for each segment of K.

    codes [..., S x length] f64: zeros behind K; factors [..., S] f32; over: the factor of the whole tensor, f32 without
    dimension, or None. value = code x factor (x over). `length` is None where one segment holds all of K, which may be
    cut as the other operand needs it.
    """

    codes: Tensor
    factors: Tensor
    over: Tensor | None
    length: int | None
    size: int
    bounds: Bounds


def step_of(element: Element) -> float:
    """What codes are counted in: the element's smallest step, or 1 where that would take more than 16 bits."""
    smallest = element.smallest if isinstance(element, Minifloat) else 2.0 ** -_fixed(element).fraction
    return smallest if magnitude_of(element) / smallest <= LARGEST_CODE else 1.0


def magnitude_of(element: Element) -> float:
    """The largest magnitude of an element's value."""
    if isinstance(element, Minifloat):
        return element.largest
    fixed = _fixed(element)
    return max(fixed.top_code, -fixed.bottom_code) * 2.0**-fixed.fraction


def _fixed(element: Element) -> Fixed:
    assert isinstance(element, Fixed)
    return element


def why_no_codes(fmt: Attribute) -> str | None:
    """Why a contraction with an accumulator does not take operands of a format; None where it does."""
    numbers = numbers_of(fmt)
    if isinstance(numbers, BlockType):
        element = numbers.scaling((1,) * len(numbers.dims)).element
    elif isinstance(numbers, Plain):
        element = numbers.element_numbers
    else:
        return f"{fmt} is not made of blocks with one kind of element"
    if not isinstance(element, Fixed | Minifloat):
        return f"the element of {fmt} is no fixed-point number or minifloat"
    if isinstance(element, Minifloat) and element.precision > _DIGITS:
        return f"{fmt} is a wide float: quantize the operand"
    return f"the element of {fmt} has more than 16 bits" if element.bits > 16 else None


def coded(x: Tensor, fmt: Attribute, how: Rounding, *, transposed: bool = False) -> Coded:
    """The codes of a tensor that is rounded into a format. K is its last dimension, or `transposed` the one before."""
    if transposed:
        x, fmt = x.transpose(-1, -2).contiguous(), transposed_format(fmt)
    numbers = numbers_of(fmt)
    if not isinstance(numbers, Plain):
        return coded_parts(numbers.encode(x, how, Given()), fmt)
    refuse_scale_options(numbers, how)
    element = numbers.element_numbers
    values = element.round(x.to(working_dtype(x.dtype, element), copy=True), how)
    return _plain(values, element)


def coded_tensor(encoded: Encoded, *, transposed: bool = False) -> Coded:
    """The codes of a tensor that is encoded already; `transposed` has K as the last but one dimension."""
    encoded = transposed_tensor(encoded) if transposed else encoded
    return coded_parts(encoded.parts, encoded.format)


def transposed_tensor(encoded: Encoded) -> Encoded:
    """The encoded tensor with its last two dimensions swapped: the same codes and scales."""
    swapped = {name: _swapped(part) for name, part in vars(encoded.parts).items()}
    return Encoded.of(transposed_format(encoded.format), Parts(**swapped))  # pyright: ignore[reportArgumentType]


def _swapped(part: Tensor | None) -> Tensor | None:
    return part if part is None or part.dim() < 2 else part.transpose(-1, -2).contiguous()


def transposed_format(fmt: Attribute) -> Attribute:
    """The format of a transposed tensor: blocks lie along the other of the last two dimensions."""
    if isinstance(fmt, MixedType):
        return MixedType(*(transposed_format(part) for part in (fmt.low, fmt.high)))  # pyright: ignore[reportArgumentType]
    if not isinstance(fmt, BlockType):
        return fmt
    dims = (1, *fmt.dims) if len(fmt.dims) == 1 else fmt.dims
    return fmt.with_dims((*dims[:-2], dims[-1], dims[-2]))


def coded_parts(parts: Parts, fmt: Attribute) -> Coded:
    """The codes behind a tensor's parts, K being the last dimension."""
    import torch

    numbers = numbers_of(fmt)
    if isinstance(numbers, Plain):
        element = numbers.element_numbers
        return _plain(element.values(parts.codes, torch.float64), element)
    assert isinstance(numbers, BlockType)
    assert parts.scales is not None
    scaling = numbers.scaling(tuple(parts.codes.shape))
    tiling, element = scaling.tiling, scaling.element
    split = tiling.split(element.values(parts.codes, torch.float64))
    largest = magnitude_of(element)
    if parts.zero_points is not None:
        split = split - tiling.spread(parts.zero_points.to(torch.float64))
        largest = float(_fixed(element).top_code - _fixed(element).bottom_code)
    step = step_of(element)
    own = Scales(parts.scales).factors(torch.float32) * step
    spread = tiling.merge(tiling.spread(own).expand_as(split).contiguous())
    codes = tiling.merge(split / step)
    length = tiling.block[-1]
    whole = length >= tiling.trailing[-1]
    over = None if numbers.tensor_scale == NoneAttr() else parts.global_scale
    factors = spread[..., :: 1 if not codes.shape[-1] else length]
    codes = torch.where(_over_segments(factors, length, codes.shape[-1]).isnan(), 0.0, codes)
    bounds = Bounds(largest / step, _unit(element, step))
    return Coded(codes, factors, over, None if whole else length, codes.shape[-1], bounds)


def _plain(values: Tensor, element: Element) -> Coded:
    """Codes without scales: the step is the factor; a row with a NaN has factor NaN."""
    import torch

    step = step_of(element)
    broken = values.isnan().any(-1, keepdim=True)
    codes = torch.where(broken, 0.0, values.to(torch.float64) / step)
    factors = torch.full_like(codes[..., :1], step, dtype=torch.float32).masked_fill(broken, torch.nan)
    return Coded(codes, factors, None, None, codes.shape[-1], bounds_of(element))


def bounds_of(element: Element) -> Bounds:
    """The bounds of an element's codes."""
    step = step_of(element)
    return Bounds(magnitude_of(element) / step, _unit(element, step))


def bounds_of_format(fmt: Attribute) -> Bounds:
    """The bounds of the codes of a format that has codes (`why_no_codes`), zero points included."""
    numbers = numbers_of(fmt)
    if isinstance(numbers, Plain):
        return bounds_of(numbers.element_numbers)
    assert isinstance(numbers, BlockType)
    element = numbers.scaling((1,) * len(numbers.dims)).element
    found = bounds_of(element)
    return found if numbers.zero == NoneAttr() else replace(found, largest=found.largest * 2)


def _unit(element: Element, step: float) -> float:
    smallest = element.smallest if isinstance(element, Minifloat) else 2.0 ** -_fixed(element).fraction
    return smallest / step


def _over_segments(factors: Tensor, length: int, size: int) -> Tensor:
    return factors.repeat_interleave(length, -1)[..., :size]


def segment_length(a: int | None, b: int | None, size: int) -> int:
    """The length of the segments of K in which both operands keep one factor."""
    if a is None or b is None:
        return a or b or max(size, 1)
    return gcd(a, b)


def in_segments(x: Coded, length: int) -> tuple[Tensor, Tensor]:
    """Codes [..., S, length] and factors [..., S] in segments of a length that divides the tensor's own."""
    import torch

    count = -(-x.size // length)
    codes = torch.nn.functional.pad(x.codes, (0, count * length - x.size)).unflatten(-1, (count, length))
    own = length if x.length is None else x.length
    repeats = count if x.length is None else own // length
    return codes, x.factors.repeat_interleave(repeats, -1)[..., :count]


def linear(input: Coded, weight: Coded, bias: Tensor | None, accumulator: AccumulatorAttr) -> Tensor:
    """input [..., K] times weight [N, K] transposed, plus bias [N] -> [..., N] f32.

    For each segment b: P = the exact sum of its products of codes, rounded to f32; s = factor of the input times
    factor of the weight, rounded to f32; sum = round(fma(P, s, sum)). Then partial sums are added, the product of the
    tensors' own factors is multiplied once, and the bias is added, each in f32.
    """
    import torch

    length = segment_length(input.length, weight.length, input.size)
    leading = input.codes.shape[:-1]
    x, sx = in_segments(input, length)
    w, sw = in_segments(weight, length)
    x, sx = x.reshape(-1, *x.shape[-2:]), sx.reshape(-1, sx.shape[-1])
    exact = fits_f64(input.bounds, weight.bounds, length)
    count = x.shape[1]
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    partials = accumulator.partials.data
    for first in range(min(partials, max(count, 1))):
        own = torch.zeros_like(total)
        for segment in range(first, count, partials):
            dot = _dot(x[:, segment], w[:, segment], exact)
            scale = sx[:, segment, None] * sw[None, :, segment]
            own = _narrowed(fused_multiply_add(dot, scale, own), accumulator)
        total = own if first == 0 else _narrowed(total + own, accumulator)
    if input.over is not None or weight.over is not None:
        total = total * _over(input, weight)
    if bias is not None:
        total = total + bias.to(torch.float32)
    return total.reshape(*leading, w.shape[0])


def holds_every_sum(input: Coded, weight: Coded, accumulator: AccumulatorAttr) -> bool:
    """Whether every sum of products, in any order, is a number of the accumulator: then f32 products give its bits.

    The certificate: factors are powers of two, and the bits of the largest product, of the number of products and of
    the spread of the factors' exponents, together, are no more than the accumulator's digits.
    """
    import torch

    spreads = [_spread(input.factors), _spread(weight.factors)]
    if None in spreads or torch.get_float32_matmul_precision() != "highest":
        return False
    ranges = [spread for spread in spreads if spread is not None]
    if sum(low for low, _ in ranges) < -100 or sum(high for _, high in ranges) > 60:
        return False  # far from subnormals and from the largest f32
    largest = [max(float(each.codes.abs().amax()) / each.bounds.step, 1.0) for each in (input, weight)]
    digits = log2(largest[0] * largest[1] * max(input.size, 1)) + sum(high - low for low, high in ranges)
    return digits <= accumulator.mantissa.data + 1


def _spread(factors: Tensor) -> tuple[float, float] | None:
    """The smallest and the largest exponent; None where a factor is no power of two."""
    import torch

    if not factors.numel():
        return None
    mantissas, exponents = torch.frexp(factors)
    return (float(exponents.min()), float(exponents.max())) if bool((mantissas == 0.5).all()) else None


def linear_in_f32(input: Coded, weight: Coded, bias: Tensor | None) -> Tensor:
    """The same product by torch's f32 operator: right where `holds_every_sum` says so."""
    import torch

    x, w = (values_of(each) for each in (input, weight))
    found = torch.nn.functional.linear(x, w)
    if input.over is not None or weight.over is not None:
        found = found * _over(input, weight)
    return found if bias is None else found + bias.to(torch.float32)


def values_of(x: Coded) -> Tensor:
    """Codes times factors, in f32, the factor of the tensor left out."""
    import torch

    factors = x.factors if x.length is None else _over_segments(x.factors, x.length, x.size)
    return x.codes[..., : x.size].to(torch.float32) * factors


def _over(input: Coded, weight: Coded) -> Tensor:
    """The product of the tensors' own factors, rounded to f32."""
    given = [each.over for each in (input, weight) if each.over is not None]
    return given[0] * given[1] if len(given) == 2 else given[0]


def expert_linear(
    input: Coded, weight: Coded, index: Tensor, bias: Tensor | None, accumulator: AccumulatorAttr
) -> Tensor:
    """Row s of input [S, K] times the weight of expert index[s]: weight [E, N, K], bias [E, N] -> [S, N] f32."""
    result = input.codes.new_empty((input.codes.shape[0], weight.codes.shape[1])).float()
    for expert in range(weight.codes.shape[0]):
        rows = (index == expert).nonzero()[:, 0]
        if len(rows):
            own = None if bias is None else bias[expert]
            result[rows] = linear(rows_of(input, rows), rows_of(weight, expert), own, accumulator)
    return result


def rows_of(x: Coded, rows: Tensor | int) -> Coded:
    """Some of the first dimension's entries."""
    return replace(x, codes=x.codes[rows], factors=x.factors[rows])


def bounds_at_hand(codes: Tensor, bounds: Bounds) -> Bounds:
    """The bounds of these codes: what the format says, narrowed to the numbers that are there.

    A code of at most four binary digits is a whole multiple of an eighth of its leading digit.
    """
    magnitudes = codes.abs()
    nonzero = magnitudes.masked_fill(magnitudes == 0, float("inf"))
    largest = float(magnitudes.amax()) if codes.numel() else 0.0
    if largest == 0:
        return Bounds(bounds.step, bounds.step)
    smallest = float(nonzero.amin())
    return Bounds(largest, max(bounds.step, 2.0 ** (floor(log2(smallest)) - _DIGITS)))


def fits_f64(a: Bounds, b: Bounds, length: int) -> bool:
    """Whether f64 holds every partial sum of a segment's products exactly, by the bounds of the formats alone."""
    return log2(a.largest / a.step) + log2(b.largest / b.step) + log2(max(length, 1)) <= _F64_DIGITS


def _dot(x: Tensor, w: Tensor, exact: bool) -> Tensor:
    """The exact sums of products of one segment, rounded to f32. x [M, L], w [N, L] f64 -> [M, N]."""
    import torch

    return exact_dot(x, w, exact).to(torch.float32)


def exact_dot(x: Tensor, w: Tensor, exact: bool) -> Tensor:
    """The sums of products of one segment: exact, or rounded to odd in f64 where it does not hold them."""
    if exact:
        return x @ w.T
    # Elements below and above 1 apart: each product of two halves fits f64, and the sums meet in one rounding.
    (xs, xl), (ws, wl) = _halves(x), _halves(w)
    return sum_to_odd([xl @ wl.T, xl @ ws.T, xs @ wl.T, xs @ ws.T])


def sum_to_odd(parts: list[Tensor]) -> Tensor:
    """The sum of f64 tensors, rounded to odd."""
    import torch

    total, rests = parts[0], []
    for part in parts[1:]:
        total, rest = two_sum(total, part)
        rests.append(rest)
    low, lowest = rests[0], torch.zeros_like(total)
    for rest in rests[1:]:
        low, error = two_sum(low, rest)
        lowest = lowest + error
    total, low = two_sum(total, low)
    return to_odd(total, low + lowest)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    small = x.abs() < 1
    return x.masked_fill(~small, 0.0), x.masked_fill(small, 0.0)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a x b + c of f32 tensors, rounded once: the product is exact in f64, the sum is rounded to odd before f32.

    Rounding to odd with at least two more digits keeps the second rounding right (Boldo and Melquiond, "Emulation of
    FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
    """
    import torch

    product = a.to(torch.float64) * b.to(torch.float64)
    total, rest = two_sum(product, c.to(torch.float64))
    return torch.where(total.isfinite(), to_odd(total, rest), total).to(torch.float32)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum of two f64 tensors and its error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def to_odd(total: Tensor, rest: Tensor) -> Tensor:
    """`total`, or its neighbour towards total + rest, so that what is not exact ends in an odd digit."""
    import torch

    bits = total.view(torch.int64)
    inexact = (rest != 0) & rest.isfinite() & (bits & 1 == 0)
    towards = torch.where((rest > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + towards, bits).view(torch.float64)


def _narrowed(total: Tensor, accumulator: AccumulatorAttr) -> Tensor:
    """f32 in the accumulator's mantissa; infinity and NaN stay."""
    import torch

    dropped = 23 - accumulator.mantissa.data
    if not dropped:
        return total
    bits = total.view(torch.int32)
    if accumulator.rounding.data == "rne":
        bits = bits + ((bits >> dropped) & 1) + ((1 << (dropped - 1)) - 1)
    return torch.where(total.isfinite(), (bits & -(1 << dropped)).view(torch.float32), total)
