"""Sums, differences and products of two streams or of one and parameters, and a number applied: rounded once."""

from __future__ import annotations

from dataclasses import dataclass

from ....dialects.integer import Point
from ..arithmetic import product, requantized
from ..rtl import Module, Signal, join
from ._schedule import Schedule
from ._stream import Memory, Pipe, Stage, StreamModule, Through

OPERATIONS = ("add", "sub", "mul")


@dataclass(frozen=True)
class Binary(Stage):
    """`count` numbers of two streams, one by one; the second are `kept` numbers of a memory, again and again."""

    operation: str
    a: Point
    b: Point
    result: Point
    count: int
    kept: int = 0

    @property
    def inputs(self) -> dict[str, int]:
        return {"a": self.a.width} | ({} if self.kept else {"b": self.b.width})

    @property
    def memories(self) -> tuple[Memory, ...]:
        return (Memory(self.kept, self.b.width),) if self.kept else ()

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": self.result.width}

    @property
    def beats(self) -> dict[str, int]:
        return dict.fromkeys((*self.inputs, "out"), self.count)

    @property
    def cycles(self) -> int:
        return self.count

    @property
    def schedule(self) -> Schedule:
        return Schedule(3 if self.kept else 2)

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe = Pipe(module, "out")
        if self.kept:
            valid, a, b = self._beside_memory(module, pipe)
            ready = {"a": pipe.enable}
        else:
            valid, a, b = module.valid("a") & module.valid("b"), module["a"], module["b"]
            ready = {"a": pipe.enable & valid, "b": pipe.enable & valid}
        found, fraction = combined(self.operation, a, b, self.a, self.b)
        out = pipe.end(pipe.flag(valid), requantized(pipe.step(found), fraction, self.result))
        return module.close(ready, {"out": out})

    def _beside_memory(self, module: StreamModule, pipe: Pipe) -> tuple[Signal, Signal, Signal]:
        """(valid, a number, the kept one that meets it), one step after the number came."""
        (memory,) = module.loaded(self.memories)
        place, _ = module.counter(self.kept, module.valid("a") & pipe.enable, "place")
        return pipe.flag(module.valid("a")), pipe.step(module["a"]), memory.read(module, place, pipe.enable)


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
    """`count` numbers times a constant factor x 2^-`factor_fraction`, plus a constant, in another format.

    What is added, `added` x 2^-`added_fraction`, stands with the product; `lowest` holds the numbers from below first.
    """

    given: Point
    result: Point
    count: int
    factor: int = 1
    factor_fraction: int = 0
    rounding: str = "rne"
    lowest: int | None = None
    added: int = 0
    added_fraction: int = 0

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
        fraction = self.given.fraction + self.factor_fraction
        if self.added:
            added = module.constant(self.added, self.added.bit_length() + 1)
            points = Point(number.width, fraction), Point(added.width, self.added_fraction)
            number, fraction = combined("add", number, added, *points)
        found = requantized(number, fraction, self.result, self.rounding)
        return module.close({"in": pipe.enable}, {"out": pipe.end(valid, found)})
