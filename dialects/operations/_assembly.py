"""One text form for every operation, derived from its declaration.

    operation ::= name (item (`,` item)*)? attr-dict? `:` function-type
    item      ::= operand | `[` operands `]` | keyword `=` operand | keyword `=` value | flag
    value     ::= operand | number | `<` number `:` type `>` | `[` values `]` | attribute

Operands stand in the order of their declaration; one that follows a left-out operand names itself. A symbolic size
stands where the number would: `mx.reshape %x, shape = [%batch, 10, 64] : (tensor<?x640xf32>, index) -> ...`. A bare
number is an i64, or an f64 where it has a point; any other, infinity and NaN included, stands in angle brackets with
its type.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import ArrayAttr, FloatAttr, IntegerAttr, UnitAttr, f64, i1, i64
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import IRDLOperation, OptOperandDef, VarOperandDef
from xdsl.parser import Parser, UnresolvedOperand
from xdsl.printer import Printer

if TYPE_CHECKING:
    from ._torch_operation import TorchOperation

SYMBOLS = "symbols"


def operand_fields(operation: type[IRDLOperation]) -> list[tuple[str, Any]]:
    """(name, definition) of the declared operands, symbolic sizes left out."""
    return [(name, d) for name, d in operation.get_irdl_definition().operands if name != SYMBOLS]


def property_fields(operation: type[IRDLOperation]) -> list[str]:
    """Names of the declared properties, those that xDSL adds for operand segments left out."""
    return [name for name in operation.get_irdl_definition().properties if not name.endswith("SegmentSizes")]


def is_flag(operation: type[IRDLOperation], field: str) -> bool:
    """Whether the property is a word that is there or not."""
    return operation.get_irdl_definition().properties[field].constr.get_bases() == {UnitAttr}


def is_variadic(definition: Any) -> bool:
    """Whether the operand is a list (not merely optional)."""
    return isinstance(definition, VarOperandDef) and not isinstance(definition, OptOperandDef)


def print_operation(op: TorchOperation, printer: Printer) -> None:
    """Print what follows the operation's name."""
    separator = " "

    def item(keyword: str = "") -> None:
        nonlocal separator
        printer.print_string(separator + keyword)
        separator = ", "

    complete = True
    for name, definition in operand_fields(type(op)):
        value = getattr(op, name)
        if value is None:
            complete = False
            continue
        item("" if complete else f"{name} = ")
        if is_variadic(definition):
            with printer.in_square_brackets():
                printer.print_list(value, printer.print_operand)
        else:
            printer.print_operand(value)
    symbols = iter(op.symbol_values())
    for name in property_fields(type(op)):
        attribute = op.properties.get(name)
        if attribute is None:
            continue
        if is_flag(type(op), name):
            item(name)
            continue
        item(f"{name} = ")
        _print_value(attribute, symbols, printer)
    if op.attributes:
        printer.print_string(" ")
        printer.print_attr_dict(op.attributes)
    printer.print_string(" : ")
    printer.print_function_type(op.operand_types, op.result_types)


def _print_value(attribute: Attribute, symbols: Iterator[SSAValue], printer: Printer) -> None:
    match attribute:
        case UnitAttr():
            printer.print_operand(next(symbols))
        case ArrayAttr():
            with printer.in_square_brackets():
                printer.print_list(attribute.data, lambda item: _print_value(item, symbols, printer))
        case IntegerAttr() if attribute.type == i64:
            printer.print_string(str(attribute.value.data))
        case FloatAttr() if attribute.type == f64 and isfinite(attribute.value.data):
            printer.print_string(_digits(attribute.value.data))
        case IntegerAttr() | FloatAttr() if attribute.type != i1:
            with printer.in_angle_brackets():
                printer.print_attribute(attribute)
        case _:
            printer.print_attribute(attribute)


def _digits(number: float) -> str:
    """Shortest decimal text that reads back to the same f64, with the point that makes it a float."""
    text = repr(number)
    mantissa, mark, exponent = text.partition("e")
    return text if "." in mantissa else f"{mantissa}.0{mark}{exponent}"


