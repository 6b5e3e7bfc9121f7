"""Attention: scores, a masked softmax and a second product, grouped heads sharing their keys and values."""

from __future__ import annotations

from math import prod
from typing import Any

from xdsl.dialects.builtin import TensorType

from ....dialects.contractions import transposed_format
from ....dialects.formats import Rounding
from ....dialects.integer import Point
from ....dialects.integer_attention import WEIGHTS
from ....dialects.operations._shapes import element_of, shape_of
from ..dot_product import DotProduct
from ..flow import Flow
from ..graph import Place
from ..lowering import Design, attribute_number, lowers, point_of, refusal, site_of
from ..stages.contraction import Contraction
from ..stages.softmax import Softmax
from .contraction import blocks_of, lanes_of, operands_of, quantized, segment_of, window_of
from .pointwise import table_bits


@lowers("mx.attention")
def _attention(design: Design, op: Any) -> None:
    if op.integer is None:
        raise refusal(op, "it is not computed in integers: run the pass legalize-hardware first")
    if op.padding is not None:
        raise refusal(op, "a padding mask has no hardware: the design is made for one sequence without padding")
    batch, heads, rows, _ = shape_of(op.query)
    groups, columns = shape_of(op.key)[1:3]
    site = site_of(op)
    scores, products = _scores(design, op, rows * heads // groups, columns, batch * groups)
    node = design.graph.add("scores", products, site)
    design.graph.connect(blocks_of(design, op, op.query, products.unit.a, products.unit.lanes), Place(node.name, "a"))
    design.graph.connect(blocks_of(design, op, op.key, products.unit.b, products.unit.lanes), Place(node.name, "b"))
    window = attribute_number(op.properties.get("window"))
    softmax = Softmax(
        scores,
        Point(*WEIGHTS),
        batch * heads * rows,
        columns,
        table_bits(op),
        attribute_number(op.scale),
        causal=op.causal is not None or window is not None,
        positions=rows,
        window=window,
    )
    if (op.causal is not None or window is not None) and rows != columns:
        raise refusal(op, f"{rows} queries and {columns} keys: a mask in hardware needs as many of both")
    if window is not None and op.causal is None:
        raise refusal(op, "a window without a causal mask has no hardware")
    weights = design.graph.add("softmax", softmax, site)
    design.graph.connect(Place(node.name, "out"), Place(weights.name, "in"))
    _values(design, op, Flow.whole(Place(weights.name, "out"), Point(*WEIGHTS), (batch * heads * rows, columns)), site)


def _scores(design: Design, op: Any, rows: int, columns: int, runs: int) -> tuple[Point, Contraction]:
    """The format of the scores, and the product that gives them."""
    size = shape_of(op.query)[-1]
    a, b = operands_of(op, element_of(op.query), element_of(op.key), size)
    lanes = lanes_of(a, b, size)
    scores = Point(op.scores.width.data, op.scores.fraction.data)
    unit = DotProduct(a, b, lanes, segment_of(a, b, size, lanes), window_of(op.score_window))
    return scores, Contraction(unit, rows, columns, size, scores, dynamic=True, runs=runs)


def _values(design: Design, op: Any, weights: Flow, site: str) -> None:
    """The probabilities, rounded, times the values."""
    batch, heads, rows, _ = shape_of(op.query)
    groups, columns, width = shape_of(op.value)[1:]
    value_type = transposed_format(element_of(op.value))
    a, b = operands_of(op, op.probabilities, value_type, columns)
    lanes = lanes_of(a, b, columns)
    unit = DotProduct(a, b, lanes, segment_of(a, b, columns, lanes), window_of(op.value_window))
    point = point_of(op.results[0], op)
    stage = Contraction(unit, rows * heads // groups, width, columns, point, dynamic=True, runs=prod((batch, groups)))
    node = design.graph.add("values", stage, site)
    how = Rounding(
        scale_rule=op.scale_rule.data if op.scale_rule is not None else None,
        rounding=op.rounding.data if op.rounding is not None else "rne",
    )
    place = quantized(design, op, weights, a, lanes, how, f"{site}_probabilities")
    design.graph.connect(place, Place(node.name, "a"))
    value = blocks_of(design, op, op.value, b, lanes, transposed=True)
    design.graph.connect(value, Place(node.name, "b"))
    assert isinstance(op.results[0].type, TensorType)
    design.give(op, Place(node.name, "out"))
