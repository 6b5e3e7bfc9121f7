"""Products of every pair of codes by the circuit against the values that the formats' names state."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import pytest

from mxloom.backends.dataflow.codes import OperandCode
from mxloom.backends.dataflow.cost.designs import operand
from mxloom.backends.dataflow.multiplier import decoded_operand, multiplied, product_bits
from mxloom.backends.dataflow.rtl import Module
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, words
from mxloom.backends.dataflow.stages._schedule import Schedule
from mxloom.backends.dataflow.stages._stream import Pipe, Stage

from .stages import compare


@dataclass(frozen=True)
class Products(Stage):
    """One product a beat: a's code lowest, then a 1 where it is of the first kind; b's above."""

    a: OperandCode
    b: OperandCode
    count: int

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": self.a.code_bits + self.b.code_bits + 2}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": product_bits(self.a, self.b)}

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.count, "out": self.count}

    @property
    def cycles(self) -> int:
        return self.count

    @property
    def schedule(self) -> Schedule:
        return Schedule(2)

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe = Pipe(module, "out")
        given, parts, low = module["in"], [], 0
        for code in (self.a, self.b):
            is_low = given.bit(low + code.code_bits) if code.is_mixed else None
            parts.append(decoded_operand(code, given.bits(low, code.code_bits), is_low))
            low += code.code_bits + 1
        found = pipe.step(multiplied(self.a, self.b, *parts))
        return module.close({"in": pipe.enable}, {"out": pipe.end(pipe.flag(module.valid("in")), found)})


def values(name: str) -> dict[int, Fraction]:
    """Every code of a minifloat `eXmY` and its value as OCP formats: bias 2^(X-1) - 1, subnormals; without NaNs."""
    exponent_bits, mantissa_bits = int(name[1]), int(name[3])
    found: dict[int, Fraction] = {}
    for code in range(1 << (1 + exponent_bits + mantissa_bits)):
        negative, rest = divmod(code, 1 << (exponent_bits + mantissa_bits))
        exponent, mantissa = divmod(rest, 1 << mantissa_bits)
        is_nan = {"e4m3": exponent == 15 and mantissa == 7, "e5m2": exponent == 31}.get(name, False)
        if not is_nan:
            significand = Fraction(mantissa, 1 << mantissa_bits) + (exponent > 0)
            power = max(exponent, 1) - (1 << (exponent_bits - 1)) + 1
            found[code] = (-1) ** negative * significand * Fraction(2) ** power
    return found


def kinds(name: str) -> list[tuple[int, Fraction]]:
    """(code with the kind's bit on top, value) of every number of one kind or of two."""
    parts = name.split("/")
    bits = max(1 + int(part[1]) + int(part[3]) for part in parts)
    return [
        (code | ((number == 0 and len(parts) == 2) << bits), value)
        for number, part in enumerate(parts)
        for code, value in values(part).items()
    ]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        *((name, name) for name in ("e2m1", "e2m2", "e2m3", "e3m1", "e3m2", "e3m3", "e4m2")),
        *(("e2m1", name) for name in ("e2m3", "e3m2", "e4m3", "e5m2")),
        ("e2m3", "e3m2"),
        ("e3m2", "e5m2"),
        ("e2m1/e2m3", "e2m1/e2m3"),
        ("e2m1/e3m2", "e2m1/e3m2"),
        ("e3m2/e2m3", "e2m2"),
        ("e2m1/e4m3", "e2m1/e3m2"),
    ],
)
def test_every_product_of_two_minifloats_is_exact(a: str, b: str) -> None:
    one, other = operand(a), operand(b)
    pairs = list(product(kinds(a), kinds(b)))
    stage = Products(one, other, len(pairs))
    given = [x | y << (one.code_bits + 1) for (x, _), (y, _) in pairs]
    unit, width = Fraction(2) ** (one.unit + other.unit), product_bits(one, other)
    expected = [x * y / unit for (_, x), (_, y) in pairs]
    assert all(each.denominator == 1 for each in expected)
    out = words([int(each) % (1 << width) for each in expected], width)
    compare(stage, {"in": words(given, stage.inputs["in"])}, {"out": out}, stalls={"none": NO_STALLS})
