"""Building hardware modules: signals with operators, registers, memories and instances, as xDSL's hw, comb and seq.

Signals have a width and no sign: where a sign matters, the operation says so (`signed`, `less_signed` ...), so that
nothing depends on the context in which an expression is printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xdsl.dialects import comb, hw, seq
from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, IntegerType, ModuleOp, StringAttr, SymbolRefAttr
from xdsl.ir import Attribute, Block, Region, SSAValue

from .memory import MemoryOp, MemoryReadOp, MemoryWriteOp

LOWERING = "locationInfoStyle=none,disallowLocalVariables,disallowPackedArrays"
"""How CIRCT prints: what Yosys and Verilator both read."""


@dataclass(frozen=True)
class Port:
    """A port's name and its width in bits."""

    name: str
    width: int


@dataclass(frozen=True, eq=False)
class Signal:
    """A value of `width` bits in a module under construction; arithmetic wraps, operands have one width."""

    module: Module
    value: SSAValue

    @property
    def width(self) -> int:
        assert isinstance(self.value.type, IntegerType)
        return self.value.type.width.data

    def __add__(self, other: Signal | int) -> Signal:
        return self.module.result(comb.AddOp(self._pair(other)))

    def __sub__(self, other: Signal | int) -> Signal:
        return self.module.result(comb.SubOp(*self._pair(other)))

    def __mul__(self, other: Signal | int) -> Signal:
        return self.module.result(comb.MulOp(self._pair(other)))

    def __and__(self, other: Signal | int) -> Signal:
        return self.module.result(comb.AndOp(self._pair(other)))

    def __or__(self, other: Signal | int) -> Signal:
        return self.module.result(comb.OrOp(self._pair(other)))

    def __xor__(self, other: Signal | int) -> Signal:
        return self.module.result(comb.XorOp(self._pair(other)))

    def __invert__(self) -> Signal:
        return self ^ -1

    def __neg__(self) -> Signal:
        return self.module.constant(0, self.width) - self

    def shifted_left(self, places: Signal) -> Signal:
        """Places count as unsigned; zeros come in."""
        return self.module.result(comb.ShlOp(self.value, places.unsigned(self.width).value))

    def shifted_right(self, places: Signal) -> Signal:
        """Places count as unsigned; zeros come in."""
        return self.module.result(comb.ShrUOp(self.value, places.unsigned(self.width).value))

    def equals(self, other: Signal | int) -> Signal:
        return self._compared("eq", other)

    def differs(self, other: Signal | int) -> Signal:
        return self._compared("ne", other)

    def less(self, other: Signal | int) -> Signal:
        """Both unsigned."""
        return self._compared("ult", other)

    def at_least(self, other: Signal | int) -> Signal:
        """Both unsigned."""
        return self._compared("uge", other)

    def less_signed(self, other: Signal | int) -> Signal:
        return self._compared("slt", other)

    def more_signed(self, other: Signal | int) -> Signal:
        return self._compared("sgt", other)

    def bit(self, index: int) -> Signal:
        """One bit; negative indices count from the top."""
        return self.bits(index % self.width, 1)

    @property
    def sign(self) -> Signal:
        return self.bit(-1)

    def bits(self, low: int, width: int) -> Signal:
        """`width` bits from bit `low` on."""
        assert low >= 0 and width > 0 and low + width <= self.width, (low, width, self.width)
        if width == self.width:
            return self
        return self.module.result(comb.ExtractOp(self.value, IntegerAttr(low, 32), IntegerType(width)))

    def low(self, width: int) -> Signal:
        return self.bits(0, width)

    def top(self, width: int) -> Signal:
        return self.bits(self.width - width, width)

    def repeated(self, count: int) -> Signal:
        if count == 1:
            return self
        return self.module.result(comb.ReplicateOp(self.value, IntegerType(self.width * count)))

    def unsigned(self, width: int) -> Signal:
        """Zeros in front, up to `width`."""
        assert width >= self.width, (width, self.width)
        return self if width == self.width else join(self.module.constant(0, width - self.width), self)

    def signed(self, width: int) -> Signal:
        """Copies of the sign in front, up to `width`."""
        assert width >= self.width, (width, self.width)
        return self if width == self.width else join(self.sign.repeated(width - self.width), self)

    def resized(self, width: int) -> Signal:
        """The number as signed in `width` bits that are known to hold it."""
        return self.low(width) if width <= self.width else self.signed(width)

    def then(self, yes: Signal | int, no: Signal | int) -> Signal:
        """`yes` where this bit is 1, else `no`; one of them has a width."""
        if isinstance(yes, int):
            assert isinstance(no, Signal)
            yes = self.module.constant(yes, no.width)
        no = self.module.constant(no, yes.width) if isinstance(no, int) else no
        return self.module.result(comb.MuxOp(self.value, yes.value, no.value))

    def any(self) -> Signal:
        """Whether a bit is 1."""
        return self if self.width == 1 else self.differs(0)

    def _pair(self, other: Signal | int) -> list[Any]:
        found = self.module.constant(other, self.width) if isinstance(other, int) else other
        assert found.width == self.width, (self.width, found.width)
        return [self.value, found.value]

    def _compared(self, predicate: str, other: Signal | int) -> Signal:
        one, other_value = self._pair(other)
        return self.module.result(comb.ICmpOp(one, other_value, predicate))


