"""`extract`: a part of a model as a module of its own."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, SSAValue
from xdsl.ir import Operation as IROperation
from xdsl.passes import ModulePass

from ..backends.reference import body
from ..dialects.errors import UsageError
from ..dialects.operations._operation import Operation
from ..dialects.operations._values import hint_of, path_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ._sites import module_name
from .quantize import nearest


@dataclass(frozen=True)
class Extract(ModulePass):
    """Keep the operations whose module's name is one of `part` or begins with one; parameters that they read stay.

    What they read from outside becomes an input, in the order in which it comes to be, and what is read outside or
    returned an output, named `outputs` on the function. A cast goes with what reads it, wherever the value comes from:
    parts meet in values before they are rounded into blocks. A value that follows from parameters by casts alone is no
    input: it is kept with what it follows from. Sizes are measured where the model measures them, so that a tensor
    whose size the part needs is an input too. Raises UsageError where a name of `part` matches nothing.
    """

    name = "extract"

    part: tuple[str, ...] = ()

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        block = body(op)
        function = block.parent_op()
        assert isinstance(function, FuncOp)
        operations, stored, kept = self._chosen(op)
        inputs, sizes = _from_outside(block, operations, kept, stored)
        outputs = _read_outside(block, kept)
        new = _copied(operations, kept, stored, inputs, sizes, outputs)
        names = [path_of(value) or f"output_{place}" for place, value in enumerate(outputs)]
        _replace_body(function, new, names)

    def inputs(self, op: ModuleOp) -> list[SSAValue]:
        """The values of a module that become the part's inputs, in order; the module stays as it is."""
        operations, stored, kept = self._chosen(op)
        return _from_outside(body(op), operations, kept, stored)[0]

    def outputs(self, op: ModuleOp) -> list[SSAValue]:
        """The values of a module that the part gives, in order; the module stays as it is."""
        return _read_outside(body(op), self._chosen(op)[2])

    def _chosen(self, op: ModuleOp) -> tuple[list[Operation], set[Operation], set[Operation]]:
        """(all operations, those that are stored, those that belong to the part)."""
        if not self.part:
            raise UsageError("extract: name the modules to keep: extract{part=model.layers.0}")
        operations = [each for each in body(op).ops if isinstance(each, Operation)]
        stored = _stored(operations)
        kept = {each for each in operations if each not in stored and belongs(module_name(each), self.part)}
        for each in reversed(operations):
            if isinstance(each, CastOp) and each not in stored and not _is_returned(each):
                is_read = any(use.operation in kept for use in each.result.uses)
                (kept.add if is_read else kept.discard)(each)
        self._check(operations, stored, kept)
        return operations, stored, kept

    def _check(self, operations: list[Operation], stored: set[Operation], kept: set[Operation]) -> None:
        names = [module_name(each) for each in operations if each not in stored]
        for part in self.part:
            if not any(belongs(module_name(each), (part,)) for each in kept):
                raise UsageError(f"extract: no operation belongs to {part!r}{nearest(part, names)}")


def _is_returned(operation: Operation) -> bool:
    """Whether the function gives a result of an operation."""
    return any(isinstance(use.operation, ReturnOp) for result in operation.results for use in result.uses)


def belongs(name: str, part: tuple[str, ...]) -> bool:
    """Whether a module's name is one of `part` or lies inside one."""
    return any(name == each or name.startswith(f"{each}.") for each in part)


def _stored(operations: list[Operation]) -> set[Operation]:
    """Parameters and what follows from them by casts: kept where it is read, never an input."""
    found: set[Operation] = set()
    for op in operations:
        if isinstance(op, ParameterOp) or (isinstance(op, CastOp) and op.input.owner in found):
            found.add(op)
    return found


def _is_size(value: SSAValue) -> bool:
    return str(value.type) == "index"


def _from_outside(
    block: Block, operations: list[Operation], kept: set[Operation], stored: set[Operation]
) -> tuple[list[SSAValue], set[Operation]]:
    """The values that become inputs, in order, and the operations on sizes that are needed beside."""
    wanted: set[SSAValue] = set()
    sizes: set[Operation] = set()
    open_operations = list(kept)
    while open_operations:
        for operand in open_operations.pop().operands:
            owner = operand.owner
            if owner in kept or owner in stored:
                continue
            if _is_size(operand) and isinstance(owner, Operation):
                if owner not in sizes:
                    sizes.add(owner)
                    open_operations.append(owner)
                continue
            wanted.add(operand)
    every = [*block.args, *(result for op in operations for result in op.results)]
    return [value for value in every if value in wanted], sizes


def _read_outside(block: Block, kept: set[Operation]) -> list[SSAValue]:
    """The results of what is kept that something else reads, or that the function returns, in order."""
    results = [result for op in block.ops if op in kept for result in op.results if not _is_size(result)]
    return [result for result in results if _is_read_outside(result, kept)]


def _is_read_outside(value: SSAValue, kept: set[Operation]) -> bool:
    """Whether what is not kept reads a value, itself or by casts, which it makes anew."""
    if isinstance(value.owner, CastOp) and not _is_returned(value.owner):
        return False
    return any(_leads_outside(use.operation, kept) for use in value.uses)


def _leads_outside(reader: IROperation, kept: set[Operation]) -> bool:
    if not isinstance(reader, CastOp) or _is_returned(reader):
        return reader not in kept
    return any(_leads_outside(use.operation, kept) for use in reader.result.uses)


def _copied(
    operations: list[Operation],
    kept: set[Operation],
    stored: set[Operation],
    inputs: list[SSAValue],
    sizes: set[Operation],
    outputs: list[SSAValue],
) -> Block:
    """A block with the inputs as arguments, copies of what is kept and of what it needs, and the outputs returned."""
    needed = kept | sizes
    for op in reversed(operations):
        if op in stored and any(use.operation in needed for result in op.results for use in result.uses):
            needed = needed | {op}
    new = Block(arg_types=[value.type for value in inputs])
    names = [hint_of(path_of(value)) or f"input_{place}" for place, value in enumerate(inputs)]
    mapper: dict[SSAValue, SSAValue] = dict(zip(inputs, new.args, strict=True))
    counted = Counter(names)
    for place, (argument, name) in enumerate(zip(new.args, names, strict=True)):
        argument.name_hint = name if counted[name] == 1 else f"{name}.{place}."
    for op in operations:
        if op in needed:
            new.add_op(op.clone(value_mapper=mapper))
    new.add_op(ReturnOp(*(mapper[value] for value in outputs)))
    return new


def _replace_body(function: FuncOp, block: Block, names: list[str]) -> None:
    old = function.body
    for each in list(old.blocks):
        old.erase_block(each)
    old.add_block(block)
    function.update_function_type()
    function.attributes["outputs"] = ArrayAttr([StringAttr(name) for name in names])
    for name in ("absent", "host", "host_macs"):
        function.attributes.pop(name, None)
