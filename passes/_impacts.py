"""What blocks of activations cost in their low format, over calibration inputs, and the thresholds that follow."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from xdsl.context import Context
from xdsl.dialects.builtin import FloatAttr, ModuleOp, StringAttr, TensorType, f32
from xdsl.ir import SSAValue
from xdsl.rewriter import InsertPoint, Rewriter

from ..dialects.errors import UsageError
from ..dialects.formats import MixedType, block_impact
from ..dialects.operations._operation import Operation
from ..dialects.operations._values import hint_of
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ._bare import bare
from ._columns import matrix
from ._context import weights_of
from ._given import parameter_under, wide_weight
from ._observed import plan_of
from ._quantile import StreamingQuantile
from ._samples import Sample
from ._sites import Site, root, sites_of
from ._statistics import Statistics, sequences_of
from ._sweep import Sweep

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore

NEVER = 1e30
"""The sensitivity of a channel whose blocks are high whatever they hold."""


@dataclass(frozen=True)
class Thresholds:
    """How the blocks of activations are chosen: see `mix`."""

    metric: str
    share: float
    scope: str
    seed: int


def activation_thresholds(
    ctx: Context, module: ModuleOp, chosen: Sequence[Site], how: Thresholds, statistics: Statistics | None
) -> str:
    """Give the casts of some activations their sensitivities and thresholds; says what was chosen.

    The blocks are those of the values that no cast has rounded, over the calibration inputs.
    """
    weights = weights_of(ctx, "mix")
    casts = _casts(chosen)
    for cast_op, site in casts.items():
        _give_sensitivity(cast_op, site, weights, _sensitivity(site, how, weights, statistics))
    samples = sequences_of(ctx, module, "mix")
    every, alone = _observed(module, weights, samples, casts)
    common = every.at(how.share)
    for cast_op in casts:
        limit = common if how.scope == "global" else alone[cast_op].at(how.share)
        cast_op.properties["threshold"] = FloatAttr(limit, 64)
    return (
        f"mix{{metric={how.metric}}}: {len(casts)} activations choose their blocks at run time; threshold {common:.4g} "
        f"from {every.count} blocks of {len(samples)} inputs"
    )


def _casts(chosen: Sequence[Site]) -> dict[CastOp, Site]:
    """The cast of each activation, once, with a site that reads it."""
    found: dict[CastOp, Site] = {}
    for site in chosen:
        owner = site.value.owner
        if not isinstance(owner, CastOp):
            raise UsageError(f"mix: {site.name} is computed in a mixed format; a cast chooses its blocks")
        found.setdefault(owner, site)
    return found


def _sensitivity(site: Site, how: Thresholds, weights: WeightStore, statistics: Statistics | None) -> Tensor | None:
    """g^2 of each channel, [K] f32; None for 1."""
    import torch

    if how.metric == "mse":
        return None
    if how.metric == "random":
        return _random(site, how)
    if how.metric == "output":
        return weights_met(site, weights)
    assert statistics is not None
    found = statistics.fisher(site)
    if found.numel() == 1:
        raise UsageError(f"mix: {site.name} has channels of no stated number, and so no sensitivity for each")
    return found.to(torch.float32)


def _random(site: Site, how: Thresholds) -> Tensor:
    """Blocks of channels that are always high, drawn once: whatever values they hold."""
    import torch

    mixed = cast(MixedType, site.format)
    size = max(mixed.low_block.dims)
    channels = site.shape[-1]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{how.seed} {site.name}".encode()))
    blocks = -(-channels // size)
    high = torch.randperm(blocks, generator=generator) < round((1 - how.share) * blocks)
    return (high.float() * NEVER).repeat_interleave(size)[:channels]


def weights_met(site: Site, weights: WeightStore) -> Tensor:
    """The squares of the weights that each channel is multiplied with, of all operations that read the value."""
    import torch

    total: Tensor | None = None
    for use in root(site.value).uses:
        readers = [use.operation]
        if isinstance(use.operation, CastOp):
            readers = [u.operation for u in use.operation.result.uses]
        for reader in readers:
            for other in sites_of(reader):
                if other.role == "weight":
                    squares = matrix(other, wide_weight(other, weights)).square().sum(0)
                    total = squares if total is None else total + squares
    if total is None:
        raise UsageError(f"mix: {site.name} meets no weight, so metric=output says nothing of it")
    return total.to(torch.float32)


def _give_sensitivity(op: CastOp, site: Site, weights: WeightStore, found: Tensor | None) -> None:
    """Let the cast read its channels' sensitivities, laid out along its channels."""
    if found is None:
        return
    weight = next((s for s in sites_of(site.operation) if s.role == "weight"), None)
    if weight is None:
        raise UsageError(f"mix: {site.name} meets no weight")
    rank, shape = len(site.shape), [1] * len(site.shape)
    shape[cast("Any", site)._reduced()[0] % rank] = found.numel()
    name = f"{parameter_under(weight.value).source.data}.input_sensitivity"
    while name in weights:
        name += ".again"
    weights.put(name, found.reshape(shape).contiguous())
    made = ParameterOp.build(result_types=[TensorType(f32, shape)], properties={"source": StringAttr(name)})
    made.result.name_hint = hint_of(name)
    Rewriter.insert_op(made, InsertPoint.before(op))
    op.operands = [op.input, made.result]


class _Impacts(Sweep):
    """Runs the module and weighs the blocks of the values that some casts read."""

    def __init__(self, module: ModuleOp, weights: WeightStore, read: dict[Operation, list[tuple[Any, SSAValue]]]):
        super().__init__(plan_of(module), weights, frozenset(), None)
        self._read = read

    def _observe(self, op: Operation, values: Any, sample: Sample, sums: Any) -> None:
        for weigh, value in self._read.get(op, ()):
            weigh(self._value(value, values), sample)


def _observed(
    module: ModuleOp, weights: WeightStore, samples: Sequence[Sample], casts: dict[CastOp, Site]
) -> tuple[StreamingQuantile, dict[CastOp, StreamingQuantile]]:
    """The impacts of all blocks, and of those of each cast."""
    run, twins = bare(module, weights)
    every, alone = StreamingQuantile(), {op: StreamingQuantile() for op in casts}
    read: dict[Operation, list[tuple[Any, SSAValue]]] = {}
    for op, site in casts.items():
        twin = cast(Operation, twins[site.operation])
        value = root(getattr(twin, site.operand))
        read.setdefault(twin, []).append((_weighing(op, weights, every, alone[op]), value))
    sweep = _Impacts(run, weights, read)
    sweep.shard(samples, 0)
    return every, alone


def _weighing(op: CastOp, weights: WeightStore, every: StreamingQuantile, alone: StreamingQuantile) -> Any:
    mixed = cast(MixedType, op.result.type.element_type)
    owner = op.sensitivity.owner if op.sensitivity is not None else None
    sensitivity = weights.wide(owner.source.data) if isinstance(owner, ParameterOp) else None

    def weigh(value: Tensor, sample: Sample) -> None:
        found = block_impact(value, mixed, sensitivity, op.how())
        if sample.mask is not None:
            rows = sample.rows(value.shape[:-1], "a mixed activation")
            assert rows is not None
            found = found.reshape(len(rows), -1)[rows]
        every.add(found)
        alone.add(found)

    return weigh
