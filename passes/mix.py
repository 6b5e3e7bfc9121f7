"""`mix`: which blocks of a mixed format are kept in its high format, by what keeping them low would cost the loss."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..dialects.errors import UsageError, did_you_mean
from ..dialects.formats import Encoded, MixedType, Rounding
from ..dialects.formats._builtin import numbers_of
from ..dialects.formats._format import Given
from ..dialects.operations.cast import CastOp
from ..dialects.operations.parameter import ParameterOp
from ._context import note, weights_of
from ._given import UNDECIDED, given_encoding, narrow_weights, rounding_of, set_given, wide_weight
from ._impacts import Thresholds, activation_thresholds
from ._metrics import error_of, importance, statistics_for
from ._quantile import StreamingQuantile
from ._scale_search import search_scales
from ._sites import Site, sites
from ._statistics import Statistics
from .quantize import matches

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore

POLICIES = ("fisher", "kl", "mse", "output", "random")
SCOPES = ("global", "tensor")


@dataclass(frozen=True)
class Mix(ModulePass):
    """Keep `share` of the blocks of every mixed format low: those whose excess error costs least (arXiv 2504.14152).

    The impact of a block is the sum of g^2 (Q_low - Q_high)^2 (section 3.1). `metric` gives g^2: `fisher`, the squared
    gradient of the loss, of each weight, and of each input channel for activations; `kl`, the same with labels that the
    model draws; `output`, the mean square of the input that a weight meets, or the squares of the weights that a
    channel meets; `mse`, 1; `random` leaves the choice to a seed. One `threshold` for all weights and one for all
    activations (`global`), or one for each (`tensor`). `activation_share` is `share` where it is left out.

    With `clip` the low scales of the weights are chosen first, for the least error in the same metric (section 3.3);
    scales that the pass `clip` has chosen stay. Weights become encoded; activations choose their blocks at run time, by
    the threshold and the sensitivity of each channel that their casts then have.
    """

    name = "mix"

    share: float = 0.7
    activation_share: float | None = None
    metric: str = "fisher"
    threshold: str = "global"
    clip: bool = True
    seed: int = 0
    match: str = "*"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        self._check()
        weights = weights_of(ctx, self.name)
        mixed = [s for s in sites(op) if isinstance(s.format, MixedType) and matches(self.match, s.module)]
        if not mixed:
            raise UsageError(
                f"mix: {self.match!r} matches no operand of a mixed format: give one to `quantize` before, "
                "such as weights=fgmp"
            )
        statistics = statistics_for(self.metric, ctx, op, self.name)
        values = {site.value for site in mixed}
        own = [s for s in narrow_weights(op) if s.value in values]
        if own:
            self._weights(ctx, own, weights, statistics)
        others = [s for s in mixed if s.role == "activation"]
        if others:
            share = self.share if self.activation_share is None else self.activation_share
            found = activation_thresholds(ctx, op, others, Thresholds(self.metric, share, self.threshold, self.seed),
                                          statistics)  # fmt: skip
            note(ctx, found)

    def _check(self) -> None:
        if self.metric not in POLICIES:
            hint = did_you_mean(self.metric, POLICIES)
            raise UsageError(f"mix: unknown metric {self.metric!r}{hint}; known: {', '.join(POLICIES)}")
        if self.threshold not in SCOPES:
            raise UsageError(f"mix: threshold is {' or '.join(SCOPES)}, got {self.threshold!r}")
        for name, share in (("share", self.share), ("activation_share", self.activation_share)):
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"mix: {name} is the part of the blocks that is kept low, from 0 to 1, got {share}")

    def _weights(self, ctx: Context, own: Sequence[Site], weights: WeightStore, statistics: Statistics | None) -> None:
        every, impacts, scales = StreamingQuantile(), [], list[Given]()
        for site in own:
            given = self._low_scales(site, weights, statistics)
            impact = self._impact(site, weights, given, statistics)
            every.add(impact)
            impacts.append(impact)
            scales.append(given)
        common = every.at(self.share)
        high = blocks = 0
        for site, impact, given in zip(own, impacts, scales, strict=True):
            limit = common
            if self.threshold == "tensor":
                alone = StreamingQuantile()
                alone.add(impact)
                limit = alone.at(self.share)
            choice = impact > limit
            self._encode(site, weights, given, choice)
            high, blocks = high + int(choice.sum()), blocks + choice.numel()
        note(ctx, f"mix{{metric={self.metric}}}: {blocks - high} of {blocks} blocks of {len(own)} weights "
                  f"({(blocks - high) / blocks:.2%}) are low; threshold {common:.4g}")  # fmt: skip

    def _low_scales(self, site: Site, weights: WeightStore, statistics: Statistics | None) -> Given:
        """The scales of the low format."""
        given, mixed = given_encoding(site, weights), cast(MixedType, site.format)
        if given is not None and bool((given.choice != 0).any()):
            given = None  # blocks that are high already have no low scales: all are chosen anew
        if given is None and self.clip:
            metric = "mse" if self.metric == "random" else self.metric
            error = error_of(site, mixed.low_block, metric, statistics)
            low = search_scales(wide_weight(site, weights), mixed.low_block, _low(mixed, rounding_of(site)), error)
            given = low.encoded
        if given is None:
            return Given(symmetric=True)
        return Given(given.scales, given.global_scale, given.zero_points, symmetric=True)

    def _impact(self, site: Site, weights: WeightStore, given: Given, statistics: Statistics | None) -> Tensor:
        """What each block costs in the low format, f32 [grid of blocks]."""
        import torch

        mixed, wide, how = cast(MixedType, site.format), wide_weight(site, weights), rounding_of(site)
        tiling = mixed.low_block.tiling(wide.shape)
        if self.metric == "random":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {site.name}".encode()))
            return torch.rand(tiling.grid, generator=generator)
        (low_format, low_how), (high_format, high_how) = mixed.roundings(how)
        low = numbers_of(low_format).encode(wide, low_how, given)
        off = numbers_of(low_format).decode(low, wide.dtype) - numbers_of(high_format).quantize(wide, high_how)
        off = off.square_()
        if statistics is not None:
            off = off * importance(site, self.metric, statistics)
        return tiling.split(off).sum(tiling.axes).reshape(tiling.grid)

    def _encode(self, site: Site, weights: WeightStore, given: Given, choice: Tensor) -> None:
        mixed = cast(MixedType, site.format)
        parts = {"scales": given.scales, "global_scale": given.global_scale, "zero_points": given.zero_points}
        found = mixed.encode(
            wide_weight(site, weights), _undecided(rounding_of(site)), Given(**parts, choice=choice, symmetric=True)
        )
        set_given(site, weights, Encoded.of(mixed, found))
        site.value.owner.attributes.pop(UNDECIDED, None)  # pyright: ignore[reportAttributeAccessIssue]


def _undecided(how: Rounding) -> Rounding:
    return Rounding(how.scale_rule, how.rounding, how.clip, how.seed)


def _low(mixed: MixedType, how: Rounding) -> Rounding:
    return mixed.roundings(_undecided(how))[0][1]


def undecided(module: ModuleOp) -> list[str]:
    """The mixed operands for whose blocks nothing says which format they have."""
    found: dict[str, None] = {}
    for site in sites(module):
        owner = None if site.is_probabilities else site.value.owner
        if not isinstance(site.format, MixedType):
            continue
        by_cast = isinstance(owner, CastOp) and owner.threshold is None
        if by_cast or (isinstance(owner, ParameterOp) and UNDECIDED in owner.attributes):
            found[site.name] = None
    return list(found)
