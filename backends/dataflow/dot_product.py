"""The dot-product unit: lanes of multipliers, exact sums of segments, and an accumulator behind them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ...dialects.integer import Point
from .arithmetic import adder_tree, product
from .codes import OperandCode, ScaleCode
from .float_sum import FloatSum
from .multiplier import decoded_operand, multiplied
from .rtl import Module, Port, Signal, any_of, join
from .window import Window

Accumulator = Window | FloatSum


@dataclass(frozen=True)
class DotProduct:
    """What a unit is built from.

    A beat brings `lanes` elements of both operands and what stands beside their blocks. A segment is `segment` elements
    under one pair of scales, a multiple of the lanes; its exact sum goes to the accumulator. `bias` is the format of
    the number that is added to a sum.
    """

    a: OperandCode
    b: OperandCode
    lanes: int
    segment: int
    accumulator: Accumulator
    bias: Point | None = None

    @property
    def unit(self) -> int:
        """The exponent of the segments' sums, before scales."""
        return self.a.unit + self.b.unit

    @cached_property
    def sum_bits(self) -> int:
        """Bits of the exact sum of a segment."""
        return (self.a.largest * self.b.largest * self.segment).bit_length() + 1

    @property
    def scales(self) -> tuple[ScaleCode, ...]:
        return tuple(operand.scale for operand in (self.a, self.b) if operand.scale is not None)

    @property
    def has_significands(self) -> bool:
        return any(scale.significand_bits for scale in self.scales)

    @property
    def latency(self) -> int:
        """Cycles from the last beat of a sum to its result."""
        summed = 2 + (self.segment > self.lanes) + self.has_significands
        return summed + self.accumulator.latency(self.bias is not None)

    def module(self, name: str, *, tells_nan: bool = False) -> Module:
        """A module that works in the cycles in which `enable` is 1.

        Inputs `valid`, `segment_last`, `last`, `a`, `b` (first lane lowest), `a_side`, `b_side` (kind on top of the
        scale), `bias`; outputs `done` for one enabled cycle with `total`, and `nan` where it is asked for: weights are
        checked before they are loaded, and quantizers give no NaN.
        """
        inputs = [Port(n, 1) for n in ("enable", "valid", "segment_last", "last")]
        inputs += [Port("a", self.lanes * self.a.code_bits), Port("b", self.lanes * self.b.code_bits)]
        inputs += [Port(f"{n}_side", c.side_bits) for n, c in (("a", self.a), ("b", self.b)) if c.side_bits]
        inputs += [Port("bias", self.bias.width)] if self.bias else []
        outputs = [Port("done", 1), Port("total", self.accumulator.total_bits)] + [Port("nan", 1)] * tells_nan
        return Pipeline(self, Module(name, inputs, outputs), tells_nan).build()


