"""`clip`: the scale of every block of the weights, chosen for the least error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, NoneAttr, UnitAttr
from xdsl.passes import ModulePass

from ..dialects.errors import UsageError
from ..dialects.formats import BlockType, Encoded, MixedType, Rounding
from ..dialects.formats._builtin import numbers_of
from ..dialects.formats._format import Given
from ..dialects.instances import name_of
from ._activation_clips import clip_activations
from ._context import note, weights_of
from ._given import UNDECIDED, narrow_weights, rounding_of, set_given, wide_weight
from ._metrics import METRICS, error_of, statistics_for
from ._scale_search import Chosen, search_scales
from ._sites import Site, sites
from ._statistics import Statistics
from .quantize import matches, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore


@dataclass(frozen=True)
class Clip(ModulePass):
    """Choose the scale of every block, group, channel or tensor of the weights for the least `metric`.

    `mse`: the squared error; `fisher`: the squared error times the squared gradient of the loss, element by element
    (FGMP, arXiv 2504.14152, section 3.3, sensitivity-weighted clipping); `kl`: the same with labels that the model
    draws itself, which makes it the second-order change of the divergence from the float model; `output`: times the
    mean square of the input that the element meets; `hessian`: d^T H d with the block's part of H = 2 X^T X / n.

    Tried are all scales that an 8-bit float can store (126 for NVFP4), exponent offsets from -3 to 2 of power-of-two
    scales, parts from 0.3 to 1 of the largest magnitude for float scales of integers, and OCTAV's. A block keeps the
    scale of its rule where none is better. `shared`: weights that meet one input have one scale of the tensor
    (NVFP4), as kernels that fuse them need. With `role=activations` casts of activations make their scales for the part
    of the range, 1 to 0.4, that has the least error over the calibration inputs (`mse`, or `output`: by the squares of
    the weights that a channel meets), or for a `percentile` of the magnitudes. `match` is as in `quantize`.
    """

    name = "clip"

    metric: str = "mse"
    match: str = "*"
    shared: bool = False
    role: str = "weights"
    percentile: float | None = None

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"clip: unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        weights = weights_of(ctx, self.name)
        if self.role == "activations":
            self._activations(ctx, op, weights)
            return
        if self.role != "weights" or self.percentile is not None:
            raise UsageError(f"clip: role is weights or activations, got {self.role!r}" if self.role != "weights" else
                             "clip: percentile says how activations are clipped: give role=activations")  # fmt: skip
        chosen = scaled_weights(op, self.match, self.name)
        statistics = statistics_for(self.metric, ctx, op, self.name)
        factors = shared_scales(chosen, weights) if self.shared else {}
        changed = blocks = 0
        for site in chosen:
            found = clipped(site, weights, self.metric, statistics, factors.get(site.group))
            set_given(site, weights, all_low(site, found.encoded))
            if isinstance(site.format, MixedType):
                site.value.owner.attributes[UNDECIDED] = UnitAttr()  # pyright: ignore[reportAttributeAccessIssue]
            changed, blocks = changed + found.changed, blocks + found.errors.numel()
        note(ctx, f"clip{{metric={self.metric}}}: {changed} of {blocks} blocks in {len(chosen)} weights have another "
                  "scale than their rule's")  # fmt: skip

    def _activations(self, ctx: Context, op: ModuleOp, weights: WeightStore) -> None:
        if self.metric not in ("mse", "output") or self.shared:
            raise UsageError("clip: activations are clipped for metric=mse or output, or at a percentile, each alone")
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise UsageError(f"clip: a percentile lies above 0 and at most at 100, got {self.percentile}")
        rounded = [s for s in sites(op) if s.role == "activation" and isinstance(s.format, BlockType)]
        found = [s for s in rounded if matches(self.match, s.module)]
        if not found:
            hint = nearest(self.match, dict.fromkeys(s.module for s in rounded)) if rounded else ""
            raise UsageError(f"clip: {self.match!r} matches no activation that is rounded into blocks{hint}")
        note(ctx, clip_activations(ctx, op, found, weights, self.metric, self.percentile))


def scaled_weights(module: ModuleOp, match: str, name: str) -> list[Site]:
    """The matched weights whose format has scales; UsageError where there is none."""
    narrow = narrow_weights(module)
    found = [s for s in narrow if matches(match, s.module) and isinstance(s.format, BlockType | MixedType)]
    if not found:
        if not narrow:
            raise UsageError(f"{name}: no weight has a format with scales yet: it stands after `quantize`")
        raise UsageError(f"{name}: {match!r} matches no weight with scales{nearest(match, [s.module for s in narrow])}")
    return found


def clipped(
    site: Site, weights: WeightStore, metric: str, statistics: Statistics | None, over: Tensor | None = None
) -> Chosen:
    """A weight under the best scales. Raises UsageError where its values are gone or its format has none to choose."""
    wide, how = wide_weight(site, weights), rounding_of(site)
    format = cast("BlockType | MixedType", site.format)
    if isinstance(format, MixedType):
        how = format.roundings(replace(how, threshold=None))[0][1]
        format = format.low_block
    error = error_of(site, format, metric, statistics)
    try:
        return search_scales(wide, format, how, error, over)
    except UsageError as problem:
        raise UsageError(f"clip: {site.name} in {name_of(format)}: {problem}") from None


def all_low(site: Site, encoded: Encoded) -> Encoded:
    """The encoding of a weight; of one in a mixed format with every block low, until `mix` chooses."""
    import torch

    mixed = site.format
    if not isinstance(mixed, MixedType):
        return encoded
    low = encoded.parts
    high = numbers_of(mixed.high).encode(encoded.decode(), mixed.roundings(Rounding())[1][1], Given())
    choice = torch.zeros(mixed.low_block.tiling(encoded.shape).grid, dtype=torch.uint8)
    return Encoded.of(mixed, mixed.joined(low, high, choice))


def shared_scales(sites: list[Site], weights: WeightStore) -> dict[str, Tensor]:
    """The scale over the block scales of each group of weights that meet one input: that of the largest of them."""
    import torch

    found: dict[str, Tensor] = {}
    for site in sites:
        format = site.format
        if isinstance(format, BlockType) and format.tensor_scale != NoneAttr():
            wide = wide_weight(site, weights)
            own = format.encode(wide, rounding_of(site), Given()).global_scale
            assert own is not None
            found[site.group] = own if site.group not in found else torch.maximum(found[site.group], own)
    return found
