"""What every block of a tensor loses under each of many scales, for the search of clips and scales."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import lru_cache
from math import isfinite, prod
from typing import TYPE_CHECKING, get_args

from ...dialects.errors import UsageError
from ...dialects.formats import BlockType, Rounding
from ...dialects.formats._scale import minifloat_of_scale
from . import native
from ._error_definition import errors_by_torch
from ._layout import block_numbers
from ._prepared import tensor_scale
from ._team import team_size
from ._values import values_on_cpu
from .block_function import BlockFunction, element_function, measure_function
from .error_function import Candidates, candidate_scale_function, error_function
from .errors_kernel import errors_kernel

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.dialects.builtin import ModuleOp

MEASURED = 8
"""Values measured at once; blocks are filled with zeros to a multiple of it."""


def candidate_errors(
    x: Tensor,
    fmt: BlockType,
    candidates: Tensor,
    kind: Candidates = "clips",
    *,
    how: Rounding | None = None,
    weights: Tensor | None = None,
    global_scale: float | None = None,
) -> Tensor:
    """The squared error of each block under each candidate: [..., blocks, candidates], f64, in the shape of the grid.

    x: f32, bf16 or f16 on a CPU. candidates [n]: for `clips` parts of the largest magnitude that the block's scale is
    made for by the rule of `how` (of both ends, where blocks have zero points); for `scales` what a block stores as its
    scale; for `multiples` powers of two by which the block's own power-of-two scale is multiplied, within 2^-127 to
    2^127. weights: broadcasts to `x`, f32, one factor for each squared error; None for 1. global_scale: the f32 scale
    of the tensor, None for the one that rounding would make of `x`.

    error = sum of weight x (value - rounding)^2 in f64, over the block's values in their order, each step rounded to
    nearest. The element is the one that rounding without given scales uses: symmetric for integers without a zero
    point. Raises UsageError for what means nothing for the format.
    """
    import torch

    how = how or Rounding()
    numbers = _numbers(fmt, how, candidates, kind)
    values = values_on_cpu("x", x)
    tiling = fmt.tiling(x.shape)
    source = tiling.stream(values).contiguous()
    size = source.numel() // max(1, prod(tiling.grid))
    if not source.numel():
        return torch.zeros((*tiling.grid, candidates.numel()), dtype=torch.float64)
    over = 1.0
    if numbers.tensor_scale:
        over = tensor_scale(source, numbers, team_size(source.numel())) if global_scale is None else global_scale
    blocks = source.view(-1, size)
    own = None if weights is None else tiling.stream(_factors(weights, x)).reshape(-1, size)
    wide = candidates.detach().to(torch.float64)
    if native.why_not() is None:
        found = _by_kernel(blocks, numbers, wide, kind, own, over)
    else:
        found = errors_by_torch(blocks, numbers, wide, kind, own, over)
    return found.reshape(*tiling.grid, candidates.numel())


def _factors(weights: Tensor, x: Tensor) -> Tensor:
    """The weights in the shape of `x`."""
    factors = values_on_cpu("weights", weights)
    try:
        return factors.expand(x.shape)
    except RuntimeError:
        raise UsageError(f"weights of shape {list(factors.shape)} do not broadcast to {list(x.shape)}") from None


def stored_scales(fmt: BlockType) -> Tensor:
    """All positive finite scales that a block can store, ascending, f32: 126 of f8E4M3FN, 255 of f8E8M0FNU.

    Raises UsageError where they are too many to be tried (more than 8 bits).
    """
    import torch

    if fmt.default_scale_rule in ("floor", "even"):
        return torch.exp2(torch.arange(-127, 128, dtype=torch.float64)).to(torch.float32)
    kind = minifloat_of_scale(fmt.scale)
    if kind.bits > 8:
        raise UsageError(f"scales in {fmt.scale} are too many to be tried one by one: use clips")
    values = kind.values(torch.arange(1 << (kind.bits - 1), dtype=torch.int32), torch.float32)
    return values[values.isfinite() & (values > 0)].sort().values


def _numbers(fmt: BlockType, how: Rounding, candidates: Tensor, kind: Candidates) -> BlockFunction:
    """The numbers of the format, or why candidates of this kind mean nothing for it."""
    import torch

    if kind not in get_args(Candidates):
        raise UsageError(f"kind is one of {', '.join(get_args(Candidates))}, got {kind!r}")
    if not isinstance(candidates, torch.Tensor) or not candidates.is_cpu or not candidates.is_floating_point():
        raise UsageError("candidates are a row of floats on the CPU: make them with torch.tensor([...])")
    if candidates.dim() != 1 or not candidates.numel():
        raise UsageError(f"candidates are one row of numbers, got {list(candidates.shape)}")
    if not all(isfinite(value) and value > 0 for value in (candidates.min().item(), candidates.max().item())):
        raise UsageError("candidates are positive and finite")
    if how.clip is not None or how.threshold is not None or how.rounding == "stochastic":
        raise UsageError("errors of candidates are those of one deterministic rounding: leave clip and threshold out")
    numbers = block_numbers(fmt, how)
    if isinstance(numbers, str):
        raise UsageError(f"no errors of candidates: {numbers}")
    power = numbers.rule in ("floor", "ceil", "even", "rceil")
    if numbers.zero_points and kind != "clips":
        raise UsageError(f"{fmt} has zero points, which follow from clips alone")
    if numbers.rule == "absmean" and kind != "scales":
        raise UsageError(f"{fmt} has mean magnitudes as scales: try scales, not {kind}")
    if kind == "multiples" and not power:
        raise UsageError(f"{fmt} has no power-of-two scales to be multiplied")
    if kind == "clips" and candidates.max().item() > 1:
        raise UsageError("a clip is the part of the largest magnitude that is kept, in (0, 1]")
    if (kind == "multiples" or (power and kind == "scales")) and not _powers_of_two(candidates):
        raise UsageError(f"{kind} of {fmt} are powers of two")
    return numbers


def _powers_of_two(candidates: Tensor) -> bool:
    import torch

    fraction, _ = torch.frexp(candidates.to(torch.float64))
    return bool((fraction == 0.5).all())


def _by_kernel(
    blocks: Tensor, numbers: BlockFunction, candidates: Tensor, kind: Candidates, weights: Tensor | None, over: float
) -> Tensor:
    import torch

    rows, size = blocks.shape
    padding = -size % MEASURED
    if padding:
        blocks = torch.nn.functional.pad(blocks, (0, padding))
    if weights is None:
        weights = torch.ones_like(blocks)
    elif padding:
        weights = torch.nn.functional.pad(weights, (0, padding))
    count = candidates.numel()
    lanes = 8 if count <= 8 else 16
    row = torch.ones(count + -count % lanes, dtype=torch.float64, device="cpu")
    row[:count] = candidates
    errors = torch.empty((rows, row.numel()), dtype=torch.float64, device="cpu")
    weights = weights.contiguous()
    places = (ctypes.c_void_p * 3)(row.data_ptr(), weights.data_ptr(), errors.data_ptr())
    kernel = _kernel(replace(numbers, lanes=lanes), kind)
    kernel(
        blocks.data_ptr(),
        ctypes.addressof(places),
        rows,
        given=row.numel(),
        over=over,
        length=size + padding,
        threads=min(team_size(blocks.numel() * count), rows),
    )
    return errors[:, :count]


@lru_cache(maxsize=1024)
def _kernel(numbers: BlockFunction, kind: Candidates) -> native.Kernel:
    def make() -> ModuleOp:
        return errors_kernel(
            measure_function(replace(numbers, lanes=MEASURED)),
            numbers.reductions,
            candidate_scale_function(numbers, kind),
            element_function(numbers),
            error_function(numbers.lanes),
            numbers.lanes,
        )

    return native.Kernel(f"errors of {kind} {numbers}", make)