def join(*signals: Signal) -> Signal:
    """One signal out of several, the first on top."""
    if len(signals) == 1:
        return signals[0]
    width = sum(signal.width for signal in signals)
    return signals[0].module.result(comb.ConcatOp([signal.value for signal in signals], IntegerType(width)))


def any_of(signals: Sequence[Signal]) -> Signal:
    """The bits' or."""
    first = signals[0]
    return first if len(signals) == 1 else first.module.result(comb.OrOp([signal.value for signal in signals]))


def all_of(*signals: Signal) -> Signal:
    """The bits' and."""
    return signals[0].module.result(comb.AndOp([signal.value for signal in signals])) if signals[1:] else signals[0]


class Register:
    """A register; what it takes at the clock's edge is said by `set`, once, when it is known."""

    def __init__(self, module: Module, operation: seq.CompRegOp) -> None:
        self._module, self._operation = module, operation
        self.q = Signal(module, operation.results[0])

    def set(self, value: Signal, enable: Signal | None = None) -> Signal:
        """Take `value` (where `enable` is 1); returns what it holds."""
        taken = value if enable is None else enable.then(value, self.q)
        assert taken.width == self.q.width, (taken.width, self.q.width)
        self._operation.operands[0] = taken.value
        return self.q


class Wire:
    """A signal that is used before it is known: `set` says what it is."""

    def __init__(self, module: Module, width: int) -> None:
        self._operation = comb.OrOp([module.constant(0, width).value, module.constant(0, width).value])
        self.q = module.result(self._operation)

    def set(self, value: Signal) -> None:
        assert value.width == self.q.width, (value.width, self.q.width)
        self._operation.operands[0] = value.value
        self._operation.operands[1] = value.value


