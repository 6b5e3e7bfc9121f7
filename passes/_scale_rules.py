"""What each operation does to channels that are scaled: passes the scale on, takes it into a weight, or forbids it.

A rule is called whenever one of the operation's operands or results has come to be scaled. It sees to it that all of
them agree: `region.scale` scales another value, `region.weight` one of the operation's parameters. UnfollowedError says
why an operation cannot agree. Scales are positive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from xdsl.ir import Operation, SSAValue

from ..dialects.formats import is_wide
from ..dialects.operations._origin import is_weight
from ..dialects.operations._shapes import UNKNOWN, element_of, shape_of
from ..dialects.operations.attention import AttentionOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import ConvOp, ExpertLinearOp, LinearOp, MatmulOp
from ..dialects.operations.movement import Movement
from ..dialects.operations.normalization import BatchNormOp, GroupNormOp, LayerNormOp, RMSNormOp
from ..dialects.operations.opaque import AtenOp
from ..dialects.operations.pointwise import AddOp, ClampOp, ConvertOp, DivOp, MulOp, NegOp, ReluOp, SubOp
from ..dialects.operations.reduction import AveragePoolOp, MaxPoolOp, MeanOp, SumOp, WindowPoolOp
from ..dialects.operations.size import SizeOp
from ._channels import Labels, UnfollowedError, widened
from ._movement_rules import MOVEMENT_RULES
from ._scaling import Scaling, both_ways, called, give, require_unscaled

HOMOGENEOUS = ("leaky_relu", "prelu", "_prelu_kernel", "dropout", "clone", "alias", "detach", "abs")
"""Torch operators with f(s x) = s f(x) for s > 0, by name."""


def apply_rule(region: Scaling, op: Operation) -> None:
    """Make an operation agree with those of its operands and results that are scaled."""
    if isinstance(op, SizeOp):
        return
    rule = RULES.get(type(op))
    if rule is None:
        raise UnfollowedError(f"{called(op)} is no operation that a scale passes through")
    rule(region, op)


def is_homogeneous(op: Operation) -> bool:
    """Whether a scale > 0 of what is read is a scale of the result, and the operation has no weight of its own."""
    if isinstance(op, ClampOp):
        return _bound(op.min) == 0 and op.max is None
    if isinstance(op, AtenOp):
        return op.target.data.split(".")[1] in HOMOGENEOUS
    return isinstance(op, (CastOp, ConvertOp, ReluOp, NegOp, Movement, *POOLED))


def _bound(bound: Any) -> float | None:
    return None if bound is None else bound.value.data


def _alike(region: Scaling, op: Operation) -> None:
    """The result is scaled as the first operand is, place by place."""
    if isinstance(op, CastOp) and op.sensitivity is not None:
        raise UnfollowedError(f"{called(op)} has sensitivities measured for the values as they are")
    if isinstance(op, ClampOp | AtenOp) and not is_homogeneous(op):
        raise UnfollowedError(f"{called(op)} does not scale with what it reads")
    if isinstance(op, ConvertOp) and not all(is_wide(element_of(v)) and _is_float(v) for v in (op.input, op.result)):
        raise UnfollowedError(f"{called(op)} makes other numbers")
    both_ways(region, op, lambda labels: labels, lambda labels: labels)


def _is_float(value: SSAValue) -> bool:
    return str(element_of(value)) in ("f64", "f32", "bf16", "f16")


def _product(region: Scaling, op: MulOp) -> None:
    """One of two factors is scaled with the product: a parameter where there is one."""
    if op.other is None:
        return _alike(region, op)
    scaled = [index for index, value in enumerate(op.operands) if region.labels(value) is not None]
    if len(scaled) == 2 or (scaled and region.chosen(op) not in (None, scaled[0])):
        raise UnfollowedError(f"{called(op)} multiplies two values that are scaled both")
    if scaled:
        region.choose(op, scaled)
        region.scale(op.result, _padded(region.labels(op.operands[scaled[0]]), op.result))
    elif region.chosen(op) is None:
        value = op.operands[region.choose(op, sorted((0, 1), key=lambda index: not is_weight(op.operands[index])))]
        labels = region.labels(op.result)
        assert labels is not None
        give(region, op, value, region.channels.unbroadcast(labels, shape_of(value)))


def _padded(labels: Labels | None, result: SSAValue) -> Labels:
    assert labels is not None
    return labels.reshape((1,) * (len(shape_of(result)) - labels.ndim) + labels.shape)


def _quotient(region: Scaling, op: DivOp) -> None:
    """The dividend is scaled with the quotient."""
    given = shape_of(op.input)
    both_ways(region, op, lambda x: region.channels.unbroadcast(x, given), lambda x: _padded(x, op.result))


def _sum(region: Scaling, op: AddOp | SubOp) -> None:
    """Both summands are scaled with the sum."""
    if op.other is None:
        raise UnfollowedError(f"{called(op)} adds a number to what is scaled")
    held = next(labels for v in (op.result, *op.operands) if (labels := region.labels(v)) is not None)
    labels = _padded(held, op.result)
    for value in op.operands:
        give(region, op, value, region.channels.unbroadcast(labels, shape_of(value)))
    region.scale(op.result, labels)


def _pooled(region: Scaling, op: MaxPoolOp | WindowPoolOp | AveragePoolOp) -> None:
    def spatial(labels: Labels) -> Labels:
        return region.channels.tied(labels, (labels.ndim - 2, labels.ndim - 1))

    both_ways(region, op, spatial, spatial)


def _reduced(region: Scaling, op: MeanOp | SumOp) -> None:
    rank = len(shape_of(op.input))
    dims = sorted(dim.value.data % rank for dim in op.dim or ()) or list(range(rank))

    def forward(labels: Labels) -> Labels:
        labels = region.channels.tied(labels, dims)
        return labels if op.keepdim is not None else labels.squeeze(tuple(dims))

    def backward(labels: Labels) -> Labels:
        return labels if op.keepdim is not None else np.expand_dims(labels, tuple(dims))

    both_ways(region, op, backward, forward)


def _made(region: Scaling, op: Any) -> Labels:
    """The labels of the result of an operation that makes new numbers of what it reads."""
    require_unscaled(region, op, op.operands)
    labels = region.labels(op.results[0])
    assert labels is not None
    return labels


def _norm(region: Scaling, op: RMSNormOp | LayerNormOp) -> None:
    """The scale goes into weight and bias; of a gain 1 + weight, into the gain."""
    count = len(op.normalized_shape) if isinstance(op, LayerNormOp) else 1
    labels = _made(region, op)
    labels = region.channels.only(labels, range(-count, 0))
    _into_parameters(region, op, labels.reshape(labels.shape[-count:]))


def _channel_norm(region: Scaling, op: BatchNormOp | GroupNormOp) -> None:
    labels = region.channels.only(_made(region, op), [1])
    _into_parameters(region, op, labels.reshape(-1))


def _into_parameters(region: Scaling, op: Any, labels: Labels) -> None:
    if op.weight is None:
        raise UnfollowedError(f"{called(op)} has no weight that could take the scale")
    offset = 1.0 if isinstance(op, RMSNormOp) and op.unit_offset is not None else 0.0
    region.weight(op, op.weight, labels, plus=offset)
    if (bias := getattr(op, "bias", None)) is not None:
        region.weight(op, bias, labels)


def _linear(region: Scaling, op: LinearOp | ExpertLinearOp) -> None:
    """Input channels are columns of the weight, output channels its rows and the bias."""
    rank, swapped = len(shape_of(op.weight)), op.transposed is not None
    columns, rows = (rank - 2, rank - 1) if swapped else (rank - 1, rank - 2)
    require_unscaled(region, op, op.operands[1:])
    if (labels := region.labels(op.input)) is not None:
        labels = region.channels.only(labels, [-1])
        region.weight(op, op.weight, _turned(labels, rank, columns), reads=True)
    if (labels := region.labels(op.result)) is not None:
        labels = region.channels.only(labels, [-1])
        region.weight(op, op.weight, _turned(labels, rank, rows))
        if op.bias is not None:
            region.weight(op, op.bias, _turned(labels, rank - 1, rank - 2))


def _turned(labels: Labels, rank: int, dim: int) -> Labels:
    """Labels that change along one dimension alone, along dimension `dim` of `rank`."""
    return labels.reshape([labels.size if i == dim else 1 for i in range(rank)])


def _conv(region: Scaling, op: ConvOp) -> None:
    weight = shape_of(op.weight)
    rank, groups = len(weight), op.groups.value.data if op.groups is not None else 1
    require_unscaled(region, op, op.operands[1:])
    if (labels := region.labels(op.input)) is not None:
        labels = widened(region.channels.only(labels, [1]), 1, weight[1] * groups)
        of_groups = labels.reshape(groups, weight[1]).repeat(weight[0] // groups, 0)
        region.weight(op, op.weight, of_groups.reshape(*weight[:2], *[1] * (rank - 2)), reads=True)
    if (labels := region.labels(op.result)) is not None:
        labels = region.channels.only(labels, [1])
        region.weight(op, op.weight, _turned(labels, rank, 0))
        if op.bias is not None:
            region.weight(op, op.bias, labels.reshape(-1))


_READS = 2
"""In the place of a factor that is scaled with the product: one factor is a parameter that takes the scale."""


def _matmul(region: Scaling, op: MatmulOp) -> None:
    """Rows of the first factor and columns of the second are channels of the product; only parameters take others."""
    if min(len(shape_of(value)) for value in op.operands) < 2:
        raise UnfollowedError(f"{called(op)} multiplies vectors")
    scaled = [index for index, value in enumerate(op.operands) if region.labels(value) is not None]
    if len(scaled) == 2:
        raise UnfollowedError(f"{called(op)} multiplies two values that are scaled both")
    if scaled:
        _spread_factor(region, op, scaled[0])
    elif region.chosen(op) is None:
        _scale_factor(region, op)


def _spread_factor(region: Scaling, op: MatmulOp, index: int) -> None:
    """One factor is scaled: along what is summed over a parameter takes the scale, along the other the product."""
    labels, partner = region.labels(op.operands[index]), op.operands[1 - index]
    assert labels is not None
    summed, rank = (-1, -2)[index], len(shape_of(partner))
    if region.labels(op.result) is None and is_weight(partner) and labels.size == labels.shape[summed]:
        region.choose(op, [_READS])
        region.weight(op, partner, _turned(labels, rank, rank + (-2, -1)[index]), reads=True)
        return
    if region.chosen(op) not in (None, index):
        raise UnfollowedError(f"{called(op)} both reads and makes what is scaled")
    region.choose(op, [index])
    region.scale(op.result, _padded(region.channels.tied(labels, [labels.ndim + summed]), op.result))


def _scale_factor(region: Scaling, op: MatmulOp) -> None:
    """The product is scaled: so is the factor whose channels are those of the product."""
    labels = region.labels(op.result)
    assert labels is not None
    index = region.choose(op, [1, 0])
    labels = region.channels.tied(labels, [labels.ndim + (-1, -2)[index]])
    give(region, op, op.operands[index], region.channels.unbroadcast(labels, shape_of(op.operands[index])))


def _attention(region: Scaling, op: AttentionOp) -> None:
    """Channels of the value are channels of the result, in every head of its group."""
    values = [value for value in (op.value, op.wide_value) if value is not None]
    require_unscaled(region, op, [v for v in op.operands if v not in values])
    heads, groups = shape_of(op.query)[1], shape_of(op.value)[1]
    if UNKNOWN in (heads, groups) or any(value in (op.query, op.key, op.wide_key) for value in values):
        raise UnfollowedError(f"{called(op)} has no heads of its own for its value")

    def backward(labels: Labels) -> Labels:
        labels = widened(region.channels.only(labels, [1, 3]), 1, heads)
        shared = labels.reshape(1, groups, heads // groups, 1, labels.shape[3])
        return region.channels.tied(shared, [2]).squeeze(2)

    def forward(labels: Labels) -> Labels:
        return widened(region.channels.only(labels, [1, 3]), 1, groups).repeat(heads // groups, 1)

    if (labels := region.labels(op.result)) is not None and region.labels(op.value) is None:
        region.scale(op.value, backward(labels))
    if (labels := region.labels(op.value)) is not None:
        region.scale(op.result, forward(labels))


POOLED = (MaxPoolOp, WindowPoolOp, AveragePoolOp, MeanOp)

RULES: dict[type[Operation], Callable[[Scaling, Any], None]] = {
    **dict.fromkeys((CastOp, ConvertOp, ReluOp, NegOp, ClampOp, AtenOp), _alike),
    **MOVEMENT_RULES,
    **dict.fromkeys((MaxPoolOp, WindowPoolOp, AveragePoolOp), _pooled),
    **dict.fromkeys((MeanOp, SumOp), _reduced),
    **dict.fromkeys((AddOp, SubOp), _sum),
    **dict.fromkeys((RMSNormOp, LayerNormOp), _norm),
    **dict.fromkeys((BatchNormOp, GroupNormOp), _channel_norm),
    **dict.fromkeys((LinearOp, ExpertLinearOp), _linear),
    MulOp: _product,
    DivOp: _quotient,
    ConvOp: _conv,
    MatmulOp: _matmul,
    AttentionOp: _attention,
}
"""How each kind of operation agrees; no other kind lets a scale pass."""
