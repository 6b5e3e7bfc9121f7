"""The errors of candidate scales in torch's operations: the definition that the kernel is held to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.dialects.builtin import f8E8M0FNU

from ...dialects.formats import Rounding
from ...dialects.formats._element import Fixed
from ...dialects.formats._rounding import round_to_integers
from ...dialects.formats._scale import finite, power_of_two_bytes, powers_of_two, store_scale
from ...dialects.formats._scaled import Scaling, _affine
from ...dialects.formats._tiling import Tiling

if TYPE_CHECKING:
    from torch import Tensor

    from .block_function import BlockFunction
    from .error_function import Candidates


def errors_by_torch(
    blocks: Tensor, numbers: BlockFunction, candidates: Tensor, kind: Candidates, weights: Tensor | None, over: float
) -> Tensor:
    """blocks [n, size] f32, candidates [c] f64, weights as blocks or None -> [n, c] f64."""
    import torch

    wide = blocks.to(torch.float64)
    factors = None if weights is None else weights.to(torch.float64)
    columns = []
    for candidate in candidates:
        rounded = _rounded(blocks, numbers, candidate, kind, over).to(torch.float64)
        off = (wide - rounded).square()
        terms = off if factors is None else off * factors
        total = torch.zeros_like(terms[:, 0])
        for place in range(terms.shape[1]):
            total = total + terms[:, place]
        columns.append(total)
    return torch.stack(columns, -1)


def _rounded(blocks: Tensor, numbers: BlockFunction, candidate: Tensor, kind: Candidates, over: float) -> Tensor:
    """The blocks rounded under one candidate."""
    import torch

    how, element = Rounding(rounding=numbers.rounding), numbers.element
    top = torch.finfo(torch.float32).max
    if numbers.zero_points:
        assert isinstance(element, Fixed)
        assert numbers.scale is not None
        scaling = Scaling(Tiling(tuple(blocks.shape), (blocks.shape[1],)), element, numbers.scale, False, True)
        clipped = Rounding(clip=candidate.item())
        scales = _affine(scaling.tiling.split(blocks), scaling, clipped)
        assert scales.zeros is not None
        zeros = scales.zeros.to(torch.float32)
        factor = scales.stored.to(torch.float32)
        bounded = (blocks / factor).clamp(element.bottom_code - zeros, element.top_code - zeros)
        return (round_to_integers(bounded, how).add_(0.0) * factor).clamp(-top, top)
    factor = _factors(blocks.abs().amax(-1, keepdim=True), numbers, candidate.to(torch.float32), kind, over)
    if numbers.scale == f8E8M0FNU:
        scaled = blocks * (1.0 / factor)
    else:
        scaled = blocks / factor.masked_fill(factor == 0, torch.inf)
    return (element.round(scaled, how) * factor).clamp(-top, top)


def _factors(largest: Tensor, numbers: BlockFunction, candidate: Tensor, kind: Candidates, over: float) -> Tensor:
    """The f32 scale of each block, that of the tensor included."""
    import torch

    assert numbers.scale is not None
    level = torch.tensor(over, dtype=torch.float32)
    if kind == "scales":
        scale = candidate.expand(largest.shape)
        return scale * level if numbers.tensor_scale else scale
    clipped = largest * candidate if kind == "clips" else largest
    if numbers.scale == f8E8M0FNU:
        own = powers_of_two(power_of_two_bytes(clipped, numbers.element, numbers.rule), torch.float32)
        return own if kind == "clips" else (own * candidate).clamp(2.0**-127, 2.0**127)
    bounded = finite(clipped)
    if numbers.tensor_scale:
        stored = store_scale((bounded / numbers.element.largest / level).to(torch.float64), numbers.scale)
        return stored.to(torch.float32) * level
    return store_scale(bounded.to(torch.float64) / numbers.element.largest, numbers.scale).to(torch.float32)
