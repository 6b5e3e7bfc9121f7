"""Functions that dataflow hardware computes in integers, on codes of fixed-point numbers: the definition, to the bit.

A code c of `!mx.fixed<W, F>` stands for c x 2^-F. Every function takes and gives int64 tensors of codes; the numbers
that an algorithm needs (widths, constants, tables) follow from types and sizes alone and stand in a dataclass of its
own, which a hardware generator reads too. Widths are at most `WIDEST` bits, so that no product leaves int64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

WIDEST = 24
"""Bits of a value between operations, at most: f32 and f64 hold its every code."""

LONGEST = 1 << 14
"""Numbers of one row that is normalized, at most."""

ROUNDINGS = ("rne", "rna", "rtz")


def shifted(x: Tensor, places: int | Tensor, rounding: str = "rne") -> Tensor:
    """`x` x 2^-places, rounded once; negative places shift to the left.

    Ties go to even (`rne`) or away from zero (`rna`); `rtz` drops what lies behind the point.
    """
    import torch

    if isinstance(places, int):
        if places <= 0:
            return x << -places
        places = torch.full((), places, dtype=torch.int64, device=x.device)
    right, left = places.clamp(min=0, max=62), (-places).clamp(min=0, max=62)
    whole, rest = x >> right, x - ((x >> right) << right)
    half = torch.where(right > 0, torch.ones_like(right) << (right - 1).clamp(min=0), torch.zeros_like(right))
    negative = x < 0
    match rounding:
        case "rne":
            up = (rest > half) | ((rest == half) & ((whole & 1) == 1))
        case "rna":
            up = (rest > half) | ((rest == half) & ~negative)
        case "rtz":
            up = (rest > 0) & negative
        case _:
            raise ValueError(f"a shift rounds by {' or '.join(ROUNDINGS)}, got {rounding}")
    return torch.where(right > 0, whole + up.to(torch.int64), x << left)


def saturated(x: Tensor, width: int) -> Tensor:
    """`x` held within the range of two's complement numbers of `width` bits."""
    return x.clamp(-(1 << (width - 1)), (1 << (width - 1)) - 1)


def requantized(x: Tensor, fraction: int, into: Point, rounding: str = "rne") -> Tensor:
    """Codes with `fraction` bits behind the point in another fixed-point format, rounded once, saturated."""
    return saturated(shifted(x, fraction - into.fraction, rounding), into.width)


def bits_above(number: int) -> int:
    """The smallest n with number <= 2^n."""
    return max(number - 1, 0).bit_length()


@dataclass(frozen=True)
class Point:
    """A fixed-point format: `width` bits, `fraction` of them behind the point."""

    width: int
    fraction: int


@dataclass(frozen=True)
class InverseRoot:
    """1 / sqrt(sum / size) for the exact sum of squares of `size` codes, by one integer root and one division.

    `widest` is the width of the codes that are squared; `eps` the number beneath the root, in units of the value.
    """

    widest: int
    fraction: int
    size: int
    eps: float

    ROOT_BITS = 20

    @cached_property
    def added(self) -> int:
        """eps x size in units of a squared code; at least 1, so that the root is never zero."""
        return max(1, round(self.eps * self.size * 2.0 ** (2 * self.fraction)))

    @cached_property
    def sum_bits(self) -> int:
        """An even number of bits that holds every sum."""
        most = self.size * (1 << (2 * self.widest - 2)) + self.added
        return most.bit_length() + most.bit_length() % 2

    @cached_property
    def root_of_size(self) -> int:
        """The smallest g with sqrt(size) <= 2^g."""
        return bits_above(math.isqrt(self.size - 1) + 1)

    @cached_property
    def numerator(self) -> int:
        """sqrt(size) x 2^(2 ROOT_BITS - g), rounded down."""
        return math.isqrt(self.size << (2 * (2 * self.ROOT_BITS - self.root_of_size)))

    @property
    def normal(self) -> Point:
        """The format of a normalized number, whose magnitude is sqrt(size) at most."""
        return Point(self.ROOT_BITS + 2, self.ROOT_BITS - self.root_of_size)

    def places(self, even: Tensor) -> Tensor:
        """How far a product of code and reciprocal is shifted to the right: `even` is twice what the root was."""
        return self.ROOT_BITS + self.sum_bits // 2 - self.root_of_size - self.normal.fraction - even // 2

    def __call__(self, total: Tensor) -> tuple[Tensor, Tensor]:
        """(reciprocal, even) of sums of squares."""
        import torch

        total = total + self.added
        mantissa, exponent = torch.frexp(total.to(torch.float64))
        del mantissa
        length = exponent.to(torch.int64)
        length = torch.where((torch.ones_like(total) << (length - 1).clamp(0, 62)) > total, length - 1, length)
        even = (self.sum_bits - length) & ~1
        drop = self.sum_bits - 2 * self.ROOT_BITS - even
        top = torch.where(drop >= 0, total >> drop.clamp(min=0), total << (-drop).clamp(min=0))
        root = top.to(torch.float64).sqrt().floor().to(torch.int64)
        return torch.div(torch.full_like(root, self.numerator), root, rounding_mode="floor"), even

    def scaled(self, x: Tensor, reciprocal: Tensor, even: Tensor) -> Tensor:
        """Codes times their reciprocal, in the format `normal`."""
        return saturated(shifted(x * reciprocal, self.places(even)), self.normal.width)


