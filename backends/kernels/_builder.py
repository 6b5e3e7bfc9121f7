"""Writes arith, math and vector operations on numbers, scalar or vector; a scalar beside a vector is spread."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from math import copysign
from typing import Any, Literal

from xdsl.dialects import arith, math, vector
from xdsl.dialects.builtin import (
    DenseIntOrFPElementsAttr,
    FloatAttr,
    IntegerAttr,
    IntegerType,
    VectorType,
    f32,
    f64,
    i32,
    i64,
)
from xdsl.ir import Attribute, Block, Operation, SSAValue
from xdsl.irdl import IRDLOperation

Predicate = Literal["olt", "ogt", "oge", "une", "oeq"]

PREDICATES: dict[int, Predicate] = {1: "oeq", 2: "ogt", 3: "oge", 4: "olt", 13: "une"}
"""The predicates of arith.cmpf in use, by their numbers in MLIR."""

_NUMBERS = {name: number for number, name in PREDICATES.items()}

_EXACT = arith.FastMathFlagsAttr("none")

_SIGN = -(1 << 31)
_MAGNITUDE = (1 << 31) - 1


_PROPERTIES: dict[Hashable, dict[str, Attribute]] = {}


def made(
    key: Hashable, make: Callable[[], Operation], operands: Sequence[SSAValue], results: Sequence[Attribute]
) -> Operation:
    """The operation that `make()` makes, its like put together from its parts from the second time on.

    `key` stands for all that decides about its properties. xDSL's constructors look their arguments up in the
    definition of the operation, which takes three to ten times as long.
    """
    if key not in _PROPERTIES:
        operation = make()
        _PROPERTIES[key] = dict(operation.properties)
        _KINDS[key] = type(operation)
        return operation
    return _KINDS[key].create(operands=operands, result_types=results, properties=dict(_PROPERTIES[key]))


_KINDS: dict[Hashable, type[Operation]] = {}


@lru_cache(maxsize=256)
def vector_of_type(element: Attribute, lanes: int) -> VectorType:
    return VectorType(element, [lanes])


def is_vector(value: SSAValue) -> bool:
    return isinstance(value.type, VectorType)


def _part(value: SSAValue) -> Attribute:
    """The type of one lane."""
    return value.type.element_type if isinstance(value.type, VectorType) else value.type


class Builder:
    """Appends to a block whose vectors have `lanes` lanes."""

    def __init__(self, block: Block, lanes: int) -> None:
        self.block, self.lanes = block, lanes
        self._constants: dict[Hashable, SSAValue] = {}

    def integer(self, value: int, width: int = 32) -> SSAValue:
        """An i32 (or i64) constant; bit patterns above the largest wrap."""
        wrapped = value - (1 << width) if value >= 1 << (width - 1) else value
        return self._once(("integer", wrapped, width), lambda: arith.ConstantOp(IntegerAttr(wrapped, width)))

    def number(self, value: float, width: int = 32) -> SSAValue:
        """An f32 (or f64) constant."""
        sign = copysign(1.0, value)  # the zeros are equal, and two constants
        return self._once(("number", value, sign, width), lambda: arith.ConstantOp(FloatAttr(value, width)))

    def bits(self, value: SSAValue) -> SSAValue:
        """The bits of f32 as i32, of f64 as i64."""
        return self._bitcast(value, self._like(value, i64 if _part(value) == f64 else i32))

    def float(self, bits: SSAValue) -> SSAValue:
        """The f32 with these bits; the f64 with these 64."""
        return self._bitcast(bits, self._like(bits, f64 if _part(bits) == i64 else f32))

    def wide(self, value: SSAValue) -> SSAValue:
        """The f32 as f64."""
        return self._add(arith.ExtFOp.create(operands=[value], result_types=[self._like(value, f64)]))

    def narrow(self, value: SSAValue) -> SSAValue:
        """The f64 rounded to the nearest f32, ties to even."""
        return self._add(arith.TruncFOp.create(operands=[value], result_types=[self._like(value, f32)]))

    def spread(self, value: SSAValue) -> SSAValue:
        """A scalar in every lane."""
        owner = value.owner
        if isinstance(owner, arith.ConstantOp):  # a constant vector is an operand of the instruction itself
            assert isinstance(owner.value, FloatAttr | IntegerAttr)
            kind: Any = vector_of_type(value.type, self.lanes)
            lanes = [owner.value.value.data]
            return self._once(value, lambda: arith.ConstantOp(DenseIntOrFPElementsAttr.from_list(kind, lanes)))
        return self._add(vector.BroadcastOp(value, vector_of_type(value.type, self.lanes)))

    def add(self, a: SSAValue, b: SSAValue) -> SSAValue:
        return self._binary(arith.AddiOp, arith.AddfOp, a, b)

    def subtract(self, a: SSAValue, b: SSAValue) -> SSAValue:
        return self._binary(arith.SubiOp, arith.SubfOp, a, b)

    def multiply(self, a: SSAValue, b: SSAValue) -> SSAValue:
        return self._binary(arith.MuliOp, arith.MulfOp, a, b)

    def divide(self, a: SSAValue, b: SSAValue) -> SSAValue:
        """a / b in f32, rounded to nearest even: never by a reciprocal."""
        return self._binary(arith.DivfOp, arith.DivfOp, a, b)

    def both(self, a: SSAValue, b: SSAValue) -> SSAValue:
        """Bitwise and."""
        return self._binary(arith.AndIOp, arith.AndIOp, a, b)

    def either(self, a: SSAValue, b: SSAValue) -> SSAValue:
        """Bitwise or."""
        return self._binary(arith.OrIOp, arith.OrIOp, a, b)

    def shifted_right(self, a: SSAValue, places: int) -> SSAValue:
        """Bits moved towards the lowest, zeros behind them."""
        return self._binary(arith.ShRUIOp, arith.ShRUIOp, a, self.integer(places))

    def ordered(self, bits: SSAValue) -> SSAValue:
        """Bits of f32 as integers that order as the numbers do, NaN beyond the infinities; its own inverse."""
        sign = self._binary(arith.ShRSIOp, arith.ShRSIOp, bits, self.integer(31))
        return self._binary(arith.XOrIOp, arith.XOrIOp, bits, self.both(sign, self.integer(_MAGNITUDE)))

    def larger(self, a: SSAValue, b: SSAValue) -> SSAValue:
        """The larger of two signed integers."""
        return self._binary(arith.MaxSIOp, arith.MaxSIOp, a, b)

    def smaller(self, a: SSAValue, b: SSAValue) -> SSAValue:
        """The smaller of two signed integers."""
        return self._binary(arith.MinSIOp, arith.MinSIOp, a, b)

    def compare(self, predicate: Predicate, a: SSAValue, b: SSAValue) -> SSAValue:
        """The comparison of two f32; NaN compares false but for `une`."""
        a, b = self._alike(a, b)
        kind = self._like(a, IntegerType(1))
        # xDSL 0.74 builds and verifies arith.cmpf for scalars alone, so the vector form is made from its parts.
        return self._add(
            arith.CmpfOp.create(
                operands=[a, b],
                result_types=[kind],
                properties={"predicate": IntegerAttr(_NUMBERS[predicate], 64), "fastmath": _EXACT},
            )
        )

    def select(self, condition: SSAValue, a: SSAValue, b: SSAValue) -> SSAValue:
        a, b = self._alike(a, b)
        if is_vector(condition) and not is_vector(a):
            a, b = self.spread(a), self.spread(b)
        return self._add(arith.SelectOp.create(operands=[condition, a, b], result_types=[a.type]))

    def clamp(self, value: SSAValue, low: SSAValue, high: SSAValue) -> SSAValue:
        """`value` between the bounds; NaN stays NaN. Two instructions, since neither side is asked about NaN."""
        value = self.select(self.compare("ogt", value, high), high, value)
        return self.select(self.compare("olt", value, low), low, value)

    def magnitude_bits(self, value: SSAValue) -> SSAValue:
        """The bits of |value|: they order as the magnitudes do, infinity and then NaN above all."""
        return self.both(self.bits(value), self.integer(_MAGNITUDE))

    def magnitude(self, value: SSAValue) -> SSAValue:
        return self.float(self.magnitude_bits(value))

    def with_sign(self, magnitude: SSAValue, sign: SSAValue) -> SSAValue:
        """A number that is not negative, with the sign of another."""
        return self.float(self.either(self.bits(magnitude), self.both(self.bits(sign), self.integer(_SIGN))))

    def round_even(self, value: SSAValue) -> SSAValue:
        """To the nearest whole number, ties to even; zeros keep their sign."""
        return self._add(math.RoundEvenOp.create(operands=[value], result_types=[value.type]))

    def truncate(self, value: SSAValue) -> SSAValue:
        """Towards zero to a whole number; zeros keep their sign."""
        return self._add(math.TruncOp.create(operands=[value], result_types=[value.type]))

    def round_down(self, value: SSAValue) -> SSAValue:
        """To the whole number at or below."""
        return self._add(math.FloorOp.create(operands=[value], result_types=[value.type]))

    def _once(self, key: Hashable, make: Callable[[], Operation]) -> SSAValue:
        """A constant that is made when it is first asked for."""
        if key not in self._constants:
            self._constants[key] = self._add(make())
        return self._constants[key]

    def _add(self, operation: Operation) -> SSAValue:
        self.block.add_op(operation)
        return operation.results[0]

    def _binary(self, integers: type[IRDLOperation], floats: type[IRDLOperation], a: SSAValue, b: SSAValue) -> SSAValue:
        a, b = self._alike(a, b)
        kind = floats if _part(a) in (f32, f64) else integers
        return self._add(made(kind, lambda: kind(a, b), [a, b], [a.type]))  # pyright: ignore[reportCallIssue]

    def _bitcast(self, value: SSAValue, kind: Attribute) -> SSAValue:
        return self._add(made(arith.BitcastOp, lambda: arith.BitcastOp(value, kind), [value], [kind]))

    def _alike(self, a: SSAValue, b: SSAValue) -> tuple[SSAValue, SSAValue]:
        if is_vector(a) and not is_vector(b):
            return a, self.spread(b)
        if is_vector(b) and not is_vector(a):
            return self.spread(a), b
        return a, b

    def _like(self, value: SSAValue, element: Attribute) -> Attribute:
        return vector_of_type(element, self.lanes) if is_vector(value) else element
