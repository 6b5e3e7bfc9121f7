"""An operation whose declaration is a torch operator's schema.

Its operands and properties are named as the schema's arguments; importing a node, running it, writing it back to FX
and its text form all follow from that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from xdsl.dialects.builtin import BFloat16Type, Float16Type, Float32Type, Float64Type, TensorType, UnitAttr, f64
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import OptionalDef, OptOperandDef, VarResultDef, VerificationContext
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from ._assembly import SYMBOLS, is_flag, is_variadic, operand_fields, parse_operation, print_operation, property_fields
from ._integer_meaning import all_fixed
from ._operation import Call, Operation
from ._values import decode, encode

_FLOATS = (BFloat16Type, Float16Type, Float32Type, Float64Type)


@dataclass(frozen=True)
class Aten:
    """A torch operator that an operation means.

    `names` gives the field of a schema argument where the two are called differently (the first that takes the value),
    `implied` the only value of an argument that has no field, `ignored` the arguments without effect on the values,
    `sets` the properties that follow from the operator.
    """

    target: str
    names: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    sets: Mapping[str, Attribute] = field(default_factory=dict)

    def fields(self, argument: str) -> tuple[str, ...]:
        """The fields that may hold a schema argument."""
        names = self.names.get(argument, "input" if argument == "self" else argument)
        return (names,) if isinstance(names, str) else names


@dataclass(frozen=True)
class Argument:
    """An argument of a node that is being imported: `value` holds SSA values where the node holds nodes."""

    name: str
    value: Any
    is_default: bool = False


class TorchOperation(Operation):
    """An operation that a torch operator gives meaning to, its declaration being the operator's schema."""

    ATEN: ClassVar[tuple[Aten, ...]] = ()

    @classmethod
    def from_arguments(
        cls, aten: Aten, arguments: Iterable[Argument], result_types: Sequence[Attribute]
    ) -> Self | None:
        """The operation for a node's arguments, or None where they do not all fit its declaration."""
        operands: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for argument in arguments:
            if argument.name in aten.ignored:
                continue
            if argument.name in aten.implied:
                if argument.value != aten.implied[argument.name]:
                    return None
                continue
            if cls._place(aten, argument, operands, values) or argument.is_default or argument.value is None:
                continue
            return None
        return cls._built(operands, values, dict(aten.sets), result_types)

    @classmethod
    def _place(cls, aten: Aten, argument: Argument, operands: dict[str, Any], values: dict[str, Any]) -> bool:
        """Give the argument to the first field that takes it."""
        declared = dict(operand_fields(cls))
        optional = cls.get_irdl_definition().properties
        for name in aten.fields(argument.name):
            if name in declared:
                if is_variadic(declared[name]) and all(map(_is_tensor, argument.value or ())):
                    operands[name] = list(argument.value or ())
                    return True
                if not is_variadic(declared[name]) and _is_tensor(argument.value):
                    operands[name] = argument.value
                    return True
            elif name in optional and argument.value is not None:
                if not (argument.is_default and cls.is_optional(name)):
                    values[name] = argument.value
                return True
        return False

    @classmethod
    def _built(
        cls,
        operands: dict[str, Any],
        values: dict[str, Any],
        properties: dict[str, Attribute],
        result_types: Sequence[Attribute],
    ) -> Self | None:
        symbols: list[SSAValue] = []
        for name in property_fields(cls):
            if name in values and not cls._encode(name, values[name], symbols, properties):
                return None
        groups: list[Any] = []
        for name, definition in operand_fields(cls):
            if name not in operands and not isinstance(definition, OptOperandDef):
                return None
            groups.append(operands.get(name, []))
        missing = [n for n in property_fields(cls) if n not in properties and not cls.is_optional(n)]
        if missing or (symbols and not cls.has_symbols()):
            return None
        if cls.has_symbols():
            groups.append(symbols)
        return cls.build(operands=groups, result_types=cls.result_groups(result_types), properties=properties)

    @classmethod
    def _encode(cls, name: str, value: Any, symbols: list[SSAValue], properties: dict[str, Attribute]) -> bool:
        """Add the property; False where its declaration does not take the value."""
        if is_flag(cls, name):
            if value is True:
                properties[name] = UnitAttr()
            return isinstance(value, bool)
        try:
            attribute = encode(value, symbols)
            cls.get_irdl_definition().properties[name].constr.verify(attribute, VerificationContext())
        except (TypeError, VerifyException):
            return False
        properties[name] = attribute
        return True

    @classmethod
    def is_optional(cls, name: str) -> bool:
        """Whether the property may be left out."""
        return isinstance(cls.get_irdl_definition().properties[name], OptionalDef)

    @classmethod
    def has_symbols(cls) -> bool:
        """Whether the operation takes sizes that are known at run time only."""
        return any(name == SYMBOLS for name, _ in cls.get_irdl_definition().operands)

    @classmethod
    def result_groups(cls, types: Sequence[Attribute]) -> list[Any]:
        """Result types as the constructor wants them: a variadic result takes them all."""
        ((_, definition), *_) = cls.get_irdl_definition().results
        return [list(types)] if isinstance(definition, VarResultDef) else list(types)

    def symbol_values(self) -> Sequence[SSAValue]:
        """The symbolic sizes among the operands, in the order in which the properties use them."""
        return getattr(self, SYMBOLS, ())

    def fields(self) -> dict[str, Any]:
        """Operands and properties by name, as Python values; left-out ones are left out."""
        found: dict[str, Any] = {}
        for name, definition in operand_fields(type(self)):
            value = getattr(self, name)
            if value is not None:
                found[name] = list(value) if is_variadic(definition) else value
        symbols = iter(self.symbol_values())
        for name in property_fields(type(self)):
            if name in self.properties:
                flag = is_flag(type(self), name)
                found[name] = True if flag else decode(self.properties[name], symbols)
        return found

    def operator(self) -> Aten:
        """The torch operator that this operation means, of those it may stand for."""
        return self.ATEN[0]

    def call(self) -> Call:
        from ..torch_operators import operator

        aten, values = self.operator(), self.fields()
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        skipped = False
        target = operator(aten.target)
        for argument in target._schema.arguments:
            held = [name for name in aten.fields(argument.name) if name in values]
            if argument.name in aten.implied:
                value = aten.implied[argument.name]
            elif held:
                value = values[held[0]]
            elif self._is_false_flag(aten, argument.name) and not argument.has_default_value():
                value = False
            elif not argument.has_default_value():
                value = None
            else:
                skipped = True
                continue
            if skipped or argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        return Call(target, tuple(args), kwargs, self.computes_in())

    def _is_false_flag(self, aten: Aten, argument: str) -> bool:
        declared = property_fields(type(self))
        return any(name in declared and is_flag(type(self), name) for name in aten.fields(argument))

    def computes_in(self) -> Attribute | None:
        """The widest float among operands and results (a format counts as f32), or None where all are the same.

        Operands without dimensions do not count beside others: torch computes in the type of those. Where all are fixed
        point it is f64, which holds every product of two codes, so that the one rounding is exact.
        """
        if all_fixed(self):
            return f64
        floats = [value for value in self.operands if _float(value) is not None]
        sized = [value for value in floats if isinstance(value.type, TensorType) and value.type.get_num_dims() > 0]
        return widest(
            element for value in (*(sized or floats), *self.results) if (element := _float(value)) is not None
        )

    def print(self, printer: Printer) -> None:
        print_operation(self, printer)

    @classmethod
    def parse(cls, parser: Parser) -> Self:
        operation = parse_operation(cls, parser)
        assert isinstance(operation, cls)
        return operation


def widest(elements: Iterable[Attribute]) -> Attribute | None:
    """The widest of some float types, or None where they are all the same (or there are none)."""
    found = set(elements)
    if len(found) < 2:
        return None
    if found == {BFloat16Type(), Float16Type()}:
        return Float32Type()
    return max(found, key=lambda element: _FLOATS.index(type(element)))  # pyright: ignore[reportArgumentType]


def _float(value: SSAValue) -> Attribute | None:
    """The element type in which a float tensor is held at run time; None for anything else."""
    from .. import formats

    if not isinstance(value.type, TensorType):
        return None
    element = value.type.element_type
    if isinstance(element, _FLOATS):
        return element
    return None if formats.is_wide(element) else Float32Type()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, SSAValue) and isinstance(value.type, TensorType)
