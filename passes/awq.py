"""`awq`: weights scaled up where their inputs are large, so that rounding loses less of the output (AWQ)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Attribute
from xdsl.passes import ModulePass

from ..backends.kernels.fake_quantization import prepare, switched_off
from ..dialects.errors import UsageError
from ..dialects.formats import BlockType, Rounding, is_wide, quantize
from ._block_errors import BlockError
from ._channels import Labels
from ._columns import columns_of, from_end, matrix
from ._context import note, weights_of
from ._folding import Fold, Place
from ._given import laid_out, rounding_of, set_given, wide_weight
from ._scale_search import search_scales
from ._scaled_parameters import Parameters
from ._sites import Site, root, sites_of
from ._smoothing import Group, groups_of, report, require_some
from ._statistics import Statistics, forget, statistics_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore


@dataclass(frozen=True)
class Awq(ModulePass):
    """Multiply a weight's column c by s_c = mean|X_c|^alpha, and divide input channel c by it.

    Lin et al. 2023, AWQ, arXiv 2306.00978, section 3.2. s is divided by sqrt(max s · min s). For each group of
    contractions that read one value alpha is that of 0, 1/`grid`, ... 1 with the least squared error of their outputs,
    their weights rounded as their casts round and their inputs as they are: the trace of D H D^T, D the error of a
    weight and H = 2 X^T X / n. At alpha 0 nothing changes, so the error never grows. 1/s is folded as in `smooth`; a
    group where it cannot be is left as it is, and the report says why. A channel without values keeps s = 1.
    `clip` then chooses the scale of every block of the matched weights as `clip{metric=hessian}` does, for the inputs
    as they are by then (section 3.2 of the paper clips groups of weights by the same error). `match` names modules as
    in `quantize`; a group goes with any of its modules. The weights keep the function that they have in float.
    Raises UsageError where no weight has a format, or no group can be scaled.
    """

    name = "awq"

    match: str = "*"
    grid: int = 20
    clip: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= 1000:
            raise UsageError(
                f"awq: grid is the number of steps of alpha, a whole number from 1 to 1000, got {self.grid}"
            )

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        groups = groups_of(op, self.match)
        if not any(_narrow(group.sites) for group in groups):
            raise UsageError(
                "awq: no weight has a format yet, whose error scales are chosen by: it stands after `quantize`"
            )
        reasons = [(group, _refusal(group)) for group in groups]
        chosen = [(group, fold) for group, why in reasons if why is None and (fold := group.fold) is not None]
        left = [(group, why) for group, why in reasons if why is not None]
        require_some(self.name, chosen, left)
        statistics = statistics_of(ctx, op, self.name, "ranges", "hessian")
        parameters, done = Parameters(op, weights, "scaled"), list[str]()
        factors: dict[Site, np.ndarray] = {}
        for group, fold in chosen:
            found = best_scale(fold, weights, statistics, self.grid)
            parameters.apply(fold, found.scale)
            factors |= {site: fold.channels.spread(found.scale, labels) for site, labels in fold.inputs}
            done.append(
                f"{group}: 1/s into {fold.into}, alpha {found.alpha:g}, error {found.share:.1%} of that without"
            )
        report(ctx, self.name, done, left)
        if self.clip:
            note(ctx, f"{self.name}: {_clip(groups, factors, weights, statistics)}")
        forget(ctx)


@dataclass(frozen=True)
class Scaled:
    """The best scale of a group, [channels] f64, its alpha, and the mean squared error of outputs for each alpha."""

    scale: np.ndarray
    alpha: float
    errors: dict[float, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The error as a part of that with alpha 0."""
        return self.errors[self.alpha] / self.errors[0.0] if self.errors[0.0] else 1.0


def best_scale(fold: Fold, weights: WeightStore, statistics: Statistics, grid: int) -> Scaled:
    """The scale with the least error of a group's outputs; where several have it, that of the smallest alpha."""
    magnitudes = _magnitudes(fold, statistics)
    rounded = [_Rounded.of(place, weights, statistics) for place in fold.readers if _weight_site(place)]
    outputs = sum(each.outputs for each in rounded)
    best = Scaled(np.ones(fold.channels.count), 0.0)
    for step in range(grid + 1):
        alpha = step / grid
        scale = scale_at(magnitudes, alpha)
        error = sum(each.error(fold, scale) for each in rounded) / outputs
        best.errors[alpha] = error
        if error < best.errors[best.alpha]:
            best = Scaled(scale, alpha, best.errors)
    return best


