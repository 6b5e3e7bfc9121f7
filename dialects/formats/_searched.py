"""Scale rules that try several scales for a block and keep the one under which its squared error is least."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import f8E8M0FNU, f32

from ..errors import UsageError
from ._element import Fixed
from ._format import Rounding
from ._scale import (
    divided,
    finite,
    minifloat_of_scale,
    power_of_two_bytes,
    powers_of_two,
    scale_dtype,
    store_scale,
    tensor_scale,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ._scaled import Scales, Scaling

FOUR_OVER_SIX = (1.0, 1.5)
"""arXiv 2512.02010: the largest magnitude becomes 6, or 4 under a scale that is larger by a half."""

N_OVER_SIX = tuple(1 + step / 16 for step in range(9))
"""The same family in nine steps from 1 to 1.5."""

SWEPT_CODES = range(-11, 9)
"""Codes of an 8-bit float scale around the one of the largest magnitude: 0.4 to 2 times it and more."""

SWEPT_EXPONENTS = (0, -1, 1)
SWEPT_PARTS = tuple(1 - step / 20 for step in range(11))
SMALLEST_KEPT = 3.5
"""arXiv 2603.08713: largest magnitudes below so many scales, of an element that reaches 6, get the scale halved."""


def searched_scales(blocks: Tensor, scaling: Scaling, how: Rounding, rule: str, over: Tensor | None) -> Scales:
    """The scales of split blocks by a rule that searches; the first of equally good ones."""
    import torch

    from ._scaled import Scales

    if scaling.scale == f8E8M0FNU and rule == "outlier-aware":
        return Scales(_outlier_aware(_largest(blocks, scaling), scaling).view(torch.float8_e8m0fnu))
    best = least = None
    for scales in _candidates(blocks, scaling, rule, over):
        error = _errors(blocks, scales, scaling, how)
        if best is None or least is None:
            best, least = scales, error
            continue
        better = (error < least).reshape(scaling.tiling.grid)
        bits = [each.stored.view(torch.uint8) if each.stored.element_size() == 1 else each.stored
                for each in (scales, best)]  # fmt: skip
        best = Scales(torch.where(better, *bits).view(best.stored.dtype), best.tensor)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _candidates(blocks: Tensor, scaling: Scaling, rule: str, over: Tensor | None) -> Iterator[Scales]:
    import torch

    from ._scaled import Scales

    element, largest = scaling.element, _largest(blocks, scaling)
    if scaling.scale == f8E8M0FNU:
        codes = power_of_two_bytes(largest, element, "even" if not isinstance(element, Fixed) else "floor")
        for offset in SWEPT_EXPONENTS:
            moved = (codes.int() + offset).clamp_(0, 254).masked_fill_(codes == 255, 255)
            yield Scales(moved.to(torch.uint8).view(torch.float8_e8m0fnu))
        return
    largest = finite(largest)
    if not scaling.two_levels:
        for part in SWEPT_PARTS:
            yield Scales(store_scale(divided(part * largest.to(torch.float64), element.largest), scaling.scale))
        return
    steps = {"four-over-six": FOUR_OVER_SIX, "n-over-six": N_OVER_SIX}.get(rule)
    if over is None:
        overall = largest.max() if largest.numel() else largest.new_zeros(())
        over = _with_room(overall, scaling) if steps else tensor_scale(overall, element, scaling.scale)
    quotients = (divided(largest, element.largest) / over.to(largest.dtype)).to(torch.float64)
    if steps:
        for step in steps:
            yield Scales(store_scale(step * quotients, scaling.scale), over)
        return
    codes = store_scale(quotients, scaling.scale).view(torch.uint8).int()
    top = int(store_scale(torch.tensor(torch.inf, dtype=torch.float64), scaling.scale).view(torch.uint8))
    for offset in sorted(SWEPT_CODES, key=abs):
        yield Scales((codes + offset).clamp(1, top).to(torch.uint8).view(scale_dtype(scaling.scale)), over)


def _with_room(overall: Tensor, scaling: Scaling) -> Tensor:
    """The tensor's scale under which a block scale may still grow by half: amax / (6 x 256) for NVFP4."""
    import torch

    reach = minifloat_of_scale(scaling.scale).largest
    room = 2.0 ** (torch.tensor(reach / FOUR_OVER_SIX[-1]).log2().floor().item())
    return store_scale(divided(overall, scaling.element.largest * room).to(torch.float64), f32)


def _outlier_aware(largest: Tensor, scaling: Scaling) -> Tensor:
    """The smallest power of two that clips nothing, halved where the largest magnitude is below 3.5 of it."""
    import torch

    codes = power_of_two_bytes(largest, scaling.element, "rceil")
    scaled = finite(largest).to(torch.float64) / powers_of_two(codes, torch.float64)
    lower = (scaled < SMALLEST_KEPT * scaling.element.largest / 6) & (codes > 0) & (codes < 255)
    return (codes.int() - lower.int()).to(torch.uint8)


def _largest(blocks: Tensor, scaling: Scaling) -> Tensor:
    return blocks.abs().amax(scaling.tiling.axes).reshape(scaling.tiling.grid)


def _errors(blocks: Tensor, scales: Scales, scaling: Scaling, how: Rounding) -> Tensor:
    """The squared error of each block, summed in f64."""
    import torch

    from ._scaled import _divide

    tiling = scaling.tiling
    rounded = scaling.element.round(_divide(blocks, scales, tiling), how)
    off = rounded.mul_(tiling.spread(scales.factors(blocks.dtype))).sub_(blocks)
    return off.square_().sum(tiling.axes, dtype=torch.float64)


def rules_of(scaling_scale: object, two_levels: bool, affine: bool) -> tuple[str, ...]:
    """The rules of this file that fit a scale type."""
    if affine:
        return ()
    if scaling_scale == f8E8M0FNU:
        return ("outlier-aware", "sweep")
    return ("four-over-six", "n-over-six", "sweep") if two_levels else ("sweep",)


def refuse_clip(how: Rounding, rule: str) -> None:
    """Raise UsageError where a rule that searches is told to clip as well."""
    if how.clip is not None:
        raise UsageError(f"scale rule {rule!r} chooses how much it clips: leave clip out")
    if how.rounding == "stochastic":
        raise UsageError(f"scale rule {rule!r} compares errors, which stochastic rounding does not repeat: use rne")
