"""The largest of several numbers, or their mean."""

from __future__ import annotations

from dataclasses import dataclass

from ....dialects.integer import Point, bits_above
from ..arithmetic import product_unsigned, reciprocal, requantized, saturated
from ..rtl import Module, Signal, join
from ._schedule import Schedule
from ._stream import Pipe, Stage, StreamModule


@dataclass(frozen=True)
class Pool(Stage):
    """Of numbers that come as [`runs`, `count`, `inner`] the largest (`max`) or the mean (`mean`) along `count`.

    What was found so far stands in a memory of `inner` words.
    """

    operation: str
    given: Point
    result: Point
    runs: int
    count: int
    inner: int = 1

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.given.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.result.width}

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.runs * self.count * self.inner, "out": self.runs * self.inner}

    @property
    def cycles(self) -> int:
        return self.beats["in"]

    @property
    def schedule(self) -> Schedule:
        last = range((self.count - 1) * self.inner, self.count * self.inner)
        return Schedule(3 + (self.operation == "mean"), passes=(self.count * self.inner, last))

    @property
    def kept_bits(self) -> int:
        """Bits of what was found so far: of the sum of all numbers, or of one."""
        return self.given.width + (bits_above(self.count) if self.operation == "mean" else 0)

    @property
    def division(self) -> Division:
        return Division(self.given, self.result, self.count)

    def module(self, name: str) -> Module:
        return _Builder(self, self.start(name)).build()


@dataclass(frozen=True)
class Division:
    """The mean of `count` codes, as `integer.mean` has it: floor((2 top + bottom) / (2 bottom)).

    The sum is lifted so that it is never negative, powers of two are taken out of the division, and what is left is a
    product with a constant.
    """

    given: Point
    result: Point
    count: int

    @property
    def places(self) -> int:
        return self.result.fraction - self.given.fraction

    @property
    def lift(self) -> int:
        """The sum grows by count x 2^lift, the mean by a whole number of codes."""
        return max(self.given.width - 1, -self.places)

    @property
    def odd(self) -> int:
        """The divisor without its factors of two."""
        return self.count >> self.twos

    @property
    def twos(self) -> int:
        return (self.count & -self.count).bit_length() - 1

    @property
    def bits(self) -> int:
        """Bits of the numerator without those that the powers of two take away."""
        most = (self.count << (self.given.width - 1)) - 1 + (self.count << self.lift)
        numerator = (most << (max(self.places, 0) + 1)) + (self.count << max(-self.places, 0))
        return (numerator >> self.shift).bit_length()

    @property
    def shift(self) -> int:
        """Factors of two of the divisor."""
        return self.twos + max(-self.places, 0) + 1

    def numerator(self, total: Signal) -> Signal:
        """What the odd divisor divides, unsigned."""
        module, up = total.module, max(self.places, 0) + 1
        width = self.bits + self.shift + 1
        lifted = total.signed(width) + (self.count << self.lift)
        lifted = join(lifted.low(width - up), module.constant(0, up)) + (self.count << max(-self.places, 0))
        return lifted.bits(self.shift, self.bits)

    def product(self, numerator: Signal) -> Signal:
        """The quotient, unsigned, and bits behind it."""
        if self.odd == 1:
            return numerator
        factor, _ = reciprocal(self.odd, self.bits)
        return product_unsigned(numerator, numerator.module.constant(factor, factor.bit_length()))

    def mean(self, product: Signal) -> Signal:
        """The code of the mean."""
        behind = 0 if self.odd == 1 else reciprocal(self.odd, self.bits)[1]
        quotient = product.bits(behind, product.width - behind)
        lift = self.lift + self.places
        width = max(quotient.width, lift + 1) + 1
        return saturated(quotient.unsigned(width) - (1 << lift), self.result.width)


class _Builder:
    def __init__(self, stage: Pool, module: StreamModule) -> None:
        self.stage, self.module = stage, module
        self.pipe = Pipe(module, "out")

    def build(self) -> Module:
        stage, module, pipe = self.stage, self.module, self.pipe
        valid = module.valid("in")
        taken = valid & pipe.enable
        place, place_ends = module.counter(stage.inner, taken, "place")
        index, last = module.counter(stage.count, taken & place_ends, "index")
        number, first = pipe.step(module["in"]), pipe.step(index.equals(0))
        comes = pipe.flag(valid)
        found = module.wire(stage.kept_bits)
        before = self._before(place, comes & pipe.enable, found.q)
        found.set(self._joined(number, before, first))
        kept = pipe.step(found.q)
        done = pipe.flag(pipe.flag(valid & last))
        if stage.operation == "max":
            return self._end(done, requantized(kept, stage.given.fraction, stage.result))
        division = stage.division
        product = pipe.step(division.product(division.numerator(kept)))
        return self._end(pipe.flag(done), division.mean(product))

    def _before(self, place: Signal, enable: Signal, found: Signal) -> Signal:
        """What was found at a place before, a step later; `found` takes its place."""
        stage, module, pipe = self.stage, self.module, self.pipe
        if stage.inner == 1:
            return module.delayed(found, enable)
        return module.held_read(stage.inner, place, pipe.enable, write=pipe.step(place), data=found, enable=enable)

    def _joined(self, number: Signal, before: Signal, first: Signal) -> Signal:
        number = number.signed(self.stage.kept_bits)
        if self.stage.operation == "max":
            return (first | before.less_signed(number)).then(number, before)
        return first.then(number, before + number)

    def _end(self, valid: Signal, data: Signal) -> Module:
        return self.module.close({"in": self.pipe.enable}, {"out": self.pipe.end(valid, data)})
