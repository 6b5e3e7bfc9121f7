"""`hqq`: scales and zero points of weights from the weights alone, robust to outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp, NoneAttr
from xdsl.passes import ModulePass

from ..dialects.errors import UsageError
from ..dialects.formats import BlockType, Encoded, Rounding, encode_tensor
from ..dialects.formats._element import Fixed
from ..dialects.formats._scale import store_scale
from ..dialects.formats._tiling import Tiling
from ._context import note, weights_of
from ._given import narrow_weights, rounding_of, set_given, wide_weight
from .quantize import matches, nearest

if TYPE_CHECKING:
    from torch import Tensor

KAPPA = 1.01
"""What beta is multiplied with after each iteration."""


@dataclass(frozen=True)
class Hqq(ModulePass):
    """Choose scale and zero point of each group of integers for the least sum of |w - s (q - z)|^p, without data.

    Half-quadratic quantization (Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
    equations 3 to 8), from the range's own scale and zero point: q = round(w / s + z), e = shrink(w - s (q - z)) with
    shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0), z = mean(q - (w - e) / s); beta grows by 1 % an iteration.
    There z is a real number; a format stores whole ones, and a real z that is rounded falls back on the old one. So s
    follows too, by the same problem's solution for it, sum of (w - e) (q - z) over sum of (q - z)^2; `scales=false`
    leaves it. Each group keeps the best of all iterations, with z rounded and s as stored; the range's own is among
    them. `match` chooses among the weights whose format has zero points; UsageError where none has.
    """

    name = "hqq"

    match: str = "*"
    p: float = 0.7
    beta: float = 10.0
    iterations: int = 20
    scales: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UsageError(f"hqq: p lies above 0 and is 1 at most, got {self.p}")
        if not self.beta > 0 or self.iterations < 1:
            raise UsageError(f"hqq: beta is above 0 and iterations 1 or more, got {self.beta} and {self.iterations}")

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        narrow = narrow_weights(op)
        affine = [s for s in narrow if isinstance(s.format, BlockType) and s.format.zero != NoneAttr()]
        if not affine:
            raise UsageError(
                "hqq has no effect: no weight has a format with zero points (int4_g128_affine and the like); "
                "it stands behind the rules that give formats"
            )
        chosen = [site for site in affine if matches(self.match, site.module)]
        if not chosen:
            near = nearest(self.match, [site.module for site in affine])
            raise UsageError(f"hqq: {self.match!r} matches no weight with zero points{near}")
        changed = groups = 0
        for site in chosen:
            fitted = self._fitted(wide_weight(site, weights), cast(BlockType, site.format), rounding_of(site))
            set_given(site, weights, fitted.encoded)
            changed, groups = changed + int(fitted.changed.sum()), groups + fitted.changed.numel()
        note(ctx, f"hqq: {changed} of {groups} groups in {len(chosen)} weights have another scale or zero point")

    def _fitted(self, wide: Tensor, format: BlockType, how: Rounding) -> _Fitted:
        """A weight under the best scales and zero points that are met."""
        import torch

        first = encode_tensor(wide, format, how)
        assert first.scales is not None
        assert first.zero_points is not None
        problem = _Problem.of(wide, format, self.p)
        best = [first.scales.float(), first.zero_points.float()]
        least = problem.error(*best)
        scales, zeros, beta = *best, self.beta
        for _ in range(self.iterations):
            scales, zeros = problem.step(scales, zeros, beta, fit_scales=self.scales)
            found = store_scale(scales.double(), format.scale).float(), problem.whole(zeros)
            error = problem.error(*found)
            better = error < least
            least = torch.where(better, error, least)
            best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
            beta *= KAPPA
        return _Fitted.of(wide, format, how, first, best, problem)


@dataclass(frozen=True)
class _Fitted:
    """Codes under the scales and zero points that were chosen, and which groups have others than before."""

    encoded: Encoded
    changed: Tensor

    @classmethod
    def of(
        cls, wide: Tensor, format: BlockType, how: Rounding, first: Encoded, best: list[Tensor], problem: _Problem
    ) -> _Fitted:
        """Of two encodings each group's better one, by what they decode to."""
        import torch

        assert first.scales is not None
        assert first.zero_points is not None
        scales, zeros = best[0].to(first.scales.dtype), best[1].to(first.zero_points.dtype)
        found = encode_tensor(wide, format, how, scales=scales, zero_points=zeros)
        better = problem.missed(found.decode()) < problem.missed(first.decode())
        scales = torch.where(better, scales, first.scales)
        zeros = torch.where(better, zeros, first.zero_points)
        return cls(encode_tensor(wide, format, how, scales=scales, zero_points=zeros), better)


@dataclass(frozen=True)
class _Problem:
    """The groups of a weight, split as blocks are; padding (`own` 0) counts for nothing."""

    blocks: Tensor
    own: Tensor
    tiling: Tiling
    lowest: int
    highest: int
    p: float

    @classmethod
    def of(cls, wide: Tensor, format: BlockType, p: float) -> _Problem:
        import torch

        tiling = format.tiling(wide.shape)
        element = format.scaling(wide.shape).element
        assert isinstance(element, Fixed)
        own = tiling.split(torch.ones(wide.shape))
        return cls(tiling.split(wide.float()), own, tiling, element.bottom_code, element.top_code, p)

    def step(self, scales: Tensor, zeros: Tensor, beta: float, *, fit_scales: bool) -> tuple[Tensor, Tensor]:
        """One iteration: new scales and (real) zero points."""
        import torch

        s, z = self.tiling.spread(scales), self.tiling.spread(zeros)
        codes = (self.blocks / s + z).round_().clamp_(self.lowest, self.highest)
        missing = self.blocks - s * (codes - z)
        size = missing.abs()
        kept = (size - size.pow(self.p - 1) / beta).clamp_(min=0).nan_to_num_(nan=0.0)
        wanted = self.blocks - kept.copysign_(missing)
        zeros = self._sum(codes - wanted / s) / self._sum(self.own)
        if not fit_scales:
            return scales, zeros
        steps = codes - self.tiling.spread(zeros)
        along, norm = self._sum(wanted * steps), self._sum(steps.square())
        return torch.where((along > 0) & (norm > 0), along / norm, scales), zeros

    def whole(self, zeros: Tensor) -> Tensor:
        """Zero points as they are stored."""
        return zeros.round().clamp_(self.lowest, self.highest)

    def error(self, scales: Tensor, zeros: Tensor) -> Tensor:
        """The sum of |error|^p of each group under scales and whole zero points."""
        s, z = self.tiling.spread(scales), self.tiling.spread(zeros)
        steps = (self.blocks / s).clamp_(self.lowest - z, self.highest - z).round_()
        return self._sum((self.blocks - s * steps).abs_().pow_(self.p))

    def missed(self, values: Tensor) -> Tensor:
        """The same for decoded values, in f64."""
        missing = self.blocks.double() - self.tiling.split(values).double()
        return self._sum(missing.abs_().pow_(self.p))

    def _sum(self, each: Tensor) -> Tensor:
        return (each * self.own).sum(self.tiling.axes).reshape(self.tiling.grid)
