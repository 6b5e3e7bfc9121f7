"""GPTQ: columns are rounded one after another, and what each loses is made up for by those that follow.

Optimal brain surgeon on the layer's output error (Frantar et al., arXiv 2210.17323, section 3): with U the upper
Cholesky factor of H^-1, e = (w_i - q_i) / U_ii, and W[:, i:] -= e U[i, i:]; H = 2 X^T X / n + damping x mean(diag) x I.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..dialects.errors import MxloomError

if TYPE_CHECKING:
    from torch import Tensor

Round = Callable[["Tensor", int], "Tensor"]
"""Rounds column `place` of a matrix: values [N] -> values [N]."""

LAZY = 128
"""Columns after which the rest of the matrix is brought up to date."""


@dataclass(frozen=True, eq=False)
class Surgeon:
    """The inverse Hessian's factor in the order in which columns are rounded.

    `order` [K] names the columns in turn, those that no input reaches last; `factor` [K, K] is U in that order.
    """

    order: Tensor
    factor: Tensor
    live: int

    @classmethod
    def of(cls, hessian: Tensor, damping: float, *, by_activation: bool = False) -> Surgeon:
        """Of H [K, K]. `by_activation` rounds the columns of the largest diagonal first (act-order).

        Columns that no input reaches (a zero diagonal) neither give nor take, and count in no mean. MxloomError where
        H is not positive definite after damping.
        """
        import torch

        wide = hessian.to(torch.float64)
        diagonal = wide.diagonal()
        if not bool(diagonal.isfinite().all()):
            raise MxloomError("its Hessian holds NaN or infinity")
        live = diagonal > 0
        order = torch.argsort(diagonal if by_activation else live.int(), descending=True, stable=True)
        count = int(live.sum())
        kept = order[:count]
        own = wide[kept][:, kept]
        own = own + damping * own.diagonal().mean() * torch.eye(count, dtype=torch.float64)
        factor = torch.zeros_like(wide)
        factor[:count, :count] = _inverse_factor(own)
        factor[range(count, len(wide)), range(count, len(wide))] = 1.0
        return cls(order, factor.to(torch.float32), count)

    def rounded(self, matrix: Tensor, round: Round, enter: Callable[[Tensor, int], None] | None = None) -> Tensor:
        """The rounded matrix [N, K] of one [N, K] f32.

        `enter` is told before a column is rounded what the matrix is by then, [K, N] with columns as rows, up to date
        for the columns of the same lazy block, so that scales can follow it.
        """
        import torch

        columns = matrix.T[self.order].contiguous()
        places, found = self.order.tolist(), torch.empty_like(columns)
        for start in range(0, len(columns), LAZY):
            end = min(start + LAZY, len(columns))
            errors = torch.empty_like(columns[start:end])
            diagonal = self.factor[range(start, end), range(start, end)].tolist()
            for place in range(start, end):
                if enter is not None:
                    enter(columns, place)
                now = columns[place]
                found[place] = round(now, places[place])
                errors[place - start] = (now - found[place]) / diagonal[place - start]
                columns[place:end].addr_(self.factor[place, place:end], errors[place - start], alpha=-1.0)
            columns[end:].addmm_(self.factor[start:end, end:].T, errors, alpha=-1.0)
        back = torch.empty_like(found)
        back[self.order] = found
        return back.T.contiguous()


def retargeted(matrix: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """The weights whose outputs for the module's own inputs Y are nearest to W X: W (C + d) (H + d)^-1, [N, K] f32.

    C = 2 X^T Y / n and H = 2 Y^T Y / n, [K, K]; d is `damping` times the mean of H's diagonal, and draws to W.
    """
    import torch

    own, other = hessian.to(torch.float64), cross.to(torch.float64)
    live = own.diagonal() > 0
    kept = live.nonzero()[:, 0]
    own, other = own[kept][:, kept], other[kept][:, kept]
    ridge = damping * own.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    lower, failed = torch.linalg.cholesky_ex(own + ridge)
    if int(failed):
        raise MxloomError("its Hessian is singular: too few calibration samples; give more, or a larger damping")
    found = matrix.to(torch.float64).clone()
    found[:, kept] = torch.cholesky_solve((found[:, kept] @ (other + ridge)).T, lower).T
    return found.to(torch.float32)


def output_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """d H d^T of each row of a difference [N, K]: twice the mean square of what the row's output loses. [N] f64."""
    import torch

    wide = difference.to(torch.float64)
    return ((wide @ hessian.to(torch.float64)) * wide).sum(-1)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """U with U^T U = H^-1, upper triangular, f64."""
    import torch

    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        raise MxloomError(
            f"its Hessian is singular in column {int(failed)} of {len(hessian)}: too few calibration samples; give more"
            ", or a larger damping"
        )
    inverse = torch.cholesky_inverse(lower)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    if int(failed):
        raise MxloomError("its inverse Hessian cannot be factored in f64: give more samples, or a larger damping")
    return upper