class Module:
    """One hardware module under construction: ports, a clock `clk` and a synchronous reset `rst`."""

    def __init__(self, name: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
        self.name, self.inputs, self.outputs = name, tuple(inputs), tuple(outputs)
        types: list[Attribute] = [seq.clock, *(IntegerType(w) for w in (1, *(port.width for port in inputs)))]
        self._block = Block(arg_types=types)
        self._clock = self._block.args[0]
        self.reset = Signal(self, self._block.args[1])
        self._signals = {p.name: Signal(self, v) for p, v in zip(inputs, self._block.args[2:], strict=True)}
        self._constants: dict[tuple[int, int], Signal] = {}
        self._instances = 0
        self.children: dict[str, Module] = {}

    def __getitem__(self, name: str) -> Signal:
        """The signal of an input port."""
        return self._signals[name]

    def add(self, operation: Any) -> Any:
        self._block.add_op(operation)
        return operation

    def result(self, operation: Any) -> Signal:
        """Add an operation with one result."""
        self._block.add_op(operation)
        return Signal(self, operation.results[0])

    def constant(self, number: int, width: int) -> Signal:
        """A two's complement constant."""
        assert -(1 << (width - 1)) <= number < 1 << width, (number, width)
        key = (number & ((1 << width) - 1), width)
        if key not in self._constants:
            operation = hw.ConstantOp(*key)
            first = self._block.first_op
            self._block.add_op(operation) if first is None else self._block.insert_op_before(operation, first)
            self._constants[key] = Signal(self, operation.results[0])
        return self._constants[key]

    def register(self, width: int, name: str | None = None, *, initial: int | None = 0) -> Register:
        """A register of `width` bits that a reset sets to `initial`; None: a reset leaves it."""
        reset = None if initial is None else (self.reset.value, self.constant(initial, width).value)
        operation = seq.CompRegOp(self.constant(0, width).value, self._clock, reset)
        if name is not None:
            operation.attributes["name"] = StringAttr(name)
        self._block.add_op(operation)
        return Register(self, operation)

    def delayed(
        self, value: Signal, enable: Signal | None = None, name: str | None = None, *, initial: int | None = None
    ) -> Signal:
        """The value at the last clock's edge (at which `enable` was 1)."""
        return self.register(value.width, name, initial=initial).set(value, enable)

    def wire(self, width: int) -> Wire:
        return Wire(self, width)

    def memory(self, depth: int, *, read: Signal, write: Signal, data: Signal, enable: Signal) -> Signal:
        """The word at address `read` one cycle later; `data` goes to address `write` where `enable` is 1."""
        bits = address_bits(depth)
        memory = self.add(MemoryOp(depth, data.width)).memory
        self.add(MemoryWriteOp(memory, write.low(bits).value, data.value, self._clock, enable.value))
        return self.result(MemoryReadOp(memory, read.low(bits).value, self._clock, data.width))

    def table(self, address: Signal, numbers: Sequence[int], width: int) -> Signal:
        """The two's complement number at an address, at once; addresses behind the table give anything."""
        size = 1 << address.width
        numbers = [*numbers, *[numbers[-1]] * (size - len(numbers))]
        entries = [self.constant(number, width).value for number in reversed(numbers)]
        array = self.add(hw.ArrayCreateOp(*entries)).results[0]
        return self.result(hw.ArrayGetOp(array, address.value))

    def instance(self, child: Module, name: str, inputs: Mapping[str, Signal]) -> dict[str, Signal]:
        """Place `child`; returns its outputs."""
        known = self.children.setdefault(child.name, child)
        assert known is child, f"two modules are called {child.name}"
        connected: list[tuple[str, SSAValue]] = [("clk", self._clock), ("rst", self.reset.value)]
        for port in child.inputs:
            assert inputs[port.name].width == port.width, (child.name, port, inputs[port.name].width)
            connected.append((port.name, inputs[port.name].value))
        results: list[tuple[str, Any]] = [(port.name, IntegerType(port.width)) for port in child.outputs]
        operation = self.add(hw.InstanceOp(name, SymbolRefAttr(child.name), connected, results))
        return {port.name: Signal(self, value) for port, value in zip(child.outputs, operation.results, strict=True)}

    def finish(self, **outputs: Signal) -> Module:
        """Say what the output ports carry; the last step."""
        for port in self.outputs:
            assert outputs[port.name].width == port.width, (self.name, port, outputs[port.name].width)
        self._block.add_op(hw.OutputOp([outputs[port.name].value for port in self.outputs]))
        return self

    def operation(self, *, private: bool) -> hw.HWModuleOp:
        """The finished module as an operation."""
        ports = [("clk", seq.clock, "in"), ("rst", IntegerType(1), "in")]
        ports += [(port.name, IntegerType(port.width), "in") for port in self.inputs]
        ports += [(port.name, IntegerType(port.width), "out") for port in self.outputs]
        way = {"in": hw.DirectionAttr(hw.Direction.INPUT), "out": hw.DirectionAttr(hw.Direction.OUTPUT)}
        declared = [hw.ModulePort(StringAttr(name), type, way[direction]) for name, type, direction in ports]
        type = hw.ModuleType(ArrayAttr(declared))
        visibility = "private" if private else None
        return hw.HWModuleOp(StringAttr(self.name), type, Region(self._block), visibility=visibility)


def address_bits(depth: int) -> int:
    """Bits of the addresses of `depth` words."""
    return max(1, (depth - 1).bit_length())


def circuit(top: Module) -> ModuleOp:
    """A module and all that it holds, each once, as one operation. Consumes the modules."""
    found: dict[str, Module] = {}

    def visit(module: Module) -> None:
        for child in module.children.values():
            if child.name not in found:
                visit(child)
        assert found.setdefault(module.name, module) is module, f"two modules are called {module.name}"

    visit(top)
    operation = ModuleOp([module.operation(private=module is not top) for module in found.values()])
    operation.attributes["circt.loweringOptions"] = StringAttr(LOWERING)
    return operation


def circuit_text(top: Module) -> str:
    """The text that CIRCT reads."""
    operation = circuit(top)
    operation.verify()
    return str(operation) + "\n"
