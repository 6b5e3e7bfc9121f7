"""`smooth`: outliers of activations moved into weights, channel by channel (SmoothQuant)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..dialects.errors import UsageError
from ._context import weights_of
from ._folding import Fold
from ._scaled_parameters import Parameters, largest_weights
from ._sites import sites
from ._smoothing import Group, groups_of, report, require_some, scale_at_run_time
from ._statistics import Statistics, forget, statistics_of


@dataclass(frozen=True)
class Smooth(ModulePass):
    """Divide input channel j by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), and multiply its weights by it.

    Xiao et al. 2022, SmoothQuant, arXiv 2211.10438, equation 4. Contractions that read one value share s: max|W_j| is
    over all their weights. 1/s is folded into what makes the value: a norm's weight and bias, the rows of a linear or a
    convolution, those of `up` in up * act(gate), of attention's value; where heads share a value, s is one for them all
    (by the largest magnitudes among them). Where nothing can take it, `online` multiplies at run time, before the value
    is rounded; else the group is left as it is, and the report says why. `power_of_two` rounds s to the nearest power
    of two, which changes no bit of block formats but their scales. A channel without values or weights keeps s = 1.
    `match` names modules as in `quantize`; a group goes with any of its modules. Where formats are given already,
    groups of which nothing is rounded are left out. Computed in float, the function stays the same.
    Raises UsageError where no group can be smoothed.
    """

    name = "smooth"

    match: str = "*"
    alpha: float = 0.5
    online: bool = False
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"smooth: alpha is a number from 0 to 1, got {self.alpha}")

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        groups = groups_of(op, self.match)
        typed = any(not site.is_wide for site in sites(op))
        reasons = [(group, self._refusal(group, typed)) for group in groups]
        chosen = [(group, fold) for group, why in reasons if why is None and (fold := group.fold) is not None]
        left = [(group, why) for group, why in reasons if why is not None]
        require_some(self.name, chosen, left)
        statistics = statistics_of(ctx, op, self.name, "ranges")
        parameters, done = Parameters(op, weights, "smoothed"), list[str]()
        for group, fold in sorted(
            chosen, key=lambda pair: pair[0].reason is not None
        ):  # products last: folds are found
            scale = self._scale(fold, statistics, parameters)
            if group.reason is None:
                parameters.apply(fold, scale)
            else:
                scale_at_run_time(group, scale, parameters)
            into = fold.into or "a product at run time"
            done.append(f"{group}: 1/s into {into}, s from {scale.min():.3g} to {scale.max():.3g}")
        forget(ctx)
        report(ctx, self.name, done, left)

    def _refusal(self, group: Group, typed: bool) -> str | None:
        """Why a group is left as it is; None where it is smoothed. `typed`: some operand of the module is rounded."""
        if typed and not group.is_narrow:
            return "nothing there is rounded"
        if group.reason is None or (self.online and group.fold is not None):
            return None
        return group.reason if group.fold is None else f"{group.reason}; online=true scales it at run time"

    def _scale(self, fold: Fold, statistics: Statistics, parameters: Parameters) -> np.ndarray:
        """s of each channel, [channels], f64."""
        largest = [(labels, statistics.inputs(site).largest.numpy()) for site, labels in fold.inputs]
        return smoothing(
            fold.channels.gathered(largest, np.maximum),
            fold.channels.gathered(largest_weights(fold.readers, parameters.weights), np.maximum),
            self.alpha,
            power_of_two=self.power_of_two,
        )


def smoothing(values: np.ndarray, weights: np.ndarray, alpha: float, *, power_of_two: bool = False) -> np.ndarray:
    """max|X_j|^alpha / max|W_j|^(1 - alpha) of the largest magnitudes of channels, [channels]; 1 where one is 0.

    SmoothQuant, arXiv 2211.10438, equation 4.
    """
    alive = (values > 0) & (weights > 0)
    x, w = np.where(alive, values, 1.0), np.where(alive, weights, 1.0)
    scale = x**alpha / w ** (1 - alpha)
    scale = np.exp2(np.round(np.log2(scale))) if power_of_two else scale
    return np.where(alive, scale, 1.0)
