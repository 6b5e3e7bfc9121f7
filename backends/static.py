"""A module for one size of its inputs: no size is left open, and what follows from sizes alone is a parameter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from xdsl.dialects.builtin import (
    ArrayAttr,
    FunctionType,
    IndexType,
    IntegerAttr,
    ModuleOp,
    StringAttr,
    TensorType,
    UnitAttr,
    f32,
)
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, Region, SSAValue
from xdsl.rewriter import Rewriter

from ..dialects.errors import MxloomError
from ..dialects.formats import FixedType
from ..dialects.operations._assembly import is_flag, is_variadic, operand_fields, property_fields
from ..dialects.operations._operation import Operation
from ..dialects.operations._shapes import element_of
from ..dialects.operations._torch_operation import TorchOperation
from ..dialects.operations._values import path_of, torch_dtype
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ._shapes import values_of
from .reference import body, constants, results
from .weight_store import WeightStore


def static(
    module: ModuleOp, weights: WeightStore, sizes: Sequence[tuple[int, ...]]
) -> tuple[ModuleOp, WeightStore, list[str]]:
    """(the module for inputs of these sizes, its weights, what was assumed).

    Values that depend on sizes and parameters alone (positions, angles) are computed once and become parameters. A
    padding mask that comes from outside is left out: the inputs are whole sequences; so is one that is known to hide
    nothing. Inputs that nothing reads any more go. Raises MxloomError where the sizes do not fit the module, and for a
    padding mask that is known to hide something.
    """
    return _Static(module, weights.copy(), sizes).build()


class _Static:
    def __init__(self, module: ModuleOp, weights: WeightStore, sizes: Sequence[tuple[int, ...]]) -> None:
        self.module, self.weights = module, weights
        self.block = body(module)
        self.shapes = values_of(module, sizes)
        self.known: dict[Any, Any] = {}
        self.new: dict[SSAValue, SSAValue] = {}
        self.assumed: list[str] = []
        self.into = Block()

    def build(self) -> tuple[ModuleOp, WeightStore, list[str]]:
        stored, folded = constants(self.block, self.weights)
        self.known.update(stored)
        for argument in self.block.args:
            made = self.into.insert_arg(self._type(argument), len(self.into.args))
            made.name_hint = argument.name_hint
            self.new[argument] = made
        for op in self.block.ops:
            if isinstance(op, ReturnOp):
                self.into.add_op(ReturnOp(*(self._value(value) for value in op.arguments)))
            elif isinstance(op, Operation):
                self._operation(op, folded)
        self._drop_unread()
        return self._module(), self.weights, self.assumed

    def _operation(self, op: Operation, folded: set[Operation]) -> None:
        if op in folded or isinstance(op, ParameterOp):
            self._copy(op)
        elif all(isinstance(result.type, IndexType) for result in op.results):
            for result in op.results:
                self.known[result] = self.shapes[result]
        elif op.operands and all(value in self.known for value in op.operands):
            for result, value in zip(op.results, results(op, op.call(), self.known), strict=True):
                self.known[result] = value
        else:
            self._copy(op)

    def _value(self, value: SSAValue) -> SSAValue:
        """The value in the new module; one that is known becomes a parameter when it is first read."""
        if value not in self.new:
            self._parameter(value)
        return self.new[value]

    def _parameter(self, value: SSAValue) -> None:
        """A computed constant as a parameter: fixed-point numbers as a wide one, which a cast brings back exactly."""
        element, tensor = element_of(value), self.known[value]
        name = path_of(value) or f"constant_{len(self.weights)}"
        while name in self.weights:
            name += ".static"
        fixed = isinstance(element, FixedType)
        if not fixed and not torch_dtype(element).is_floating_point:
            raise MxloomError(f"{name} holds {element}, which no operation of hardware reads")
        self.weights.put(name, tensor.float().contiguous())
        parameter = ParameterOp.build(
            result_types=[TensorType(f32, tuple(tensor.shape))], properties={"source": StringAttr(name)}
        )
        self.into.add_op(parameter)
        parameter.result.name_hint = value.name_hint
        found: SSAValue = parameter.result
        if fixed:
            cast = CastOp.build(operands=[found, None], result_types=[self._type(value)])
            self.into.add_op(cast)
            cast.result.name_hint = value.name_hint
            found = cast.result
        self.new[value] = found

    def _copy(self, op: Operation) -> None:
        """The same operation on the new values, its sizes known."""
        properties = {n: a for n, a in op.properties.items() if not n.endswith("SegmentSizes")}
        types = [self._type(result) for result in op.results]
        if isinstance(op, TorchOperation):
            numbers = iter([self.known.get(value, self.shapes[value]) for value in op.symbol_values()])
            for name in property_fields(type(op)):
                if name in properties and not is_flag(type(op), name):
                    properties[name] = _resolved(properties[name], numbers)
            groups = [self._group(op, name, definition) for name, definition in operand_fields(type(op))]
            groups += [[]] if type(op).has_symbols() else []
            made = type(op).build(operands=groups, result_types=type(op).result_groups(types), properties=properties)
        else:
            groups = [self._group(op, name, definition) for name, definition in operand_fields(type(op))]
            made = type(op).build(operands=groups, result_types=types, properties=properties)
        made.attributes.update(op.attributes)
        self.into.add_op(made)
        for old, new in zip(op.results, made.results, strict=True):
            new.name_hint = old.name_hint
            self.new[old] = new

    def _group(self, op: Operation, name: str, definition: Any) -> Any:
        value = getattr(op, name)
        if value is None:
            return []
        if isinstance(op, AttentionOp) and name == "padding":
            if value in self.known:
                if not bool(self.known[value].all()):
                    raise MxloomError(f"{path_of(op.results[0])}: its padding mask leaves positions out, and a design "
                                      "for sequences of one size has none")  # fmt: skip
                return []
            self.assumed.append(f"{path_of(op.results[0])}: the padding mask is left out; inputs are whole sequences")
            return []
        return [self._value(each) for each in value] if is_variadic(definition) else self._value(value)

    def _type(self, value: SSAValue) -> Attribute:
        if not isinstance(value.type, TensorType):
            return value.type
        held = self.shapes.get(value)
        shape = value.type.get_shape() if held is None else tuple(held.shape)
        return TensorType(value.type.element_type, shape)

    def _drop_unread(self) -> None:
        """Erase what nothing reads: first operations, then inputs."""
        for op in reversed(list(self.into.ops)):
            if not isinstance(op, ReturnOp) and not any(list(result.uses) for result in op.results):
                Rewriter.erase_op(op)
        for argument in reversed(list(self.into.args)):
            if not list(argument.uses):
                self.into.erase_arg(argument)

    def _module(self) -> ModuleOp:
        old = self.block.parent_op()
        assert isinstance(old, FuncOp)
        last = self.into.last_op
        assert isinstance(last, ReturnOp)
        type = FunctionType.from_lists([a.type for a in self.into.args], [v.type for v in last.arguments])
        function = FuncOp(old.sym_name.data, type, Region(self.into))
        if (outputs := old.attributes.get("outputs")) is not None:
            function.attributes["outputs"] = outputs
        module = ModuleOp([function])
        module.verify()
        return module


def _resolved(attribute: Attribute, numbers: Iterator[int]) -> Attribute:
    """A property with its symbolic sizes filled in."""
    if isinstance(attribute, UnitAttr):
        return IntegerAttr(next(numbers), 64)
    if isinstance(attribute, ArrayAttr):
        return ArrayAttr([_resolved(item, numbers) for item in attribute])
    return attribute
