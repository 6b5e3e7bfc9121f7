"""The best of many scales for every block of a tensor, in a stated error; the scale of the rule is always among them.

Candidates follow from the format: every scale that an 8-bit float can store (NVFP4: the 126 of E4M3), multiples of a
power-of-two scale (MX: exponent offsets), parts of the largest magnitude (integers under float scales), and for these
the scale that OCTAV finds (arXiv 2206.06501, equation 6).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import NoneAttr, f8E8M0FNU

from ..backends.kernels.clip_errors import candidate_errors, stored_scales
from ..dialects.errors import UsageError
from ..dialects.formats import BlockType, Encoded, Rounding
from ..dialects.formats._element import Fixed, Trit
from ..dialects.formats._format import Given
from ..dialects.formats._scale import minifloat_of_scale, store_scale
from ._block_errors import BlockError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from ..backends.kernels.error_function import Candidates

RATIOS = 50
"""Parts of the largest magnitude that are tried are whole multiples of 1 / RATIOS, from SMALLEST to 1."""

SMALLEST = 0.3
OFFSETS = range(-3, 3)
"""Exponent offsets of power-of-two scales that are tried."""

CHUNK = 1 << 22
"""Candidate errors that are in memory at once."""


@dataclass(frozen=True)
class Chosen:
    """Codes under the best scales; the error of each block [grid], f64, and what it was under the scale of the rule."""

    encoded: Encoded
    errors: Tensor
    unclipped: Tensor

    @property
    def changed(self) -> int:
        """How many blocks have another scale than the rule's."""
        return int((self.errors < self.unclipped).sum())


def search_scales(
    x: Tensor, fmt: BlockType, how: Rounding, error: BlockError, global_scale: Tensor | None = None
) -> Chosen:
    """The codes of `x` [...] f32 under the scales with the least error, block by block.

    `global_scale`: the f32 scale over the block scales, where several tensors share one; None for the tensor's own.
    Where no candidate is better than the scale of the rule, that one stays: no block's error ever grows. UsageError for
    a format without scales to choose.
    """
    import torch

    base = _by_rule(x, fmt, how, global_scale)
    unclipped = error.of(x, base.decode())
    best, errors = base, unclipped
    for other in _alternatives(x, fmt, how, error, base):
        found = error.of(x, other.decode())
        better = found < errors
        best = _merged(x, fmt, how, better, other, best)
        errors = torch.where(better, found, errors)
    return Chosen(best, errors, unclipped)


def encoded_with(x: Tensor, fmt: BlockType, how: Rounding, given: Given) -> Encoded:
    """The codes of `x` under given scales; integers keep the range that they have without."""
    return Encoded.of(fmt, fmt.encode(x, how, given))


def _by_rule(x: Tensor, fmt: BlockType, how: Rounding, global_scale: Tensor | None) -> Encoded:
    return encoded_with(x, fmt, how, Given(global_scale=global_scale))


def _given(encoded: Encoded, **changed: Tensor) -> Given:
    parts = {"scales": encoded.scales, "global_scale": encoded.global_scale, "zero_points": encoded.zero_points}
    return Given(**{**parts, **changed}, symmetric=True)


def _merged(x: Tensor, fmt: BlockType, how: Rounding, better: Tensor, new: Encoded, old: Encoded) -> Encoded:
    """The blocks of `new` where it is better, those of `old` elsewhere."""
    import torch

    changed = {}
    for part in ("scales", "zero_points"):
        mine, other = getattr(new, part), getattr(old, part)
        if mine is not None:
            bits = [t.view(torch.uint8) if t.element_size() == 1 else t for t in (mine, other)]
            changed[part] = torch.where(better, *bits).view(mine.dtype)
    return encoded_with(x, fmt, how, _given(old, **changed))


def _alternatives(x: Tensor, fmt: BlockType, how: Rounding, error: BlockError, base: Encoded) -> Iterator[Encoded]:
    """Encodings of the whole tensor to choose from, block by block."""
    element = fmt.scaling((1,) * len(fmt.dims)).element
    if error.is_diagonal:
        yield _best_by_kernel(x, fmt, how, error, base)
    else:
        yield from _every(x, fmt, how, base)
    affine = fmt.zero != NoneAttr()
    if isinstance(element, Fixed) and not isinstance(element, Trit) and fmt.scale != f8E8M0FNU and not affine:
        yield _octav(x, fmt, how, element, base)


