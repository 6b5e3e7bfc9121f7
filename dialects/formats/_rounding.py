"""Rounding of a tensor to integers, in place: the four modes, each exact."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ._format import Rounding


def round_to_integers(values: Tensor, how: Rounding) -> Tensor:
    """Round `values` to integers in place and return them; zeros keep the sign of what they came from.

    rne: nearest, ties to even. rna: nearest, ties away from zero (by the exact remainder, so that the float below one
    half does not round up). rtz: towards zero. stochastic: up with the probability of the remainder, from `how.seed`;
    the noise is made on the CPU so that every device rounds alike.
    """
    match how.rounding:
        case "rne":
            return values.round_()
        case "rtz":
            return values.trunc_()
        case "rna":
            whole = values.trunc()
            return whole.add_((values - whole).mul_(2).trunc_()).copysign_(values)
    whole = values.floor()
    return whole.add_(_noise(values, how.seed) < values - whole).copysign_(values)


def _noise(like: Tensor, seed: int) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator, dtype=like.dtype).to(like.device)
