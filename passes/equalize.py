"""`equalize`: channels of two layers that follow each other brought to one range (cross-layer equalization)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation
from xdsl.passes import ModulePass

from ..dialects.operations._shapes import shape_of
from ..dialects.operations.contraction import Contraction
from ..dialects.operations.normalization import BatchNormOp
from ..dialects.operations.pointwise import AddOp, DivOp, MulOp
from ._channels import Labels
from ._context import weights_of
from ._folding import Fold, Place
from ._given import laid_out
from ._scale_rules import is_homogeneous
from ._scaled_parameters import Parameters
from ._sites import module_name, root
from ._smoothing import Group, groups_of, report, require_some
from ._statistics import forget

if TYPE_CHECKING:
    from ..backends.weight_store import WeightStore

SWEEPS = 200
"""How often all pairs are gone through, at most: a layer in the middle of two pairs needs many."""

CLOSE = 1e-7
"""Scales that all lie so near 1 end the sweeps."""


@dataclass(frozen=True)
class Equalize(ModulePass):
    """Bring output channel i of one layer and input channel i of the next to one largest weight, sqrt(r1_i r2_i).

    Nagel et al. 2019, Data-Free Quantization, arXiv 1906.04721, section 4.1, equation 11: W1's row i and the bias are
    divided by s_i = sqrt(r1_i r2_i) / r2_i, W2's column i is multiplied by it. It holds for two convolutions or linear
    layers (in groups, depthwise, several that read one value) with nothing between them but ReLU or another function
    with f(s x) = s f(x), a batch norm, pooling and reshapes; a batch norm's gain counts to the layer before it, and
    takes the scale. Pairs are gone through until nothing changes. No data is needed. A channel of zeros keeps s = 1.
    `match` names modules as in `quantize`, of which one must read the pair's value. Computed in float, the function
    stays the same. Raises UsageError where there is no such pair.
    """

    name = "equalize"

    match: str = "*"

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        pairs, left = list[_Pair](), list[tuple[Group, str]]()
        ranges = _Ranges(weights)
        for group in groups_of(op, self.match):
            pair = _pair(group, ranges)
            if isinstance(pair, _Pair):
                pairs.append(pair)
            else:
                left.append((group, pair))
        require_some(self.name, pairs, left)
        sweeps = _sweep(pairs)
        parameters, done = Parameters(op, weights, "equalized"), list[str]()
        for pair in pairs:
            parameters.apply(pair.fold, pair.scale)
            low, high = pair.scale.min(), pair.scale.max()
            done.append(f"{module_name(pair.maker.operation)} and {pair.group}: s from {low:.3g} to {high:.3g}")
        forget(ctx)
        report(ctx, self.name, [*done, f"{len(pairs)} pairs in {sweeps} sweeps"], left)


class _Ranges:
    """The largest magnitudes of weights, kernel positions apart, as scales change them; f64 in the weight's layout."""

    def __init__(self, weights: WeightStore) -> None:
        self.weights = weights
        self.held: dict[Operation, np.ndarray] = {}

    def of(self, place: Place) -> np.ndarray:
        """Those of the weight of a contraction, and 1 in place of each kernel dimension."""
        if place.operation not in self.held:
            wide = laid_out(root(place.value), self.weights).double().abs()
            kernel = tuple(range(2, wide.dim())) if place.operation.name == "mx.conv" else ()
            self.held[place.operation] = (wide.amax(kernel, keepdim=True) if kernel else wide).numpy()
        return self.held[place.operation]

    def largest(self, place: Place) -> tuple[Labels, np.ndarray]:
        """The place's labels, and the largest magnitudes along all other dimensions."""
        values = self.of(place)
        dims = tuple(dim for dim, size in enumerate(place.labels.shape) if size == 1)
        return place.labels, values.max(dims, keepdims=True)

    def multiply(self, place: Place, factors: np.ndarray) -> None:
        """The weight takes a scale."""
        self.held[place.operation] = self.of(place) * factors


