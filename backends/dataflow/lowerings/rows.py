"""Operations on rows: normalizations, softmax, rotary embedding."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ....dialects.operations._shapes import shape_of
from ..flow import in_order
from ..graph import Place
from ..images import packed
from ..lowering import Design, attribute_number, lowers, point_of, refusal, site_of
from ..stages._stream import Stage
from ..stages.normalize import Normalize
from ..stages.rope import Rope
from ..stages.softmax import Softmax
from .parameters import fixed_codes
from .pointwise import table_bits


@lowers("mx.rms_norm", "mx.layer_norm")
def _normalize(design: Design, op: Any) -> None:
    _needs_integer(op)
    flow, point = design.flow(op.input, op), point_of(op.results[0], op)
    size, rows = flow.shape[-1], prod(flow.shape[:-1])
    bias = getattr(op, "bias", None)
    eps = attribute_number(op.eps, 1e-5)
    points = [None if value is None else point_of(value, op) for value in (op.weight, bias)]
    centred = op.name == "mx.layer_norm"
    stage = Normalize(flow.point, point, rows, size, eps, *points, centred=centred)
    values = [value for value in (op.weight, bias) if value is not None]
    _placed(design, op, stage, values)


@lowers("mx.softmax")
def _softmax(design: Design, op: Any) -> None:
    _needs_integer(op)
    flow, point = design.flow(op.input, op), point_of(op.results[0], op)
    stage = Softmax(flow.point, point, prod(flow.shape[:-1]), flow.shape[-1], table_bits(op))
    _placed(design, op, stage, [])


@lowers("mx.rope")
def _rope(design: Design, op: Any) -> None:
    if op.halves is not None:
        raise refusal(op, "angles of half the width have no hardware")
    flow, point = design.flow(op.input, op), point_of(op.results[0], op)
    table = point_of(op.cos, op)
    if point_of(op.sin, op) != table:
        raise refusal(op, "cos and sin have two formats: hardware takes one")
    if flow.shape[-1] % 2:
        raise refusal(op, f"the width {flow.shape[-1]} is odd")
    angles = shape_of(op.cos)
    positions = flow.shape[-2]
    if prod(angles[:-2]) != 1 or angles[-2] != positions:
        raise refusal(op, f"angles of shape {angles} do not go with rows of shape {flow.shape}")
    stage = Rope(flow.point, point, table, prod(flow.shape[:-1]), flow.shape[-1], positions)
    _placed(design, op, stage, [op.cos, op.sin])


def _needs_integer(op: Any) -> None:
    if op.integer is None:
        raise refusal(op, "it is not computed in integers: run the pass legalize-hardware first")


def _placed(design: Design, op: Any, stage: Stage, values: list[Any]) -> None:
    """Place the stage; its memory holds parameters of one size side by side."""
    words = _words(design, op, values) if values else None
    fill = None if words is None else lambda _: [words]
    node = design.graph.add(op.name.removeprefix("mx."), stage, site_of(op), fill)
    place = in_order(design.graph, design.flow(op.input, op), f"{site_of(op)}_input")
    design.graph.connect(place, Place(node.name, "in"))
    design.give(op, Place(node.name, "out"))


def _words(design: Design, op: Any, values: list[Any]) -> np.ndarray:
    """One word for each number of parameters of one size: the first lowest."""
    total, lifted = np.zeros(0, np.int64), 0
    for value in values:
        codes = fixed_codes(design, op, value)
        own = (codes & ((1 << point_of(value).width) - 1)) << lifted
        total = own if not lifted else total | own
        lifted += point_of(value).width
    return packed(total[:, None], lifted)
