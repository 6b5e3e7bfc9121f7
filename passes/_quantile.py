"""A quantile of more numbers than memory holds: exact while they are few, then from a histogram."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..dialects.errors import MxloomError

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 1 << 25
"""Numbers up to which they are all kept (128 MiB)."""

DROPPED_BITS = 13
"""Of an f32 the histogram keeps sign, exponent and 10 bits of the mantissa: bins are 0.1 % wide."""


@dataclass
class StreamingQuantile:
    """Takes numbers that are not negative, f32 or f64, tensor by tensor; the order does not matter."""

    count: int = 0
    _kept: list[Tensor] = field(default_factory=list)
    _bins: Tensor | None = None

    def add(self, numbers: Tensor) -> None:
        """More numbers. MxloomError where one is NaN, infinite or negative."""
        import torch

        flat = numbers.detach().reshape(-1).to(torch.float32)
        if not bool((flat >= 0).all()) or not bool(flat.isfinite().all()):
            raise MxloomError("block impacts are NaN, infinite or negative")
        self.count += flat.numel()
        self._kept.append(flat.clone())
        if self.count > EXACT or self._bins is not None:
            self._count()

    def at(self, share: float) -> float:
        """The number below which so large a share lies: linear between neighbours where all are kept, else the upper
        end of the bin that holds it. MxloomError where there were none."""
        import torch

        if not self.count:
            raise MxloomError("there are no block impacts to take a threshold from")
        if self._bins is not None:
            rank = share * self.count
            place = int((self._bins.cumsum(0) < rank).sum())
            bits = torch.tensor((place + 1) << DROPPED_BITS, dtype=torch.int32)
            return float(bits.view(torch.float32))
        ordered = torch.cat(self._kept).sort().values.double()
        rank = share * (self.count - 1)
        below = int(rank)
        above = min(below + 1, self.count - 1)
        return float(ordered[below] + (rank - below) * (ordered[above] - ordered[below]))

    def _count(self) -> None:
        import torch

        if self._bins is None:
            self._bins = torch.zeros(1 << (31 - DROPPED_BITS), dtype=torch.int64)
        for part in self._kept:
            codes = (part.view(torch.int32) >> DROPPED_BITS).long()
            self._bins += torch.bincount(codes, minlength=len(self._bins))
        self._kept.clear()
