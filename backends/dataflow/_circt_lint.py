"""Rewrites of CIRCT's modules that leave nothing unread, so that linters have nothing to say about what is printed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

_PURE = ("comb.", "hw.constant", "hw.array_", "hw.aggregate_constant", "seq.compreg", "seq.firmem.read_port")


def remove_unread(module: Any) -> None:
    """Erase operations whose results reach no output, instance or memory: registers that hold themselves, mostly."""
    for _, block in _modules(module):
        operations = [each.operation for each in block.operations]
        number = {operation: index for index, operation in enumerate(operations)}
        waiting = [o for o in operations if not o.name.startswith(_PURE)]
        live = {number[operation] for operation in waiting}
        while waiting:
            for value in waiting.pop().operands:
                index = number.get(getattr(value.owner, "operation", None))
                if index is not None and index not in live:
                    live.add(index)
                    waiting.append(operations[index])
        dead = [operation for index, operation in enumerate(operations) if index not in live]
        _erase(dead)


def _erase(operations: list[Any]) -> None:
    """Erase operations that only each other read, in a graph that may have loops."""
    ir: Any = import_module("pycde.circt.ir")
    stand_ins: list[Any] = []
    for operation in operations:
        for result in operation.results:
            if any(True for _ in result.uses):
                with ir.InsertionPoint(operation):
                    stand_in = ir.Operation.create("builtin.unrealized_conversion_cast", [result.type], []).result
                result.replace_all_uses_with(stand_in)
                stand_ins.append(stand_in.owner)
    for operation in [*operations, *stand_ins]:
        operation.erase()


def name_unread(module: Any) -> None:
    """Collect what a module computes and does not read, low halves of products for example, in a wire `unused`.

    Linters take the name as a statement that this is meant; synthesis drops the wire.
    """
    ir: Any = import_module("pycde.circt.ir")
    for _, block in _modules(module):
        spare = [(value, low, width) for value in _declared(block) for low, width in _unread(value)]
        if not spare:
            continue
        end = block.operations[len(block.operations) - 1]
        with ir.InsertionPoint(end):
            parts = [_bits(value, low, width) for value, low, width in spare]
            kind = ir.IntegerType.get_signless(sum(width for _, _, width in spare))
            whole = parts[0] if len(parts) == 1 else ir.Operation.create("comb.concat", [kind], parts).result
            named = {"name": ir.StringAttr.get("unused")}
            wire = ir.Operation.create("sv.wire", [ir.Type.parse(f"!hw.inout<{kind}>")], [], named).result
            ir.Operation.create("sv.assign", [], [wire, whole])


def _modules(module: Any) -> Iterator[tuple[Any, Any]]:
    for each in module.body.operations:
        operation = each.operation
        if operation.name == "hw.module":
            yield operation, operation.regions[0].blocks[0]


def _declared(block: Any) -> Iterator[Any]:
    """Ports, and results that are printed as signals of their own: those of which a part is read."""
    yield from block.arguments
    for each in block.operations:
        operation = each.operation
        if operation.name.startswith(("comb.", "hw.instance")) or operation.name == "sv.read_inout":
            yield from operation.results


def _unread(value: Any) -> Iterator[tuple[int, int]]:
    """(lowest bit, number) of each run of bits that nothing reads."""
    ir: Any = import_module("pycde.circt.ir")
    if not isinstance(value.type, ir.IntegerType):
        return
    width = value.type.width
    read = 0
    for use in _uses(value):
        user = use.owner.operation
        if user.name != "comb.extract":
            return
        part = user.results[0].type.width
        read |= ((1 << part) - 1) << ir.IntegerAttr(user.attributes["lowBit"]).value
    low = 0
    while low < width:
        if read >> low & 1:
            low += 1
            continue
        high = low
        while high < width and not read >> high & 1:
            high += 1
        yield low, high - low
        low = high


def _uses(value: Any) -> Iterator[Any]:
    """Uses of a value; of a register, those of all that read it."""
    owner = getattr(value.owner, "operation", None)
    if owner is None or owner.name != "sv.read_inout":
        yield from value.uses
        return
    for use in owner.operands[0].uses:
        if use.owner.operation.name == "sv.read_inout":
            yield from use.owner.operation.results[0].uses


def _bits(value: Any, low: int, width: int) -> Any:
    ir: Any = import_module("pycde.circt.ir")
    if width == value.type.width:
        return value
    place = {"lowBit": ir.IntegerAttr.get(ir.IntegerType.get_signless(32), low)}
    kind = ir.IntegerType.get_signless(width)
    return ir.Operation.create("comb.extract", [kind], [value], place).result
