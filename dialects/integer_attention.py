"""Attention as dataflow hardware computes it: two products that sum into windows, a softmax in integers between."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import integer
from .integer import LONGEST, Point
from .integer_meanings import Pair, codes_on

if TYPE_CHECKING:
    from torch import Tensor

Sum = tuple[int, int, int]
"""A window's width and lowest bit, and the length of the segments of the sum."""

WEIGHTS: Pair = (24, 22)
"""The format of the softmax's result, before it is rounded into that of the probabilities."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding: Tensor | None,
    scale: float,
    causal: bool,
    seen: int | None,
    bits: int,
    scores: Pair,
    probabilities: str,
    scale_rule: str | None,
    rounding: str,
    products: tuple[Sum, Sum],
) -> Tensor:
    """query [B, H, Q, D], key [B, G, K, D], value [B, G, K, Dv], padding [B, K] bool -> [B, H, Q, Dv] f64.

    Scores are rounded into their format before they are scaled; the softmax is rounded into `WEIGHTS`, then into
    `probabilities`. A row that sees nothing (all of it is padding) sees its own position, so that it has a sum.
    """
    import torch

    from . import formats
    from .errors import MxloomError
    from .mx import parse_type
    from .windows import windowed

    batch, heads, rows, width = query.shape
    groups, columns = key.shape[1], key.shape[2]
    if columns > LONGEST:
        raise MxloomError(f"attention in integers sees {LONGEST} positions at most, got {columns}")
    shared = heads // groups * rows
    found = windowed(query.reshape(batch, groups, shared, width), key.transpose(-1, -2), None, *products[0])
    found = found.reshape(batch, heads, rows, columns)
    broken = found.isnan().any(-1, keepdim=True)
    rounded = integer.saturated(codes_on(found, scores[1]), scores[0])
    keep = _seen(rows, columns, causal, seen, padding, query)
    weights = integer.softmax(rounded, Point(*scores), Point(*WEIGHTS), bits, scale, keep)
    values = (weights.to(torch.float64) * 2.0 ** -WEIGHTS[1]).masked_fill(broken, torch.nan)
    how = formats.Rounding(scale_rule=scale_rule, rounding=rounding)
    narrow = formats.quantize(values, parse_type(probabilities), how).reshape(batch, groups, shared, columns)
    return windowed(narrow, value, None, *products[1]).reshape(batch, heads, rows, value.shape[-1])


def _seen(
    rows: int, columns: int, causal: bool, seen: int | None, padding: Tensor | None, like: Tensor
) -> Tensor | None:
    import torch

    from .torch_operators import visible

    keep = visible(rows, columns, causal, seen, None if padding is None else padding.to(torch.bool), like.device)
    if keep is None or padding is None:
        return keep
    own = torch.arange(rows, device=like.device)[:, None] + (columns - rows)
    alone = ~keep.any(-1, keepdim=True)
    return keep | (alone & (torch.arange(columns, device=like.device)[None] == own))
