"""Memories of the `seq` dialect that xDSL lacks, in CIRCT's syntax: one read and one write port, synchronous."""

from __future__ import annotations

from typing import ClassVar

from xdsl.dialects import seq
from xdsl.dialects.builtin import IntAttr, IntegerType
from xdsl.ir import ParametrizedAttribute, SSAValue, TypeAttribute
from xdsl.irdl import IRDLOperation, irdl_attr_definition, irdl_op_definition, operand_def, result_def
from xdsl.printer import Printer


@irdl_attr_definition
class MemoryType(ParametrizedAttribute, TypeAttribute):
    """`!seq.firmem<depth x width>`."""

    name = "seq.firmem"
    depth: IntAttr
    width: IntAttr

    def print_parameters(self, printer: Printer) -> None:
        printer.print_string(self.text)

    @property
    def text(self) -> str:
        return f"<{self.depth.data} x {self.width.data}>"


@irdl_op_definition
class MemoryOp(IRDLOperation):
    """A memory that reads with a latency of one cycle; its first contents are not defined."""

    name: ClassVar[str] = "seq.firmem"
    memory = result_def(MemoryType)

    def __init__(self, depth: int, width: int) -> None:
        super().__init__(result_types=[MemoryType(IntAttr(depth), IntAttr(width))])

    def print(self, printer: Printer) -> None:
        printer.print_string(f" 1, 1, undefined, undefined : {_text(self.memory)}")


@irdl_op_definition
class MemoryReadOp(IRDLOperation):
    """The word at an address, one cycle later."""

    name: ClassVar[str] = "seq.firmem.read_port"
    memory = operand_def(MemoryType)
    address = operand_def(IntegerType)
    clock = operand_def(seq.clock)
    data = result_def(IntegerType)

    def __init__(self, memory: SSAValue, address: SSAValue, clock: SSAValue, width: int) -> None:
        super().__init__(operands=[memory, address, clock], result_types=[IntegerType(width)])

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_operand(self.memory)
        printer.print_string("[")
        printer.print_operand(self.address)
        printer.print_string("], clock ")
        printer.print_operand(self.clock)
        printer.print_string(f" : {_text(self.memory)}")


@irdl_op_definition
class MemoryWriteOp(IRDLOperation):
    """Writes a word at the clock's edge where `enable` is 1."""

    name: ClassVar[str] = "seq.firmem.write_port"
    memory = operand_def(MemoryType)
    address = operand_def(IntegerType)
    data = operand_def(IntegerType)
    clock = operand_def(seq.clock)
    enable = operand_def(IntegerType)

    def __init__(self, memory: SSAValue, address: SSAValue, data: SSAValue, clock: SSAValue, enable: SSAValue) -> None:
        super().__init__(operands=[memory, address, data, clock, enable])

    def print(self, printer: Printer) -> None:
        printer.print_string(" ")
        printer.print_operand(self.memory)
        printer.print_string("[")
        printer.print_operand(self.address)
        printer.print_string("] = ")
        printer.print_operand(self.data)
        printer.print_string(", clock ")
        printer.print_operand(self.clock)
        printer.print_string(" enable ")
        printer.print_operand(self.enable)
        printer.print_string(f" : {_text(self.memory)}")


def _text(memory: SSAValue) -> str:
    assert isinstance(memory.type, MemoryType)
    return memory.type.text