def rms_norm(
    x: Tensor, weight: Tensor | None, given: Point, weights: Point | None, result: Point, eps: float
) -> Tensor:
    """RMSNorm along the last dimension (Zhang and Sennrich 2019, equation 4): x [..., D], weight [D] -> [..., D]."""
    root = InverseRoot(given.width, given.fraction, x.shape[-1], eps)
    normal = root.scaled(x, *root((x * x).sum(-1, keepdim=True)))
    if weight is None or weights is None:
        return requantized(normal, root.normal.fraction, result)
    return requantized(normal * weight, root.normal.fraction + weights.fraction, result)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    given: Point,
    weights: Point,
    biases: Point | None,
    result: Point,
    eps: float,
) -> Tensor:
    """LayerNorm along the last dimension (Ba et al. 2016): x [..., D], weight and bias [D] -> [..., D].

    The mean is rounded to a code, half up; the squares of what remains are summed exactly.
    """
    import torch

    size = x.shape[-1]
    total = x.sum(-1, keepdim=True)
    mean = torch.div(2 * total + size, 2 * size, rounding_mode="floor")
    centred = x - mean
    root = InverseRoot(given.width + 1, given.fraction, size, eps)
    normal = root.scaled(centred, *root((centred * centred).sum(-1, keepdim=True)))
    fraction = root.normal.fraction + weights.fraction
    product = normal * weight
    if bias is not None and biases is not None:
        product = product + shifted(bias, biases.fraction - fraction)
    return requantized(product, fraction, result)


@dataclass(frozen=True)
class PowerOfTwo:
    """2^f for f in [0, 1): 2^bits straight segments; f and the result (in [1, 2)) with `FRACTION` bits each."""

    bits: int

    FRACTION = 20

    @cached_property
    def bases(self) -> list[int]:
        count = 1 << self.bits
        return [round(2.0 ** (i / count + self.FRACTION)) for i in range(count)]

    @cached_property
    def steps(self) -> list[int]:
        """The rise over each segment."""
        return [b - a for a, b in zip(self.bases, [*self.bases[1:], 2 << self.FRACTION], strict=True)]

    def __call__(self, f: Tensor) -> Tensor:
        import torch

        low = self.FRACTION - self.bits
        index, rest = f >> low, f & ((1 << low) - 1)
        bases, steps = (torch.tensor(t, dtype=torch.int64, device=f.device) for t in (self.bases, self.steps))
        return bases[index] + ((steps[index] * rest) >> low)


