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
from ..stages.select import Select


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
    flow, fields = design.flow(op.input, op), op.fields()
    dim = fields.get("dim", 0) % len(flow.shape)
    chosen = range(*slice(fields.get("start"), fields.get("end"), fields.get("step")).indices(flow.shape[dim]))
    if len(chosen) > 1 and chosen.step != 1:
        raise refusal(op, f"every {chosen.step}th number of a stream has no hardware: only those one after another")
    design.flows[op.results[0]] = selected(design, op, flow, dim, chosen.start, len(chosen))


@lowers("mx.select")
def _select(design: Design, op: Any) -> None:
    flow, fields = design.flow(op.input, op), op.fields()
    dim = fields["dim"] % len(flow.shape)
    found = selected(design, op, flow, dim, fields["index"] % flow.shape[dim], 1)
    shape, strides = list(found.shape), list(found.strides)
    del shape[dim], strides[dim]
    design.flows[op.results[0]] = moved(found, shape=tuple(shape), strides=tuple(strides))


@lowers("mx.split")
def _split(design: Design, op: Any) -> None:
    flow = design.flow(op.input, op)
    dim = attribute_number(op.dim, 0) % len(flow.shape)
    first = 0
    for part in op.parts:
        kept = shape_of(part)[dim]
        if list(part.uses):
            design.flows[part] = selected(design, op, flow, dim, first, kept)
        first += kept


def selected(design: Design, op: Operation, flow: Flow, dim: int, first: int, kept: int) -> Flow:
    """The flow's numbers at `kept` indices of a dimension from `first` on, in the order in which they come."""
    size, stride = flow.shape[dim], flow.strides[dim]
    if not kept:
        raise refusal(op, f"it keeps nothing of {flow.shape}")
    if kept == size:
        return flow
    stage = Select(flow.point.width, flow.count // (size * stride), size, stride, first, kept)
    node = design.graph.add("select", stage, site_of(op))
    design.graph.connect(flow.place, Place(node.name, "in"))
    # What moves by whole rounds of the dimension finds these shorter.
    strides = tuple(each // size * kept if each > stride else each for each in flow.strides)
    shape = tuple(kept if index == dim else each for index, each in enumerate(flow.shape))
    return Flow(Place(node.name, "out"), flow.point, shape, strides, stage.beats["out"])


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
