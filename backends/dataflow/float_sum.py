"""The accumulator of a contraction that adds in f32: as `dialects.contractions.linear` says, one segment a cycle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...dialects.contractions import LARGEST_CODE
from ...dialects.errors import MxloomError
from ...dialects.integer import Point
from .codes import OperandCode
from .floats import (
    ADD_STEPS,
    BIAS,
    DIGITS,
    EXPONENT_BITS,
    INTO_STEPS,
    LOWEST,
    OUT_STEPS,
    WIDTH,
    Float,
    added,
    from_fixed,
    into_fixed,
    normalized,
    unpacked,
)
from .rtl import Module, Register, Signal, address_bits

if TYPE_CHECKING:
    from .dot_product import Pipeline

_SMALLEST, _LARGEST = -149, 127
"""Exponents of powers of two in f32: products of scales below are 0, those above are infinite."""
_WIDEST_BIAS = 25


@dataclass(frozen=True)
class FloatSum:
    """Sums of `segments` terms in f32, term b in partial sum b mod `partials`, rounded into `result` at the end.

    A term is the exact sum of a segment, rounded to f32, times the product of the scales; it is added in one rounding.
    The partial sums are added in their order, then the bias. `result` has no infinity, which saturates, and no place
    for what is no number (infinity times zero, infinity less infinity): that is 0.
    """

    partials: int
    segments: int
    result_point: Point

    @property
    def used(self) -> int:
        """Partial sums that terms go to."""
        return min(self.partials, self.segments)

    @property
    def total_bits(self) -> int:
        """Bits of a finished sum."""
        return self.result_point.width

    def folds(self, has_bias: bool) -> int:
        """Additions behind the partial sums."""
        return self.used - 1 + has_bias

    def passes(self, beats: int) -> int:
        """How often a sum of segments of so many beats can go through one adder before the next sum comes."""
        between = (self.segments - 1) * self.segment_cycles(beats) + 1
        return (between - 1) // ADD_STEPS + 1

    def latency(self, has_bias: bool) -> int:
        """Cycles from the exact sum of the last segment to the finished sum."""
        return INTO_STEPS + ADD_STEPS * (1 + self.folds(has_bias)) + OUT_STEPS

    def segment_cycles(self, beats: int) -> int:
        """Cycles between the ends of two segments of so many beats: a partial sum takes a term once it has the last."""
        return max(beats, -(-ADD_STEPS // self.partials)) if self.segments > self.partials else beats

    def result(self, total: Signal, into: Point) -> Signal:
        """A finished sum in its format."""
        assert into == self.result_point, (into, self.result_point)
        return total

    def build(self, pipeline: Pipeline, total: Signal) -> Module:
        """The last stages of a unit's pipeline, behind the exact sum of a segment."""
        assert not pipeline.tells_nan
        return _Builder(self, pipeline).build(total)


def step_exponent(code: OperandCode) -> int:
    """The exponent of the step that the codes of `dialects.contractions` count in: a factor of each product."""
    element = code.elements[0]
    # The integers of blocks are symmetric.
    largest = element.largest - (element.is_fixed and code.scale is not None)
    return element.unit if largest <= LARGEST_CODE else 0


def why_no_float_sum(a: OperandCode, b: OperandCode, bias: Point | None) -> str | None:
    """Why a unit does not add the products of two operands in f32; None where it does."""
    for code in (a, b):
        if code.is_mixed:
            return f"{code.name}: sums in f32 have one kind of blocks"
        if any(scale.significand_bits for scale in (code.scale,) if scale is not None):
            return f"{code.name}: sums in f32 have scales that are powers of two"
        if code.scale is not None and not _SMALLEST - code.scale.unit <= step_exponent(code) <= 0:
            return f"{code.name}: f32 does not hold each scale times 2^{step_exponent(code)}"
    if bias is not None and bias.width > _WIDEST_BIAS:
        return f"a bias of {bias.width} bits: f32 holds {_WIDEST_BIAS}"
    return None