@dataclass
class _Pair:
    """A layer, the ones that read what it makes, and the scale between them so far, [channels].

    `maker` is the first layer's weight; `gain` [channels] is what a batch norm behind it multiplies with, which then
    takes the scale in the weight's place.
    """

    group: Group
    fold: Fold
    ranges: _Ranges
    maker: Place
    gain: np.ndarray | None
    scale: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.scale = np.ones(self.fold.channels.count)

    def step(self) -> float:
        """Equalize once; the largest logarithm of a scale by which anything changed."""
        channels = self.fold.channels
        first = channels.gathered([self.ranges.largest(self.maker)], np.maximum)
        if self.gain is not None:
            first = first * self.gain
        second = channels.gathered(map(self.ranges.largest, self.fold.readers), np.maximum)
        alive = (first > 0) & (second > 0) & (channels.first(np.arange(channels.count)) != channels.fixed)
        scale = np.ones_like(first)
        scale[alive] = np.sqrt(first[alive] / second[alive])
        if self.gain is None:
            self.ranges.multiply(self.maker, channels.spread(1 / scale, self.maker.labels))
        else:
            self.gain = self.gain / scale
        for place in self.fold.readers:
            self.ranges.multiply(place, channels.spread(scale, place.labels))
        self.scale = self.scale * scale
        return float(np.abs(np.log(scale)).max())


def _sweep(pairs: list[_Pair]) -> int:
    """Equalize all pairs, until scales stay as they are; how many sweeps that took."""
    for sweep in range(1, SWEEPS + 1):
        if max(pair.step() for pair in pairs) < CLOSE:
            return sweep
    return SWEEPS


def _pair(group: Group, ranges: _Ranges) -> _Pair | str:
    """The group as the second layer of a pair, or why it is none."""
    if group.reason is not None or group.fold is None:
        return group.reason or "its scale cannot be folded"
    fold = group.fold
    between = [op for op in fold.crossed if not (is_homogeneous(op) or _by_a_number(op))]
    if between:
        return f"{module_name(between[0])} ({between[0].name}) lies between the layers"
    makers = [place for place in fold.makers if isinstance(place.operation, Contraction) and _is_weight(place)]
    norms = [place for place in fold.makers if isinstance(place.operation, BatchNormOp) and _is_weight(place)]
    others = {
        place.operation for place in fold.makers if not isinstance(place.operation, Contraction | BatchNormOp | AddOp)
    }
    if others or len(makers) + len(norms) != 1:
        return f"what it reads is made by {fold.into}, and no single layer"
    if makers:
        return _Pair(group, fold, ranges, makers[0], None)
    return _behind_norm(group, fold, ranges, norms[0])


def _by_a_number(op: Operation) -> bool:
    return isinstance(op, MulOp | DivOp) and op.other is None


def _is_weight(place: Place) -> bool:
    return place.value is getattr(place.operation, "weight", None)


def _behind_norm(group: Group, fold: Fold, ranges: _Ranges, norm: Place) -> _Pair | str:
    """A pair whose first layer has a batch norm behind it."""
    op = norm.operation
    assert isinstance(op, BatchNormOp)
    layer = root(op.input).owner
    if not isinstance(layer, Contraction) or op.weight is None or not hasattr(layer, "weight"):
        return f"{module_name(op)} normalizes what no layer makes"
    weight = list(layer.operands).index(layer.weight)  # pyright: ignore[reportAttributeAccessIssue]
    shape = [1] * len(shape_of(layer.operands[weight]))
    shape[1 if getattr(layer, "transposed", None) is not None else 0] = norm.labels.size
    labels = norm.labels.reshape(shape)
    maker = Place(layer, weight, labels, labels)
    gain = laid_out(root(op.weight), ranges.weights).double().abs()
    variance = laid_out(root(op.running_var), ranges.weights).double()
    spread = (gain / (variance + op.eps.value.data).sqrt()).numpy()
    return _Pair(group, fold, ranges, maker, fold.channels.gathered([(norm.labels, spread)], np.maximum))