@dataclass(frozen=True)
class Exponential:
    """e^(x · scale) as 2^(whole + f): the factor scale · log2(e) has `FACTOR_BITS` bits."""

    fraction: int
    scale: float
    bits: int

    FACTOR_BITS = 18

    @cached_property
    def factor_exponent(self) -> int:
        """The factor is factor x 2^-factor_exponent."""
        return self.FACTOR_BITS - math.frexp(self.scale * math.log2(math.e))[1]

    @cached_property
    def factor(self) -> int:
        return round(math.ldexp(self.scale * math.log2(math.e), self.factor_exponent))

    @property
    def places(self) -> int:
        """The shift to the right of a product of code and factor that leaves PowerOfTwo.FRACTION bits."""
        return self.fraction + self.factor_exponent - PowerOfTwo.FRACTION

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(whole, 2^f) with e^(x · scale) = 2^whole x 2^f."""
        product = x * self.factor
        z = product >> self.places if self.places >= 0 else product << -self.places
        f = z & ((1 << PowerOfTwo.FRACTION) - 1)
        return z >> PowerOfTwo.FRACTION, PowerOfTwo(self.bits)(f)


def softmax(
    x: Tensor, given: Point, result: Point, bits: int, scale: float = 1.0, keep: Tensor | None = None
) -> Tensor:
    """softmax(x · scale) along the last dimension: x [..., N]; where `keep` (broadcast to x) is False, 0.

    scale > 0; a row that keeps nothing is 0. Weights have 20 bits behind the point and are cut there, so that the sum
    of a row is short by N x 2^-20 at most.
    """
    import torch

    p = PowerOfTwo.FRACTION
    lowest = -(1 << (given.width - 1))
    masked = x if keep is None else torch.where(keep, x, lowest)
    whole, power = Exponential(given.fraction, scale, bits)(masked - masked.amax(-1, keepdim=True))
    down = -whole
    weight = torch.where(down > p + 1, torch.zeros_like(power), power >> down.clamp(0, p + 2))
    if keep is not None:
        weight = torch.where(keep, weight, torch.zeros_like(weight))
    more = bits_above(x.shape[-1])
    total = weight.sum(-1, keepdim=True).clamp(min=1)
    reciprocal = torch.div(torch.full_like(total, 1 << (2 * p + more)), total, rounding_mode="floor")
    return requantized(weight * reciprocal, 2 * p + more, result)


def mean(total: Tensor, count: int, given: Point, result: Point) -> Tensor:
    """The mean of `count` codes whose sum is `total`, rounded half up to a code of the result."""
    import torch

    places = result.fraction - given.fraction
    top, bottom = total << max(places, 0), count << max(-places, 0)
    return saturated(torch.div(2 * top + bottom, 2 * bottom, rounding_mode="floor"), result.width)


def exponential(x: Tensor, given: Point, result: Point, bits: int) -> Tensor:
    """e^x."""
    whole, power = Exponential(given.fraction, 1.0, bits)(x)
    places = PowerOfTwo.FRACTION - result.fraction - whole
    far = places < -(result.width + 1)
    found = saturated(shifted(power, places.clamp(-(result.width + 1), 60)), result.width)
    return found.masked_fill(far, (1 << (result.width - 1)) - 1)


@dataclass(frozen=True)
class Curve:
    """A function that a table of straight segments holds on [-2^reach, 2^reach).

    Beneath lies the constant `below`; above lies the constant `above`, or the input itself where it is None.
    """

    function: Callable[[float], float]
    reach: int
    below: int
    above: int | None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


CURVES: dict[str, Curve] = {
    "silu": Curve(lambda x: x * _sigmoid(x), 4, 0, None),
    "gelu": Curve(lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)), 3, 0, None),
    "gelu_tanh": Curve(_gelu_tanh, 3, 0, None),
    "tanh": Curve(math.tanh, 3, -1, 1),
    "sigmoid": Curve(_sigmoid, 4, 0, 1),
}


@dataclass(frozen=True)
class Table:
    """A curve as 2^bits straight segments for inputs and results of stated formats."""

    curve: str
    given: Point
    result: Point
    bits: int

    SLOPE_FRACTION = 16

    @property
    def reach(self) -> int:
        """The table spans [-2^reach, 2^reach): no more than the input's format does."""
        return min(CURVES[self.curve].reach, self.given.width - 1 - self.given.fraction)

    @property
    def index_bits(self) -> int:
        return min(self.bits, self.reach + 1 + self.given.fraction)

    @property
    def low_bits(self) -> int:
        """Bits of the place inside a segment."""
        return self.reach + 1 + self.given.fraction - self.index_bits

    @property
    def fraction(self) -> int:
        """Bits behind the point of slope times place, and of the sum."""
        return self.given.fraction + self.SLOPE_FRACTION

    @cached_property
    def points(self) -> list[float]:
        """The curve's values at both ends of every segment."""
        step = 2.0 ** (self.reach + 1 - self.index_bits)
        function = CURVES[self.curve].function
        return [function(-(2.0**self.reach) + i * step) for i in range((1 << self.index_bits) + 1)]

    @cached_property
    def slopes(self) -> list[int]:
        step = 2.0 ** (self.reach + 1 - self.index_bits)
        return [
            round((b - a) / step * (1 << self.SLOPE_FRACTION))
            for a, b in zip(self.points[:-1], self.points[1:], strict=True)
        ]

    @property
    def base_fraction(self) -> int:
        """Bits behind the point of the values at the segments' beginnings."""
        return min(self.result.fraction + 2, self.fraction)

    @cached_property
    def bases(self) -> list[int]:
        return [round(math.ldexp(value, self.base_fraction)) for value in self.points[:-1]]

    def __call__(self, x: Tensor) -> Tensor:
        """The results' codes for the inputs' codes."""
        import torch

        end = 1 << (self.reach + self.given.fraction)
        place = (x + end).clamp(0, 2 * end - 1)
        index, rest = place >> self.low_bits, place & ((1 << self.low_bits) - 1)
        bases, slopes = (torch.tensor(t, dtype=torch.int64, device=x.device) for t in (self.bases, self.slopes))
        inside = (bases[index] << (self.fraction - self.base_fraction)) + slopes[index] * rest
        found = requantized(inside, self.fraction, self.result)
        curve = CURVES[self.curve]
        below = saturated(torch.full_like(x, curve.below) << self.result.fraction, self.result.width)
        above = (
            requantized(x, self.given.fraction, self.result)
            if curve.above is None
            else saturated(torch.full_like(x, curve.above) << self.result.fraction, self.result.width)
        )
        return torch.where(x < -end, below, torch.where(x >= end, above, found))