def scale_at(magnitudes: np.ndarray, alpha: float) -> np.ndarray:
    """mean|X_c|^alpha over the square root of its largest times its smallest, [channels]; 1 where the mean is 0."""
    alive = magnitudes > 0
    if not alive.any():
        return np.ones_like(magnitudes)
    logarithms = alpha * np.log(magnitudes[alive])
    scale = np.ones_like(magnitudes)
    scale[alive] = np.exp(logarithms - (logarithms.max() + logarithms.min()) / 2)
    return scale


def _magnitudes(fold: Fold, statistics: Statistics) -> np.ndarray:
    """mean|X_c| of each channel, over all that are scaled with it; 0 for one that cannot be scaled."""
    means = [(labels, statistics.inputs(site).mean_magnitude.numpy()) for site, labels in fold.inputs]
    counts = [(labels, np.ones(labels.size)) for labels, _ in means]
    channels = fold.channels
    found = channels.gathered(means, np.add) / np.maximum(channels.gathered(counts, np.add), 1)
    return np.where(channels.first(np.arange(channels.count)) == channels.fixed, 0.0, found)


@dataclass
class _Rounded:
    """One weight of a group, with what rounding it under another scale costs."""

    site: Site
    wide: Tensor
    labels: Labels
    hessian: Tensor

    @classmethod
    def of(cls, place: Place, weights: WeightStore, statistics: Statistics) -> _Rounded:
        site = _weight_site(place)
        assert site is not None
        hessian = statistics.hessian(site)
        parts = hessian if hessian.dim() == 3 else hessian[None]
        return cls(site, laid_out(root(place.value), weights), place.labels, parts)

    @property
    def outputs(self) -> int:
        return len(matrix(self.site, self.wide)) // len(self.hessian)

    def error(self, fold: Fold, scale: np.ndarray) -> float:
        """The squared error of the outputs, summed over them and averaged over rows of input."""
        import torch

        factors = torch.from_numpy(fold.channels.spread(scale, self.labels)).float()
        rounded = _quantized(self.wide * factors, self.site.format, rounding_of(self.site))
        rows = matrix(self.site, rounded.div_(factors).sub_(self.wide)).unflatten(0, (len(self.hessian), -1))
        return float((rows @ self.hessian).mul_(rows).sum(dtype=torch.float64)) / (2 * len(self.hessian))


def _quantized(x: Tensor, format: Attribute, how: Rounding) -> Tensor:
    """The bits of `formats.quantize`, by a kernel where there is one."""
    kernel = switched_off() or prepare(format, how, tuple(x.shape), x.dtype)
    return quantize(x, format, how) if isinstance(kernel, str) else kernel(x.contiguous(), None)


def _weight_site(place: Place) -> Site | None:
    """The weight at a place, if it is rounded."""
    for site in sites_of(place.operation):
        if site.role == "weight" and site.value is place.value and not is_wide(site.format):
            return site
    return None


def _narrow(sites: list[Site]) -> list[Site]:
    """The weights with formats that meet these activations."""
    found = (each for site in sites for each in sites_of(site.operation))
    return [each for each in found if each.role == "weight" and not is_wide(each.format)]


def _refusal(group: Group) -> str | None:
    return group.reason or (None if _narrow(group.sites) else "no weight there has a format")


def _clip(groups: list[Group], factors: dict[Site, np.ndarray], weights: WeightStore, statistics: Statistics) -> str:
    """Choose the scales of all blocks anew, for inputs divided by `factors`; a line about it."""
    done, kept = 0, list[str]()
    for site, inputs in _clippable(groups):
        format = site.format
        hessian = statistics.hessian(site)
        if not isinstance(format, BlockType) or hessian.dim() != 2:
            kept.append(site.name)
            continue
        error = BlockError(
            format, hessian=_divided(hessian, factors.get(inputs)), columns=columns_of(site), reduced=from_end(site)
        )
        try:
            found = search_scales(wide_weight(site, weights), format, rounding_of(site), error)
        except UsageError:
            kept.append(site.name)
            continue
        set_given(site, weights, found.encoded)
        done += 1
    line = f"the scales of {done} weights are those of least error"
    return f"{line}; kept as their rule has them: {', '.join(kept)}" if kept else line


def _clippable(groups: list[Group]) -> Iterator[tuple[Site, Site]]:
    """Each rounded weight of the groups once, and the input that it meets."""
    seen = set[object]()
    for activation in (site for group in groups for site in group.sites):
        for site in _narrow([activation]):
            if site.value not in seen:
                seen.add(site.value)
                yield site, activation


def _divided(hessian: Tensor, factors: np.ndarray | None) -> Tensor:
    """H of inputs that are divided by the factors of their channels, which a convolution's window has side by side."""
    import torch

    if factors is None:
        return hessian
    inverse = torch.from_numpy(1.0 / factors).repeat_interleave(len(hessian) // len(factors))
    return (hessian.double() * inverse[:, None] * inverse).float()