def candidates_of(fmt: BlockType, how: Rounding) -> tuple[Candidates, Tensor]:
    """What is tried: `scales` as stored, `multiples` of powers of two, or `clips` of the largest magnitude."""
    import torch

    if fmt.scale == f8E8M0FNU:
        return "multiples", torch.tensor([2.0**offset for offset in OFFSETS])
    if fmt.zero == NoneAttr() and minifloat_of_scale(fmt.scale).bits <= 8:
        return "scales", stored_scales(fmt)
    if fmt.rule(how) == "absmean":
        raise UsageError(f"{fmt} takes its scale from the mean magnitude: there is nothing to clip")
    steps = torch.arange(round(SMALLEST * RATIOS), RATIOS + 1, dtype=torch.float64)
    return "clips", (steps / RATIOS).float()


def _best_by_kernel(x: Tensor, fmt: BlockType, how: Rounding, error: BlockError, base: Encoded) -> Encoded:
    """The encoding under the candidates of least weighted squared error."""
    import torch

    kind, candidates = candidates_of(fmt, how)
    over = None if base.global_scale is None else float(base.global_scale)
    rows = _rows(x, fmt, len(candidates))
    factors = None if error.weights is None else error.weights.expand(x.shape)
    indices = []
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        own = None if factors is None else factors[part].contiguous()
        found = candidate_errors(
            x[part],
            fmt,
            candidates,
            kind,
            how=how,
            weights=own,
            global_scale=over,
        )
        indices.append(found.argmin(-1))
    index = torch.cat(indices) if len(indices) > 1 else indices[0]
    return _under(x, fmt, how, kind, candidates, index, base)


def _rows(x: Tensor, fmt: BlockType, candidates: int) -> int:
    """How many rows of the first dimension are tried at once; all where blocks reach across rows."""
    if len(fmt.dims) >= x.dim() and fmt.dims[-x.dim()] != 1:
        return max(x.shape[0], 1)
    blocks = fmt.tiling(x.shape[1:]).grid if len(fmt.dims) < x.dim() else fmt.tiling(x.shape).grid[1:]
    count = 1
    for size in blocks:
        count *= size
    return max(1, CHUNK // max(1, count * candidates))


def _under(
    x: Tensor, fmt: BlockType, how: Rounding, kind: Candidates, candidates: Tensor, index: Tensor, base: Encoded
) -> Encoded:
    """The encoding in which each block has the candidate that `index` [grid] names."""
    import torch

    assert base.scales is not None
    if kind == "scales":
        return encoded_with(x, fmt, how, _given(base, scales=candidates[index]))
    if kind == "multiples":
        offset = torch.tensor([round(float(c.log2())) for c in candidates])[index]
        moved = (base.scales.view(torch.uint8).int() + offset).clamp(0, 254)
        return encoded_with(x, fmt, how, _given(base, scales=moved.to(torch.uint8).view(torch.float8_e8m0fnu)))
    best = base
    for place in index.unique().tolist():
        clipped = encoded_with(x, fmt, _clip(how, float(candidates[place])), Given())
        best = _merged(x, fmt, how, index == place, clipped, best)
    return best


def _clip(how: Rounding, ratio: float) -> Rounding:
    return Rounding(how.scale_rule, how.rounding, None if ratio == 1 else ratio, how.seed)


def _every(x: Tensor, fmt: BlockType, how: Rounding, base: Encoded) -> Iterator[Encoded]:
    """The encoding under each candidate, the same for all blocks."""
    import torch

    kind, candidates = candidates_of(fmt, how)
    assert base.scales is not None
    for place in range(len(candidates)):
        yield _under(x, fmt, how, kind, candidates, torch.full(tuple(base.scales.shape), place), base)


OCTAV_STEPS = 20


def _octav(x: Tensor, fmt: BlockType, how: Rounding, element: Fixed, base: Encoded) -> Encoded:
    """The encoding under the clips that Newton's iteration finds.

    s <- E[|x| 1{|x| > s}] / (4^-b / 3 E[1{0 < |x| <= s}] + E[1{|x| > s}]), b bits (arXiv 2206.06501, equation 6).
    """
    import torch

    tiling = fmt.tiling(x.shape)
    blocks = tiling.split(x.abs().to(torch.float64))
    grid, axes = tiling.grid, tiling.axes
    clip = blocks.sum(axes) / (blocks > 0).sum(axes).clamp(min=1)
    noise = 4.0**-element.width / 3
    for _ in range(OCTAV_STEPS):
        above = blocks > tiling.spread(clip)
        inside = ((blocks > 0) & ~above).sum(axes)
        found = (blocks * above).sum(axes) / (noise * inside + above.sum(axes))
        clip = torch.where(found.isfinite() & (found > 0), found, clip)
    over = 1.0 if base.global_scale is None else base.global_scale.double()
    scales = store_scale((clip / element.largest / over).reshape(grid), fmt.scale)
    return encoded_with(x, fmt, how, _given(base, scales=scales))