class _Builder:
    def __init__(self, accumulator: FloatSum, pipeline: Pipeline) -> None:
        self.accumulator, self.pipeline, self.unit = accumulator, pipeline, pipeline.unit
        self.module, self.step = pipeline.module, pipeline.step
        if (reason := why_no_float_sum(self.unit.a, self.unit.b, self.unit.bias)) is not None:
            raise MxloomError(reason)

    def build(self, total: Signal) -> Module:
        point = self.unit.bias
        bias = None if point is None else from_fixed(self.step, self.pipeline.beside.pop("bias"), point)
        term = self.term(total)
        if bias is not None:
            self.pipeline.beside["bias"] = bias
        partials = self.partials(term)
        pipeline = self.pipeline
        valid = pipeline.valid & pipeline.last
        rest = [register.q for register in partials[1:]]
        if bias is not None:
            rest.append(pipeline.beside["bias"])
        valid, found = self.folded(valid, partials[0].q, rest)
        found = into_fixed(self.step, found, self.accumulator.result_point)
        for name in (*[None] * (OUT_STEPS - 1), "done"):
            valid = self.module.delayed(valid, pipeline.enable, name, initial=0)
        return self.module.finish(done=valid, total=self.step(found))

    def term(self, total: Signal) -> Float:
        """The sum of a segment, rounded, times the product of the scales, which is a power of two, 0 or infinity."""
        pipeline, unit, module = self.pipeline, self.unit, self.module
        scales = sum(scale.unit for scale in unit.scales)
        constant = _wrapped(unit.unit + scales + total.width - DIGITS + BIAS)
        exponent, nothing, infinite = module.constant(constant, EXPONENT_BITS), *[module.constant(0, 1)] * 2
        if (field := pipeline.beside.pop("exponent", None)) is not None:
            counted = scales + step_exponent(unit.a) + step_exponent(unit.b)
            wide = field.unsigned(EXPONENT_BITS + 1)
            pipeline.beside["exponent"] = field.unsigned(EXPONENT_BITS) + constant
            pipeline.beside["nothing"] = wide.less_signed(_SMALLEST - counted)
            pipeline.beside["infinite"] = wide.more_signed(_LARGEST - counted)
        sign, significand, places, some = normalized(self.step, total)
        for _ in range(INTO_STEPS - 1):
            pipeline.advance()
        if field is not None:
            exponent, nothing, infinite = (pipeline.beside.pop(name) for name in ("exponent", "nothing", "infinite"))
        exponent, nothing = exponent - places, nothing | ~some
        found = Float(
            self.step(sign),
            self.step(nothing.then(0, significand)),
            self.step(nothing.then(LOWEST, exponent)),
            self.step(infinite & some),
            self.step(infinite & ~some),
        )
        pipeline.advance()
        return found

    def partials(self, term: Float) -> list[Register]:
        """The partial sums, which have the last term of a sum once the pipeline is `valid` and `last`."""
        pipeline, module, count = self.pipeline, self.module, self.accumulator.used
        registers = [module.register(WIDTH, f"partial{index}", initial=None) for index in range(count)]
        moving = pipeline.enable & pipeline.valid
        turn = module.register(address_bits(count), "turn") if count > 1 else None
        held = module.constant(0, WIDTH)
        if self.accumulator.segments > count:
            fresh = module.register(1, "fresh_sum", initial=1)
            wraps = turn.q.equals(count - 1) if turn else module.constant(1, 1)
            fresh.set(pipeline.last | (fresh.q & ~wraps), moving)
            held = fresh.q.then(0, _chosen(turn, registers))
        if turn:
            turn.set((pipeline.last | turn.q.equals(count - 1)).then(0, turn.q + 1), moving)
            pipeline.beside["turn"] = turn.q
        found = added(self.step, term, unpacked(held))
        for _ in range(ADD_STEPS - 1):
            pipeline.advance()
        arrives = pipeline.enable & pipeline.valid
        for index, register in enumerate(registers):
            register.set(found, arrives & pipeline.beside["turn"].equals(index) if turn else arrives)
        pipeline.advance()
        return registers

    def folded(self, valid: Signal, total: Signal, rest: list[Signal]) -> tuple[Signal, Signal]:
        """(whether it is there, the total with the rest added one after the other).

        An adder takes as many of the additions of a sum as end before the next sum comes.
        """
        passes = self.accumulator.passes(self.unit.segment // self.unit.lanes)
        while rest:
            valid, total, rest = self._adder(valid, total, rest, min(passes, len(rest)))
        return valid, total

    def _adder(
        self, valid: Signal, total: Signal, rest: list[Signal], passes: int
    ) -> tuple[Signal, Signal, list[Signal]]:
        """One adder that a sum goes through `passes` times; what is left of the rest comes out beside it."""
        if passes == 1:
            found = self.step(added(self.step, unpacked(total), unpacked(rest[0])))
            return self._flag(valid), found, [self._later(each) for each in rest[1:]]
        module = self.module
        left, returns, *numbers = (
            module.wire(width) for width in (address_bits(passes), 1, *[WIDTH] * (1 + len(rest)))
        )
        goes_round = returns.q
        entering = [goes_round.then(old.q, new) for old, new in zip(numbers, (total, *rest), strict=True)]
        after = self._later(goes_round.then(left.q - 1, passes - 1))
        found = self.step(added(self.step, unpacked(entering[0]), unpacked(entering[1])))
        others = [self._later(each) for each in entering[2:]]
        arrives = self._flag(valid | goes_round)
        for wire, signal in zip(numbers, (found, *others, module.constant(0, WIDTH)), strict=True):
            wire.set(signal)
        left.set(after)
        returns.set(arrives & after.any())
        return arrives & ~after.any(), found, others[: len(rest) - passes]

    def _flag(self, value: Signal) -> Signal:
        for _ in range(ADD_STEPS):
            value = self.module.delayed(value, self.pipeline.enable, initial=0)
        return value

    def _later(self, value: Signal) -> Signal:
        for _ in range(ADD_STEPS):
            value = self.step(value)
        return value


def _chosen(turn: Register | None, registers: list[Register]) -> Signal:
    found = registers[0].q
    for index, register in enumerate(registers[1:], 1):
        assert turn is not None
        found = turn.q.equals(index).then(register.q, found)
    return found


def _wrapped(number: int) -> int:
    """A number in two's complement of an exponent's bits: sums wrap, and only their result is in the range."""
    half = 1 << (EXPONENT_BITS - 1)
    return (number + half) % (2 * half) - half
