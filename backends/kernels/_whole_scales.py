"""Scales that follow from means and ranges of many values, from the statistics of a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...dialects.formats import Rounding
from ...dialects.formats._scale import store_scale
from ...dialects.formats._scaled import Scaling, _affine, _mean
from ...dialects.formats._tiling import Tiling
from .statistics import block_statistics, tensor_statistics

if TYPE_CHECKING:
    from torch import Tensor

    from ._layout import Layout
    from .block_function import BlockFunction


def range_scale(source: Tensor, numbers: BlockFunction) -> tuple[float, float]:
    """Scale and zero point of a tensor that is one block: the definition's, of its two extremes."""
    import torch

    assert numbers.scale is not None
    found = tensor_statistics(source)
    extremes = torch.stack([found.minimum, found.maximum])
    scaling = Scaling(Tiling((2,), (2,)), numbers.element, numbers.scale, two_levels=False, zero_points=True)
    scales = _affine(scaling.tiling.split(extremes), scaling, Rounding(clip=numbers.clip))
    assert scales.zeros is not None
    return scales.stored.item(), float(scales.zeros.item())


def mean_scales(source: Tensor, layout: Layout) -> Tensor:
    """One f32 scale per block, its mean magnitude in the scale's type; source: the blocks in order, zeros behind each.

    The definition adds in an order of torch's, which nothing states. Sums of n numbers that are not negative lie within
    2 n 2^-53 of each other whatever their order (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2),
    so scales are certain where both ends of that range round alike; else the definition itself adds.
    """
    import torch

    scale = layout.function.scale
    assert scale is not None
    length = layout.size + layout.padding
    if source.numel() == length:
        sums = tensor_statistics(source).sum_of_magnitudes.reshape(1)
    else:
        sums = block_statistics(source.view(-1, length)).sum_of_magnitudes.reshape(-1)
    own = torch.tensor(layout.own, dtype=torch.float64, device="cpu") if layout.own else _own(layout)
    doubt = 2.5 * (length + 2) * 2.0**-53
    low, high = (store_scale(sums * (1 + sign * doubt) / own, scale).to(torch.float32) for sign in (-1, 1))
    if torch.equal(low.nan_to_num(nan=-1.0), high.nan_to_num(nan=-1.0)):
        return low
    return _by_definition(source, layout)


def _own(layout: Layout) -> Tensor:
    """How many values each block has that are no padding."""
    import torch

    assert layout.tiling is not None
    ones = torch.ones(layout.tiling.shape, dtype=torch.float64, device="cpu")
    return layout.tiling.split(ones).sum(layout.tiling.axes).reshape(-1)


def _by_definition(source: Tensor, layout: Layout) -> Tensor:
    import torch

    assert layout.function.scale is not None
    tiling = layout.tiling
    if tiling is None:
        tiling = Tiling((source.numel() // layout.size, layout.size), (layout.size,))
        split = tiling.split(source.reshape(tiling.shape))
    else:
        stream = source.reshape(-1, layout.size + layout.padding)[:, : layout.size]
        split = tiling.split(tiling.unstream(stream.reshape(-1)))
    scaling = Scaling(tiling, layout.function.element, layout.function.scale, two_levels=False, zero_points=False)
    return store_scale(_mean(split.abs(), scaling).reshape(-1), layout.function.scale).to(torch.float32)