def parse_operation(operation: type[TorchOperation], parser: Parser) -> TorchOperation:
    """Parse what follows the operation's name."""
    declared = operand_fields(operation)
    operands: dict[str, Any] = {}
    attributes: dict[str, Attribute] = {}
    symbols: dict[str, list[UnresolvedOperand]] = {}

    def parse_item() -> None:
        field = declared[len(operands)][0] if len(operands) < len(declared) else None
        if (operand := parser.parse_optional_unresolved_operand()) is not None:
            if field is None:
                parser.raise_error(f"{operation.name} takes {len(declared)} operands at most")
            operands[field] = operand
            return
        if field is not None and is_variadic(declared[len(operands)][1]):
            operands[field] = parser.parse_comma_separated_list(
                parser.Delimiter.SQUARE, parser.parse_unresolved_operand
            )
            return
        keyword = parser.parse_identifier(" (an operand or the name of an argument)")
        _parse_keyword(operation, keyword, parser, operands, attributes, symbols)

    if parser.parse_optional_punctuation(":") is None:
        parse_item()
        while parser.parse_optional_punctuation(",") is not None:
            parse_item()
        extra = parser.parse_optional_attr_dict()
        parser.parse_punctuation(":")
    else:
        extra = {}
    function_type = parser.parse_function_type()
    return _build(operation, parser, function_type, operands, attributes, symbols, extra)


def _parse_keyword(
    operation: type[TorchOperation],
    keyword: str,
    parser: Parser,
    operands: dict[str, Any],
    attributes: dict[str, Attribute],
    symbols: dict[str, list[UnresolvedOperand]],
) -> None:
    if keyword in dict(operand_fields(operation)):
        parser.parse_punctuation("=")
        operands[keyword] = parser.parse_unresolved_operand()
    elif keyword not in property_fields(operation):
        known = ", ".join([*dict(operand_fields(operation)), *property_fields(operation)])
        parser.raise_error(f"{operation.name} has no argument {keyword}; it has {known}")
    elif is_flag(operation, keyword):
        attributes[keyword] = UnitAttr()
    else:
        parser.parse_punctuation("=")
        attributes[keyword] = _parse_value(parser, symbols.setdefault(keyword, []))


def _parse_value(parser: Parser, symbols: list[UnresolvedOperand]) -> Attribute:
    if (operand := parser.parse_optional_unresolved_operand()) is not None:
        symbols.append(operand)
        return UnitAttr()
    items = parser.parse_optional_comma_separated_list(parser.Delimiter.SQUARE, lambda: _parse_value(parser, symbols))
    if items is not None:
        return ArrayAttr(items)
    if parser.parse_optional_keyword("true") is not None:
        return IntegerAttr(1, i1)
    if parser.parse_optional_keyword("false") is not None:
        return IntegerAttr(0, i1)
    if parser.parse_optional_punctuation("<") is not None:
        attribute = parser.parse_attribute()
        parser.parse_punctuation(">")
        return attribute
    if (number := parser.parse_optional_number()) is not None:
        return FloatAttr(number, f64) if isinstance(number, float) else IntegerAttr(number, i64)
    return parser.parse_attribute()


def _build(
    operation: type[TorchOperation],
    parser: Parser,
    function_type: Any,
    operands: dict[str, Any],
    attributes: dict[str, Attribute],
    symbols: dict[str, list[UnresolvedOperand]],
    extra: dict[str, Attribute],
) -> TorchOperation:
    groups = [operands.get(name) for name, _ in operand_fields(operation)]
    if operation.has_symbols():
        groups.append([value for name in property_fields(operation) for value in symbols.get(name, ())])
    elif any(symbols.values()):
        parser.raise_error(f"{operation.name} takes numbers here, not values")
    flat = [value for group in groups if group is not None for value in (group if isinstance(group, list) else [group])]
    resolved = iter(parser.resolve_operands(flat, function_type.inputs.data, parser.pos))
    filled: list[Any] = []
    for group in groups:
        if group is None:
            filled.append([])
        elif isinstance(group, list):
            filled.append([next(resolved) for _ in group])
        else:
            filled.append(next(resolved))
    return operation.build(
        operands=filled,
        result_types=operation.result_groups(function_type.outputs.data),
        properties=attributes,
        attributes=extra,
    )
