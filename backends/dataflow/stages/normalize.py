"""RMSNorm and LayerNorm of rows: `dialects.integer.rms_norm` and `layer_norm`, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ....dialects.integer import InverseRoot, Point
from ..arithmetic import leading_zeros, product, requantized, saturated, shifted, shifted_by
from ..rtl import Module, Signal, join
from ._schedule import Schedule, bank, in_turns
from ._serial import quotient, square_root
from ._stream import Banks, Memory, Pipe, StreamModule, Through


@dataclass(frozen=True)
class Normalize(Through):
    """Rows of `size` numbers, normalized; `centred` takes their mean away first (LayerNorm).

    The loaded memory holds a weight, and above it a bias where there is one, for every place of a row.
    """

    given: Point
    result: Point
    rows: int
    size: int
    eps: float
    weight: Point | None
    bias: Point | None = None
    centred: bool = False

    @cached_property
    def root(self) -> InverseRoot:
        return InverseRoot(self.given.width + self.centred, self.given.fraction, self.size, self.eps)

    @property
    def numbers(self) -> int:
        return self.rows * self.size

    @property
    def memories(self) -> tuple[Memory, ...]:
        bits = sum(point.width for point in (self.weight, self.bias) if point is not None)
        return (Memory(self.size, bits),) if bits else ()

    @property
    def row_overhead(self) -> int:
        """Cycles of a row in which nothing is read: mean, root, division, and the bank's release."""
        mean = self.sum_bits + 2 if self.centred else 0
        return mean + self.root.ROOT_BITS + self.root.numerator.bit_length() + 4

    @property
    def cycles(self) -> int:
        return self.rows * (self.size + self.row_overhead)

    @property
    def schedule(self) -> Schedule:
        delay = 4 + (self.weight is not None)
        return in_turns(delay, bank("in", self.size, self.size), lead=self.row_overhead - 1, rests=True)

    @property
    def sum_bits(self) -> int:
        """Bits of the sum of a row, shifted so that it is never negative, doubled, and half a size added."""
        return (self.size * (1 << self.given.width) * 2 + self.size).bit_length()

    def module(self, name: str) -> Module:
        return _Builder(self, self.start(name)).build()


class _Builder:
    def __init__(self, stage: Normalize, module: StreamModule) -> None:
        self.stage, self.module = stage, module
        self.rows = Banks(module, "in", stage.size)

    def build(self) -> Module:
        stage, module, rows = self.stage, self.module, self.rows
        squares = self._summed(self._square(), stage.root.sum_bits)
        busy, drains = module.register(1, "busy"), module.register(1, "drains")
        start = rows.available & ~busy.q
        mean = None
        if stage.centred:
            start, mean, squares = self._mean(start, squares)
        reciprocal_done, reciprocal, half_even = self._reciprocal(start, squares)
        pipe = Pipe(module, "out")
        go = drains.q & pipe.enable
        place, last = module.counter(stage.size, go, "place")
        valid = pipe.flag(drains.q)
        free = rows.release(go & last, pipe.enable, valid)
        busy.set((rows.available & ~busy.q) | (busy.q & ~free))
        drains.set(reciprocal_done | (drains.q & ~(go & last)))
        number = rows.read(place, pipe.enable)
        if mean is not None:
            number = number.signed(number.width + 1) - mean.signed(number.width + 1)
        scaled = pipe.step(product(number, join(module.constant(0, 1), reciprocal)))
        normal = pipe.step(self._normal(scaled, pipe.step(half_even)))
        valid = pipe.flag(pipe.flag(valid))
        valid, out = self._weighted(pipe, valid, normal, place)
        return module.close({"in": rows.ready}, {"out": pipe.end(valid, out)})

    def _square(self) -> Signal:
        number = self.module["in"]
        return product(number, number)

    def _summed(self, term: Signal, width: int) -> Signal:
        """A sum over each row, kept with it."""
        total = self.module.register(width)
        now = total.q + term.resized(width)
        total.set(self.rows.last_place.then(0, now), self.rows.writing)
        return self.rows.kept(now)

    def _mean(self, start: Signal, squares: Signal) -> tuple[Signal, Signal, Signal]:
        """(start of what follows, the mean rounded half up, the sum of squares around it)."""
        stage, module = self.stage, self.module
        bits = stage.sum_bits
        total = self._summed(module["in"], bits)
        lowest = stage.size << (stage.given.width - 1)
        doubled = join((total + lowest).low(bits - 1), module.constant(0, 1)) + stage.size
        done, found = quotient(module, start, doubled, module.constant(2 * stage.size, bits))
        mean = (found - (1 << (stage.given.width - 1))).low(stage.given.width)
        width = stage.root.sum_bits + 2
        crossed = product(mean, total).resized(width)
        squared = product(product(mean, mean), module.constant(stage.size, bits)).resized(width)
        around = squares.unsigned(width) - join(crossed.low(width - 1), module.constant(0, 1)) + squared
        held = module.delayed(around.low(stage.root.sum_bits), done)
        return module.delayed(done, initial=0), mean, held

    def _reciprocal(self, start: Signal, squares: Signal) -> tuple[Signal, Signal, Signal]:
        """(done, reciprocal of the root, half of the even number of places by which the sum was moved)."""
        root, module = self.stage.root, self.module
        total = squares + root.added
        normal, zeros = leading_zeros(total)
        moved = zeros.bit(0).then(join(module.constant(0, 1), normal.top(normal.width - 1)), normal)
        digits = 2 * root.ROOT_BITS
        missing = max(0, digits - moved.width)
        top = join(moved, module.constant(0, missing)) if missing else moved.top(digits)
        half_even = module.delayed(zeros.top(zeros.width - 1), start)
        done, found = square_root(module, start, top)
        numerator = module.constant(root.numerator, root.numerator.bit_length())
        done, reciprocal = quotient(module, done, numerator, found)
        return done, reciprocal.low(root.ROOT_BITS + 2), half_even

    def _normal(self, scaled: Signal, half_even: Signal) -> Signal:
        """The product of number and reciprocal as a number of format `root.normal`."""
        root = self.stage.root
        highest = root.ROOT_BITS + root.sum_bits // 2 - root.root_of_size - root.normal.fraction
        width = highest.bit_length() + 2
        places = self.module.constant(highest, width) - half_even.unsigned(max(width, half_even.width)).low(width)
        return saturated(shifted_by(scaled, places, 0, highest), root.normal.width)

    def _weighted(self, pipe: Pipe, valid: Signal, normal: Signal, place: Signal) -> tuple[Signal, Signal]:
        """Times the weight, plus the bias, in the result's format."""
        stage, module, root = self.stage, self.module, self.stage.root
        if stage.weight is None:
            return valid, requantized(normal, root.normal.fraction, stage.result)
        (memory,) = module.loaded(stage.memories)
        word = memory.read(module, pipe.step(pipe.step(place)), pipe.enable)
        fraction = root.normal.fraction + stage.weight.fraction
        found = product(normal, word.low(stage.weight.width))
        if stage.bias is not None:
            bias = shifted(word.bits(stage.weight.width, stage.bias.width), stage.bias.fraction - fraction)
            width = max(found.width, bias.width) + 1
            found = found.signed(width) + bias.signed(width)
        return pipe.flag(valid), requantized(pipe.step(found), fraction, stage.result)
