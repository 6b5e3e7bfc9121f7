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

_CURVES = {"mx.silu": "silu", "mx.tanh": "tanh", "mx.sigmoid": "sigmoid"}


@lowers("mx.add", "mx.sub", "mx.mul")
def _binary(design: Design, op: Any) -> None:
    if op.other is None:
        _scalar(design, op)
        return
    kind = op.name.removeprefix("mx.")
    if shape_of(op.input) != shape_of(op.other):
        raise refusal(op, f"operands of shapes {shape_of(op.input)} and {shape_of(op.other)}: hardware needs one shape")
    a, b = design.flow(op.input, op), design.flow(op.other, op)
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
    if op.name != "mx.mul":
        raise refusal(op, "a constant is added by no hardware yet: only multiplied")
    number = Fraction(float(attribute_number(op.scalar)))
    fraction = number.denominator.bit_length() - 1
    if number.denominator != 1 << fraction or abs(number.numerator).bit_length() > 32:
        raise refusal(op, f"the factor {float(number)} needs more than 32 binary digits")
    if number <= 0:
        raise refusal(op, f"hardware multiplies by factors above 0, got {float(number)}")
    _converted(design, op, factor=number.numerator, factor_fraction=fraction)


@lowers("mx.relu")
def _relu(design: Design, op: Any) -> None:
    _converted(design, op, lowest=0)


def _converted(design: Design, op: Any, **options: int) -> None:
    flow, point = design.flow(op.input, op), point_of(op.results[0], op)
    stage = Convert(flow.point, point, flow.count, **options)  # pyright: ignore[reportArgumentType]
    node = design.graph.add(op.name.removeprefix("mx."), stage, site_of(op))
    design.graph.connect(flow.place, Place(node.name, "in"))
    design.flows[op.results[0]] = moved(flow, place=Place(node.name, "out"), point=point)


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
