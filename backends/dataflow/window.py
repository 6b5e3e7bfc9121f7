"""The accumulator of a contraction that saturates: exact sums of segments, shifted into a window and added there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...dialects.integer import Point
from .arithmetic import magnitude_bits, requantized, saturated, shifted
from .rtl import Module, Signal, join

if TYPE_CHECKING:
    from .dot_product import Pipeline


@dataclass(frozen=True)
class Window:
    """Two's complement of `width` bits whose lowest bit stands for 2^lsb.

    A sum starts as its bias; a segment's exact sum is shifted into the window, rounded to even there, and added;
    everything saturates.
    """

    width: int
    lsb: int

    @property
    def total_bits(self) -> int:
        """Bits of a finished sum."""
        return self.width

    def latency(self, has_bias: bool) -> int:
        """Cycles from the exact sum of the last segment to the finished sum."""
        return 2

    def segment_cycles(self, beats: int) -> int:
        """Cycles between the ends of two segments of so many beats."""
        return beats

    def result(self, total: Signal, into: Point) -> Signal:
        """A finished sum in its format, rounded once, saturated."""
        return requantized(total, -self.lsb, into)

    def build(self, pipeline: Pipeline, total: Signal) -> Module:
        """The last stages of a unit's pipeline, behind the exact sum of a segment."""
        term = pipeline.step(_aligned(self, pipeline, total))
        pipeline.beside.pop("exponent", None)
        pipeline.advance()
        return _accumulated(self, pipeline, term)


def _aligned(window: Window, pipeline: Pipeline, total: Signal) -> Signal:
    """The sum in multiples of the window's lowest bit, rounded to even and saturated."""
    unit = pipeline.unit
    least = unit.unit + sum(scale.unit for scale in unit.scales) - window.lsb
    if "exponent" not in pipeline.beside:
        return saturated(shifted(total, -least), window.width)
    most = least + sum(scale.largest_exponent for scale in unit.scales)
    low, high = max(least, -total.width), min(most, window.width)
    low, high = min(low, 0), max(high, 0)
    field = pipeline.beside["exponent"]
    # The shift as a signed number, held between `low` and `high`: beyond, the result is 0 or saturates anyway.
    width = max(field.width, abs(least).bit_length(), abs(most).bit_length()) + 2
    places = field.unsigned(width) + least
    under, over = places.less_signed(low), places.more_signed(high)
    places = under.then(low, over.then(high, places))
    amount = (places - low).low(max(1, (high - low).bit_length()))
    right = -low
    room = max(window.width, total.width) + 1 + right
    moved = total.signed(room).shifted_left(amount)
    term = saturated(shifted(moved, right), window.width)
    if high + total.width <= room - right:
        return term
    bits = magnitude_bits(total)
    size = max(bits.width, places.width) + 1
    beyond = (bits.unsigned(size) + places.signed(size)).more_signed(window.width - 1) & total.any()
    extreme = join(total.sign, (~total.sign).repeated(window.width - 1))
    return beyond.then(extreme, term)


def _accumulated(window: Window, pipeline: Pipeline, term: Signal) -> Module:
    """The sum in the window, and whether it is finished."""
    module, width, bias_format = pipeline.module, window.width, pipeline.unit.bias
    moving = pipeline.enable & pipeline.valid
    held = module.register(width, "total")
    start: Signal = held.q
    if bias_format:
        fresh = module.register(1, "first", initial=1)
        fresh.set(pipeline.last, moving)
        bias = saturated(shifted(pipeline.beside["bias"], bias_format.fraction + window.lsb), width)
        start = fresh.q.then(bias, held.q)
    total = saturated(start.signed(width + 1) + term.signed(width + 1), width)
    held.set(pipeline.last.then(0, total), moving)
    ends = moving & pipeline.last
    told: dict[str, Signal] = {}
    if pipeline.tells_nan:
        seen = module.register(1, "total_nan")
        nan = seen.q | pipeline.beside.get("nan", module.constant(0, 1))
        seen.set(nan & ~pipeline.last, moving)
        told["nan"] = module.delayed(nan, ends)
    done = module.delayed(pipeline.valid & pipeline.last, pipeline.enable, "done", initial=0)
    return module.finish(done=done, total=module.delayed(total, ends), **told)
