"""Scales that follow from means and ranges of many values, from the statistics of a tensor."""

from __future__ import annotations

from struct import pack, unpack
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import f32

from ...dialects.formats import Rounding
from ...dialects.formats._element import Fixed
from ...dialects.formats._scale import store_scale
from ...dialects.formats._scaled import Scaling, _affine, _mean
from ...dialects.formats._tiling import Tiling
from .block_function import LARGEST
from .statistics import PIECE, block_statistics, tensor_statistics

if TYPE_CHECKING:
    from torch import Tensor

    from ._layout import Layout
    from .block_function import BlockFunction


def range_scale(source: Tensor, numbers: BlockFunction) -> tuple[float, float]:
    """Scale and zero point of a tensor that is one block: the definition's, of its two extremes."""
    import torch

    assert numbers.scale is not None
    pieces = block_statistics(source.view(-1), PIECE)
    low, high = pieces.minimum.amin().item(), pieces.maximum.amax().item()
    if numbers.scale == f32 and low == low and high == high:
        return _range_scale(low, high, numbers)
    extremes = torch.tensor([low, high], dtype=torch.float32, device="cpu")
    scaling = Scaling(Tiling((2,), (2,)), numbers.element, numbers.scale, two_levels=False, zero_points=True)
    scales = _affine(scaling.tiling.split(extremes), scaling, Rounding(clip=numbers.clip))
    assert scales.zeros is not None
    return scales.stored.item(), float(scales.zeros.item())


def _range_scale(low: float, high: float, numbers: BlockFunction) -> tuple[float, float]:
    """The same for an f32 scale in Python's floats, which are f64 as the definition's are, and take less time."""
    element, clip = numbers.element, 1.0 if numbers.clip is None else numbers.clip
    assert isinstance(element, Fixed)
    low, high = min(max(low, -LARGEST), 0.0) * clip, max(min(high, LARGEST), 0.0) * clip
    scale = _stored((high - low) / (element.top_code - element.bottom_code))
    zero = min(max(round(element.bottom_code - low / scale), element.bottom_code), element.top_code)
    return scale, float(zero) if high != low else 0.0


def _stored(quotient: float) -> float:
    """An f64 that is not negative as an f32 scale: never 0 and never infinite; 1 for a block of zeros."""
    nearest = unpack("<f", pack("<f", min(quotient, LARGEST)))[0]
    return max(nearest, 2.0**-149) if quotient else 1.0


def whole_mean_scale(source: Tensor, layout: Layout) -> float:
    """The scale of a tensor that is one block, its mean magnitude."""
    length = layout.size + layout.padding
    total = block_statistics(source.view(-1), PIECE).sum_of_magnitudes.sum().item()
    if layout.function.scale == f32 and layout.own and total == total:
        doubt = 2.5 * (length + 2) * 2.0**-53
        low, high = (_stored(total * (1 + sign * doubt) / layout.own) for sign in (-1, 1))
        if low == high:
            return low
    return mean_scales(source, layout).item()


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
