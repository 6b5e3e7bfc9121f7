"""Operations that move numbers: another view of a stream, and a stage only where the order must change."""

from __future__ import annotations

from typing import Any

from ....dialects.operations._operation import Operation
from ....dialects.operations._shapes import element_of, shape_of
from ....dialects.operations.cast import CastOp
from ..flow import Flow, in_order
from ..graph import Place
from ..lowering import Design, attribute_number, lowers, moved, point_of, refusal, site_of
from ..stages.pointwise import Convert


@lowers("mx.reshape", "mx.flatten", "mx.unsqueeze", "mx.squeeze")
def _reshape(design: Design, op: Operation) -> None:
    flow, shape = design.flow(op.operands[0], op), shape_of(op.results[0])
    found = flow.reshaped(shape)
    if found is None:
        place = in_order(design.graph, flow, site_of(op))
        found = Flow.whole(place, flow.point, shape)
    design.flows[op.results[0]] = found


@lowers("mx.transpose")
def _transpose(design: Design, op: Any) -> None:
    flow = design.flow(op.input, op)
    rank = len(flow.shape)
    first, second = (attribute_number(op.properties[name]) % rank for name in ("dim0", "dim1"))
    order = list(range(rank))
    order[first], order[second] = second, first
    design.flows[op.results[0]] = flow.permuted(order)


@lowers("mx.permute")
def _permute(design: Design, op: Any) -> None:
    flow = design.flow(op.input, op)
    design.flows[op.results[0]] = flow.permuted([dim.value.data % len(flow.shape) for dim in op.dims])


@lowers("mx.slice")
def _slice(design: Design, op: Any) -> None:
    if shape_of(op.results[0]) != shape_of(op.operands[0]):
        raise refusal(op, "a part of a stream has no hardware: only a slice that keeps everything")
    design.flows[op.results[0]] = design.flow(op.operands[0], op)


@lowers("mx.parameter", "mx.size")
def _none(design: Design, op: Operation) -> None:
    del design, op


@lowers("mx.cast")
def _cast(design: Design, op: CastOp) -> None:
    """A cast of what a parameter holds is read where it is used; one into blocks belongs to who reads them."""
    from ....dialects.formats import FixedType

    if design.constant(op.result) is not None:
        return
    if not isinstance(element_of(op.result), FixedType):
        return
    flow, point = design.flow(op.input, op), point_of(op.result)
    if flow.point == point:
        design.flows[op.result] = moved(flow)
        return
    node = design.graph.add("cast", Convert(flow.point, point, flow.count, rounding=op.how().rounding), site_of(op))
    design.graph.connect(flow.place, Place(node.name, "in"))
    design.flows[op.result] = moved(flow, place=Place(node.name, "out"), point=point)
