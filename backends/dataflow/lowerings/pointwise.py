"""Operations on each number alone, and on two streams of one shape."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from ....dialects.integer import Point, Table
from ....dialects.operations._shapes import shape_of
from ..flow import in_order
from ..graph import Place
from ..lowering import Design, attribute_number, lowers, moved, point_of, refusal, site_of
from ..stages.pointwise import Binary, Convert
from ..stages.table import Activation
from .parameters import check_exact, with_parameter

_CURVES = {"mx.silu": "silu", "mx.tanh": "tanh", "mx.sigmoid": "sigmoid"}


@lowers("mx.add", "mx.sub", "mx.mul", "mx.div")
def _binary(design: Design, op: Any) -> None:
    if op.other is None:
        _scalar(design, op)
        return
    for value, stream in ((op.other, op.input), (op.input, op.other)):
        if design.constant(value) is not None:
            with_parameter(design, op, stream, value)
            return
    kind = op.name.removeprefix("mx.")
    if kind == "div":
        raise refusal(op, "streams are divided by no hardware")
    if shape_of(op.input) != shape_of(op.other):
        raise refusal(op, f"operands of shapes {shape_of(op.input)} and {shape_of(op.other)}: hardware needs one shape")
    a, b = design.flow(op.input, op), design.flow(op.other, op)
    check_exact(op, a.point, b.point)
    point, count = point_of(op.results[0], op), a.count
    node = design.graph.add(kind, Binary(kind, a.point, b.point, point, count), site_of(op))
    # Streams that come in one order need none of their own.
    alike = a.strides == b.strides
    for flow, stream in ((a, "a"), (b, "b")):
        place = flow.place if alike else in_order(design.graph, flow, f"{site_of(op)}_{stream}")
        design.graph.connect(place, Place(node.name, stream))
    if alike:
        design.flows[op.results[0]] = moved(a, place=Place(node.name, "out"), point=point)
    else:
        design.give(op, Place(node.name, "out"))


def _scalar(design: Design, op: Any) -> None:
    """A number applied to every number of a stream: only where it is one of a few binary digits."""
    number = Fraction(float(attribute_number(op.scalar)))
    if op.name == "mx.div":
        number = 1 / number
    fraction = number.denominator.bit_length() - 1
    if number.denominator != 1 << fraction or abs(number.numerator).bit_length() > 32:
        raise refusal(op, f"the number {float(number)} needs more than 32 binary digits")
    if op.name in ("mx.add", "mx.sub"):
        check_exact(op, design.flow(op.input, op).point, Point(number.numerator.bit_length() + 1, fraction))
        sign = -1 if op.name == "mx.sub" else 1
        _converted(design, op, added=sign * number.numerator, added_fraction=fraction)
    elif number:
        _converted(design, op, factor=number.numerator, factor_fraction=fraction)
    else:
        raise refusal(op, "the factor 0 leaves nothing of a stream")


@lowers("mx.neg")
def _negated(design: Design, op: Any) -> None:
    _converted(design, op, factor=-1)


@lowers("mx.relu")
def _relu(design: Design, op: Any) -> None:
    _converted(design, op, lowest=0)


def _converted(design: Design, op: Any, **options: int) -> None:
    flow, point = design.flow(op.input, op), point_of(op.results[0], op)
    if _keeps_codes(flow.point, point, options):
        design.flows[op.results[0]] = moved(flow, point=point)
        return
    stage = Convert(flow.point, point, flow.count, **options)  # pyright: ignore[reportArgumentType]
    node = design.graph.add(op.name.removeprefix("mx."), stage, site_of(op))
    design.graph.connect(flow.place, Place(node.name, "in"))
    design.flows[op.results[0]] = moved(flow, place=Place(node.name, "out"), point=point)


def _keeps_codes(given: Point, result: Point, options: dict[str, int]) -> bool:
    """Whether a number is multiplied by a power of two by which its point moves, too: nothing is left to do."""
    factor, places = options.get("factor", 0), options.get("factor_fraction", 0)
    if factor.bit_count() != 1 or factor < 0 or given.width != result.width:
        return False
    return given.fraction - result.fraction == factor.bit_length() - 1 - places


@lowers("mx.silu", "mx.gelu", "mx.tanh", "mx.sigmoid")
def _curve(design: Design, op: Any) -> None:
    if op.integer is None:
        raise refusal(op, "it is not computed in integers: run the pass legalize-hardware first")
    name = _CURVES.get(op.name)
    if name is None:
        tanh = op.approximate is not None and op.approximate.data == "tanh"
        name = "gelu_tanh" if tanh else "gelu"
    flow, point = design.flow(op.input, op), point_of(op.results[0], op)
    stage = Activation(Table(name, flow.point, Point(point.width, point.fraction), table_bits(op)), flow.count)
    node = design.graph.add(name, stage, site_of(op))
    design.graph.connect(flow.place, Place(node.name, "in"))
    design.flows[op.results[0]] = moved(flow, place=Place(node.name, "out"), point=point)


def table_bits(op: Any) -> int:
    """log2 of the entries of the tables of an operation that is computed in integers."""
    return op.integer.table_bits.data
