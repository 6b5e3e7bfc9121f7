"""Parameters beside streams: kept in memories, in the order in which the stream comes."""

from __future__ import annotations

from typing import Any

import numpy as np
from xdsl.ir import SSAValue

from ....dialects.integer import Point
from ....dialects.integer_meanings import codes_on
from ....dialects.operations._shapes import shape_of
from ..graph import Place
from ..images import packed
from ..lowering import Design, check_finite, moved, point_of, refusal, site_of
from ..stages.pointwise import Binary

_DIGITS = 53
"""Binary digits of a sum that the reference, which computes in f64, holds exactly."""


def with_parameter(design: Design, op: Any, stream: SSAValue, parameter: SSAValue) -> None:
    """A stream and what stands in a memory, in the order in which the stream comes."""
    if op.name == "mx.sub" and parameter is op.input:
        raise refusal(op, "a parameter less a stream has no hardware: add the stream, negated")
    flow, point = design.flow(stream, op), point_of(op.results[0], op)
    if shape_of(op.results[0]) != flow.shape:
        raise refusal(
            op, f"a stream of shape {flow.shape} repeats against {shape_of(parameter)}: hardware needs it whole"
        )
    check_exact(op, flow.point, point_of(parameter, op))
    codes = fixed_codes(design, op, parameter)
    places = np.broadcast_to(np.arange(codes.size).reshape(shape_of(parameter)), flow.shape)
    beats = sum((np.indices(flow.shape)[axis] * stride for axis, stride in enumerate(flow.strides)), np.array(0))
    ordered = places.reshape(-1)[np.argsort(np.broadcast_to(beats, flow.shape).reshape(-1))]
    kept = next(n for n in range(1, flow.count + 1) if flow.count % n == 0 and _repeats(ordered, n))
    format = point_of(parameter, op)
    words = packed(codes[ordered[:kept], None] & ((1 << format.width) - 1), format.width)
    kind = op.name.removeprefix("mx.")
    stage = Binary(kind, flow.point, format, point, flow.count, kept)
    node = design.graph.add(kind, stage, site_of(op), lambda _: [words])
    design.graph.connect(flow.place, Place(node.name, "a"))
    design.flows[op.results[0]] = moved(flow, place=Place(node.name, "out"), point=point)


def _repeats(numbers: np.ndarray, count: int) -> bool:
    """Whether the first so many come again and again."""
    return bool((numbers.reshape(-1, count) == numbers[:count]).all())


def check_exact(op: Any, a: Point, b: Point) -> None:
    """Raise MxloomError, naming the operation, where the reference could round a sum of two formats twice."""
    digits = max(point.width - point.fraction for point in (a, b)) + max(a.fraction, b.fraction)
    if op.name != "mx.mul" and digits > _DIGITS:
        raise refusal(op, f"its sums take {digits} binary digits, and the reference holds {_DIGITS}: "
                      "bring the magnitudes of its operands nearer to each other")  # fmt: skip


def fixed_codes(design: Design, op: Any, value: Any) -> np.ndarray:
    """The codes of a parameter of fixed-point format, in row-major order."""
    found = design.constant(value)
    if found is None:
        raise refusal(op, f"its operand {value.name_hint} is computed in the model: hardware keeps a parameter here")
    check_finite(op, value, found)
    return codes_on(found, point_of(value, op).fraction).reshape(-1).numpy()
