"""Sums, differences and products of two streams, and a number applied to one: exact, then rounded once."""

from __future__ import annotations

from dataclasses import dataclass

from ....dialects.integer import Point
from ..arithmetic import product, requantized
from ..rtl import Module, Signal, join
from ._schedule import Schedule
from ._stream import Pipe, Stage, Through

OPERATIONS = ("add", "sub", "mul")


@dataclass(frozen=True)
class Binary(Stage):
    """`count` numbers of two streams, one by one."""

    operation: str
    a: Point
    b: Point
    result: Point
    count: int

    @property
    def inputs(self) -> dict[str, int]:
        return {"a": self.a.width, "b": self.b.width}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.result.width}

    @property
    def beats(self) -> dict[str, int]:
        return {"a": self.count, "b": self.count, "out": self.count}

    @property
    def cycles(self) -> int:
        return self.count

    @property
    def schedule(self) -> Schedule:
        return Schedule(2)

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe = Pipe(module, "out")
        valid = module.valid("a") & module.valid("b")
        found, fraction = combined(self.operation, module["a"], module["b"], self.a, self.b)
        out = pipe.end(pipe.flag(valid), requantized(pipe.step(found), fraction, self.result))
        taken = pipe.enable & valid
        return module.close({"a": taken, "b": taken}, {"out": out})


def combined(operation: str, x: Signal, y: Signal, a: Point, b: Point) -> tuple[Signal, int]:
    """(the exact result, its bits behind the point)."""
    if operation == "mul":
        return product(x, y), a.fraction + b.fraction
    fraction = max(a.fraction, b.fraction)
    x, y = (_lifted(number, fraction - point.fraction) for number, point in ((x, a), (y, b)))
    width = max(x.width, y.width) + 1
    x, y = x.signed(width), y.signed(width)
    return (x + y if operation == "add" else x - y), fraction


def _lifted(number: Signal, places: int) -> Signal:
    return join(number, number.module.constant(0, places)) if places else number


@dataclass(frozen=True)
class Convert(Through):
    """`count` numbers times a constant factor x 2^-`factor_fraction`, held between limits, in another format."""

    given: Point
    result: Point
    count: int
    factor: int = 1
    factor_fraction: int = 0
    rounding: str = "rne"
    lowest: int | None = None

    @property
    def numbers(self) -> int:
        return self.count

    @property
    def cycles(self) -> int:
        return self.count

    @property
    def schedule(self) -> Schedule:
        return Schedule(1 + (self.factor != 1))

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe = Pipe(module, "out")
        number = module["in"]
        if self.lowest is not None:
            number = number.less_signed(self.lowest).then(self.lowest, number)
        if self.factor != 1:
            factor = module.constant(self.factor, self.factor.bit_length() + 1)
            number = pipe.step(product(number, factor))
            valid = pipe.flag(module.valid("in"))
        else:
            valid = module.valid("in")
        found = requantized(number, self.given.fraction + self.factor_fraction, self.result, self.rounding)
        return module.close({"in": pipe.enable}, {"out": pipe.end(valid, found)})
