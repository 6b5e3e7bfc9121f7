"""Windows over pictures: patches, which convolutions read, and pooling."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ....dialects.operations._operation import Operation
from ....dialects.operations._shapes import shape_of
from ..flow import Flow, in_order, row_major
from ..graph import Place
from ..lowering import Design, lowers, point_of, refusal, site_of
from ..stages.patches import Patches, Sliding
from ..stages.pool import Pool


@lowers("mx.patches")
def _patches(design: Design, op: Any) -> None:
    flow, (kernel, *others) = design.flow(op.input, op), op.windows
    spatial = len(kernel)
    if spatial > 2:
        raise refusal(op, f"windows of {spatial} dimensions: hardware has those of one and two")
    sliding = [Sliding(*sizes) for sizes in zip(flow.shape[2:], kernel, *others, strict=True)]
    lines, columns = [Sliding(1, 1), *sliding][-2:]
    stage = Patches(flow.point.width, flow.shape[1], lines, columns, flow.shape[0])
    place = in_order(design.graph, flow.permuted([0, *range(2, 2 + spatial), 1]), f"{site_of(op)}_picture")
    node = design.graph.add("windows", stage, site_of(op))
    design.graph.connect(place, Place(node.name, "in"))
    design.give(op, Place(node.name, "out"))


@lowers("mx.max_pool")
def _max_pool(design: Design, op: Any) -> None:
    fields = op.fields()
    _pooled(design, op, "max", fields["kernel_size"], fields, fill=-1 << (design.flow(op.input, op).point.width - 1))


@lowers("mx.window_pool")
def _window_pool(design: Design, op: Any) -> None:
    _needs_integer(op)
    fields = op.fields()
    _pooled(design, op, "mean", fields["kernel_size"], fields)


@lowers("mx.avg_pool")
def _average_pool(design: Design, op: Any) -> None:
    """One mean for a whole picture takes no window."""
    _needs_integer(op)
    given, result = shape_of(op.input), shape_of(op.results[0])
    if result[-2:] == (1, 1):
        _averaged(design, op, {len(given) - 2, len(given) - 1})
        return
    kernel = [size // wanted for size, wanted in zip(given[-2:], result[-2:], strict=True)]
    _pooled(design, op, "mean", kernel, {"stride": kernel})


@lowers("mx.mean")
def _mean(design: Design, op: Any) -> None:
    _needs_integer(op)
    rank = len(shape_of(op.input))
    named = {dim.value.data % rank for dim in op.dim or ()}
    _averaged(design, op, named or set(range(rank)))


def _needs_integer(op: Any) -> None:
    if op.integer is None:
        raise refusal(op, "it is not computed in integers: run the pass legalize-hardware first")


def _pooled(
    design: Design, op: Any, operation: str, kernel: Sequence[int], fields: dict[str, Any], fill: int = 0
) -> None:
    """A line buffer that gives every channel's window, and what makes one number of it."""
    if fields.get("ceil_mode"):
        raise refusal(op, "ceil_mode: windows that begin in a picture and end behind it have no hardware")
    padding = _pair(fields.get("padding") or [0])
    if operation == "mean" and any(padding):
        raise refusal(op, "means of windows that reach into padding have no hardware")
    flow, kernel = design.flow(op.input, op), _pair(kernel)
    stride, dilation = _pair(fields.get("stride") or kernel), _pair(fields.get("dilation") or [1])
    sizes = zip(flow.shape[-2:], kernel, stride, padding, dilation, strict=True)
    lines, columns = (Sliding(*each) for each in sizes)
    rank, leading = len(flow.shape), flow.shape[:-3]
    if rank < 3:
        raise refusal(op, f"an input of shape {flow.shape}: hardware needs channels in front of lines and columns")
    windows = Patches(flow.point.width, flow.shape[-3], lines, columns, prod(leading), by_channel=True, fill=fill)
    last = [*range(rank - 3), rank - 2, rank - 1, rank - 3]
    graph, site = design.graph, site_of(op)
    place = in_order(graph, flow.permuted(last), f"{site}_picture")
    buffer = graph.add("windows", windows, site)
    graph.connect(place, Place(buffer.name, "in"))
    count, point = prod(kernel), point_of(op.results[0], op)
    node = graph.add("pool", Pool(operation, flow.point, point, windows.beats["out"] // count, count), site)
    graph.connect(Place(buffer.name, "out"), Place(node.name, "in"))
    shape = (*leading, lines.positions, columns.positions, flow.shape[-3])
    found = Flow.whole(Place(node.name, "out"), point, shape)
    design.flows[op.results[0]] = found.permuted([*range(rank - 3), rank - 1, rank - 3, rank - 2])


def _pair(numbers: Sequence[int]) -> list[int]:
    return [*numbers] * 2 if len(numbers) == 1 else [*numbers]


def _averaged(design: Design, op: Operation, dims: set[int]) -> None:
    """Means over whole dimensions; where these stand side by side in the order of the stream, it stays as it is."""
    graph, site, flow = design.graph, site_of(op), design.flow(op.operands[0], op)
    point, shape = point_of(op.results[0], op), flow.shape
    order = sorted((d for d, size in enumerate(shape) if size > 1), key=lambda d: -flow.strides[d])
    reduced, kept = [d for d in order if d in dims], [d for d in order if d not in dims]
    first = order.index(reduced[0]) if reduced else len(order)
    is_dense = [flow.strides[d] for d in order] == [*row_major([shape[d] for d in order])]
    if is_dense and order[first : first + len(reduced)] == reduced:
        place = flow.place
    else:
        single = [d for d, size in enumerate(shape) if size == 1]
        place, first = in_order(graph, flow.permuted([*single, *kept, *reduced]), f"{site}_rows"), len(kept)
    before, after = (prod(shape[d] for d in part) for part in (kept[:first], kept[first:]))
    stage = Pool("mean", flow.point, point, before, prod(shape[d] for d in reduced), after)
    node = graph.add("mean", stage, site)
    graph.connect(place, Place(node.name, "in"))
    found = Flow.whole(Place(node.name, "out"), point, [shape[d] for d in kept])
    found = found.permuted(sorted(range(len(kept)), key=lambda index: kept[index])).reshaped(shape_of(op.results[0]))
    assert found is not None
    design.flows[op.results[0]] = found
