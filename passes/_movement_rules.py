"""How channels move through operations that move elements: the rules of scaling for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from xdsl.ir import Operation

from ..dialects.operations._shapes import UNKNOWN, shape_of
from ..dialects.operations.movement import (
    ConcatOp,
    ExpandOp,
    FlattenOp,
    PermuteOp,
    RepeatOp,
    ReshapeOp,
    SelectOp,
    SliceOp,
    SplitOp,
    SqueezeOp,
    TransposeOp,
    UnsqueezeOp,
)
from ._channels import Labels, UnfollowedError, reshaped, widened
from ._scaling import Scaling, both_ways, called, give


def _moved(region: Scaling, op: Operation) -> None:
    """Operations that move every element once."""
    given, result = shape_of(op.operands[0]), shape_of(op.results[0])
    match op:
        case TransposeOp() | PermuteOp():
            order = _order(op, len(given))
            back = [int(dim) for dim in np.argsort(order)]
            both_ways(region, op, lambda labels: labels.transpose(back), lambda labels: labels.transpose(order))
        case UnsqueezeOp():
            dim = op.dim.value.data % len(result)
            both_ways(region, op, lambda labels: labels.squeeze(dim), lambda labels: np.expand_dims(labels, dim))
        case _:
            backward, forward = (result, given), (given, result)
            both_ways(region, op, lambda x: reshaped(x, *backward), lambda x: reshaped(x, *forward))


def _order(op: TransposeOp | PermuteOp, rank: int) -> list[int]:
    if isinstance(op, PermuteOp):
        return [dim.value.data % rank for dim in op.dims]
    order = list(range(rank))
    one, other = op.dim0.value.data % rank, op.dim1.value.data % rank
    order[one], order[other] = order[other], order[one]
    return order


def _expand(region: Scaling, op: ExpandOp) -> None:
    given, rank = shape_of(op.input), len(shape_of(op.result))

    def forward(labels: Labels) -> Labels:
        return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)

    both_ways(region, op, lambda labels: region.channels.unbroadcast(labels, given), forward)


def _repeat(region: Scaling, op: RepeatOp) -> None:
    fields, given = op.fields(), shape_of(op.input)
    repeats = op.known(fields["repeats"])
    if "dim" not in fields:
        raise UnfollowedError(f"{called(op)} makes one row of all elements")
    dim = fields["dim"] % len(given)

    def backward(labels: Labels) -> Labels:
        if labels.shape[dim] == 1:
            return labels
        split = labels.reshape(*labels.shape[:dim], given[dim], repeats, *labels.shape[dim + 1 :])
        return region.channels.tied(split, [dim + 1]).squeeze(dim + 1)

    def forward(labels: Labels) -> Labels:
        return labels if labels.shape[dim] == 1 else labels.repeat(repeats, dim)

    both_ways(region, op, backward, forward)


def _slice(region: Scaling, op: SliceOp) -> None:
    """Backward, what is cut off stays as it is, or all is scaled: where channels lie says which."""
    fields, given = op.fields(), shape_of(op.input)
    dim = fields.get("dim", 0) % len(given)
    bounds = [fields.get(name) for name in ("start", "end", "step")]
    numbers = all(bound is None or isinstance(bound, int) for bound in bounds)
    part = slice(*bounds) if numbers and given[dim] != UNKNOWN else None

    def backward(labels: Labels) -> Labels:
        if part is None or (labels.shape[dim] == 1 and region.choose(op, [0, 1]) == 0):
            return labels
        return _placed(region, labels, given, dim, part)

    def forward(labels: Labels) -> Labels:
        if labels.shape[dim] == 1:
            return labels
        if part is None:
            raise UnfollowedError(f"{called(op)} cuts channels at a place that is not known")
        return labels[(slice(None),) * dim + (part,)]

    both_ways(region, op, backward, forward)


def _select(region: Scaling, op: SelectOp) -> None:
    fields, given = op.fields(), shape_of(op.input)
    dim, index = fields["dim"] % len(given), fields["index"]
    known = isinstance(index, int) and given[dim] != UNKNOWN

    def backward(labels: Labels) -> Labels:
        labels = np.expand_dims(labels, dim)
        if not known or region.choose(op, [0, 1]) == 1:
            return labels
        return _placed(region, labels, given, dim, slice(index % given[dim], index % given[dim] + 1))

    def forward(labels: Labels) -> Labels:
        if labels.shape[dim] != 1 and not known:
            raise UnfollowedError(f"{called(op)} takes a channel that is not known")
        return labels.take(0 if labels.shape[dim] == 1 else index, dim)

    both_ways(region, op, backward, forward)


def _placed(region: Scaling, labels: Labels, shape: tuple[int, ...], dim: int, part: slice) -> Labels:
    """Labels of a part along `dim` of a tensor, and no channel in the rest of it."""
    found = widened(np.full((*labels.shape[:dim], 1, *labels.shape[dim + 1 :]), region.channels.fixed), dim, shape[dim])
    found = found.copy()
    found[(slice(None),) * dim + (part,)] = labels
    return found


def _parts(region: Scaling, op: SplitOp | ConcatOp) -> None:
    """A tensor and its parts along one dimension, whichever of them the operation makes."""
    whole, parts = (op.input, op.parts) if isinstance(op, SplitOp) else (op.result, op.tensors)
    shape = shape_of(whole)
    dim = (op.dim.value.data if op.dim is not None else 0) % len(shape)
    sizes = [shape_of(part)[dim] for part in parts]
    if UNKNOWN in (*sizes, shape[dim]):
        raise UnfollowedError(f"{called(op)} cuts a dimension whose size is not known")
    places = [slice(end - size, end) for size, end in zip(sizes, np.cumsum(sizes), strict=True)]
    for part, place in zip(parts, places, strict=True):
        if (labels := region.labels(part)) is not None and region.labels(whole) is None:
            region.scale(whole, _placed(region, labels, shape, dim, place))
    if (labels := region.labels(whole)) is not None:
        for part, place in zip(parts, places, strict=True):
            give(region, op, part, widened(labels, dim, shape[dim])[(slice(None),) * dim + (place,)])


MOVEMENT_RULES: dict[type[Operation], Callable[[Scaling, Any], None]] = {
    **dict.fromkeys((ReshapeOp, FlattenOp, SqueezeOp, TransposeOp, PermuteOp, UnsqueezeOp), _moved),
    **dict.fromkeys((SplitOp, ConcatOp), _parts),
    ExpandOp: _expand,
    RepeatOp: _repeat,
    SliceOp: _slice,
    SelectOp: _select,
}
"""How each kind of movement agrees."""