class Pipeline:
    """The stages of the pipeline, in order; flags travel beside the numbers."""

    def __init__(self, unit: DotProduct, module: Module, tells_nan: bool) -> None:
        self.unit, self.module, self.enable, self.tells_nan = unit, module, module["enable"], tells_nan
        self.valid, self.segment_last, self.last = (module[n] for n in ("valid", "segment_last", "last"))
        self.beside: dict[str, Signal] = {}

    def step(self, value: Signal, name: str | None = None) -> Signal:
        """The value one stage later."""
        return self.module.delayed(value, self.enable, name)

    def advance(self) -> None:
        """Let the flags and what travels beside go one stage on."""
        self.valid = self.module.delayed(self.valid, self.enable, initial=0)
        self.segment_last, self.last = self.step(self.segment_last), self.step(self.last)
        self.beside = {name: self.step(value) for name, value in self.beside.items()}

    def build(self) -> Module:
        terms = self.products()
        total = self.tree(terms)
        if self.unit.segment > self.unit.lanes:
            total = self.segments(total)
        if self.unit.has_significands:
            total = self.step(self.with_significands(total))
            self.advance()
        return self.unit.accumulator.build(self, total)

    def products(self) -> list[Signal]:
        """Stage 1: every lane's product."""
        unit, module = self.unit, self.module
        operands = {"a": unit.a, "b": unit.b}
        sides = {n: self._side(n, operand) for n, operand in operands.items()}
        nans = [scale_nan for _, scale_nan in sides.values() if scale_nan is not None]
        terms: list[Signal] = []
        for lane in range(unit.lanes):
            parts = []
            for name, operand in operands.items():
                code = module[name].bits(lane * operand.code_bits, operand.code_bits)
                parts.append(decoded_operand(operand, code, sides[name][0]))
            nans += [part.nan for part in parts if part.nan is not None]
            terms.append(self.step(multiplied(unit.a, unit.b, *parts)))
        if nans and self.tells_nan:
            self.beside["nan"] = any_of(nans)
        if unit.bias:
            self.beside["bias"] = module["bias"]
        exponent = self._exponents()
        if exponent is not None:
            self.beside["exponent"] = exponent
        if unit.has_significands:
            self.beside["factor"] = self._factor()
        self.advance()
        return terms

    def _side(self, name: str, operand: OperandCode) -> tuple[Signal | None, Signal | None]:
        """(is the block of the low kind, is its scale a NaN)."""
        if not operand.side_bits:
            return None, None
        side = self.module[f"{name}_side"]
        kind = side.sign if operand.is_mixed else None
        if operand.scale is None:
            return kind, None
        scale = side.low(operand.scale.bits)
        if operand.scale.nan == "exponent":
            return kind, scale.bits(operand.scale.mantissa_bits, operand.scale.exponent_bits).equals(-1)
        bits = operand.scale.exponent_bits + operand.scale.mantissa_bits
        return kind, scale.low(bits).equals(-1) if operand.scale.nan == "code" else None

    def _fields(self) -> list[tuple[ScaleCode, Signal, Signal]]:
        """(scale, exponent's field, mantissa or the field itself) of each scale."""
        found = []
        for name, operand in (("a", self.unit.a), ("b", self.unit.b)):
            if (scale := operand.scale) is not None:
                code = self.module[f"{name}_side"].low(scale.bits)
                field = code.bits(scale.mantissa_bits, scale.exponent_bits)
                found.append((scale, field, code.low(scale.mantissa_bits) if scale.mantissa_bits else field))
        return found

    def _exponents(self) -> Signal | None:
        """The sum of the scales' exponents, as the fields say them."""
        total: Signal | None = None
        for scale, field, _ in self._fields():
            if scale.mantissa_bits:
                field = field - field.any().unsigned(field.width)
            if total is None:
                total = field
            else:
                width = max(total.width, field.width) + 1
                total = total.unsigned(width) + field.unsigned(width)
        return total

    def _factor(self) -> Signal:
        """The product of the scales' significands, unsigned."""
        found: Signal | None = None
        for scale, field, mantissa in self._fields():
            if scale.significand_bits:
                own = join(field.any(), mantissa)
                width = own.width + (found.width if found is not None else 0)
                found = own if found is None else found.unsigned(width) * own.unsigned(width)
        assert found is not None
        return found

    def tree(self, terms: list[Signal]) -> Signal:
        """Stage 2: the exact sum of a beat."""
        total = adder_tree(terms).resized(self.unit.sum_bits)
        total = self.step(total)
        self.advance()
        return total

    def segments(self, total: Signal) -> Signal:
        """Stage 3: the beats of a segment come together."""
        module = self.module
        moving = self.enable & self.valid
        held, fresh = module.register(total.width, "segment", initial=None), module.register(1, "fresh", initial=1)
        fresh.set(self.segment_last, moving)
        held.set(fresh.q.then(total, held.q + total), moving)
        nan = module.register(1, "segment_nan") if "nan" in self.beside else None
        if nan is not None:
            nan.set((nan.q & ~fresh.q) | self.beside["nan"], moving)
        ends = self.valid & self.segment_last
        self.valid = ends
        self.advance()
        if nan is not None:
            self.beside["nan"] = nan.q
        return held.q

    def with_significands(self, total: Signal) -> Signal:
        """Stage 4, where scales are floats: the sum times their significands."""
        factor = self.beside.pop("factor")
        return product(total, join(self.module.constant(0, 1), factor))
