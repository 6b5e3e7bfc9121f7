"""Counts of magnitudes on a logarithmic scale, and the percentiles that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LOWEST, OCTAVES = -24, 40
"""The scale begins at 2^-24 and has 40 octaves; what is smaller counts in the first bin, what is larger in the last."""


@dataclass(frozen=True)
class Scale:
    """Bins of equal width within each octave, 2^`digits` of them: the leading digits of an f32 number."""

    digits: int

    @property
    def bins(self) -> int:
        return OCTAVES << self.digits

    def edges(self) -> Tensor:
        """Where the bins begin, and the last ends: [bins + 1] f64, the first 0."""
        import torch

        places = torch.arange(self.bins + 1, dtype=torch.float64)
        octave = (places / (1 << self.digits)).floor()
        edges = 2.0 ** (octave + LOWEST) * (1 + places / (1 << self.digits) - octave)
        edges[0] = 0.0
        return edges

    def percentile(self, counts: Tensor, share: float, largest: Tensor) -> Tensor:
        """The magnitude that `share` (0 to 1) of those counted do not exceed: [channels] f32, never above `largest`.

        counts [channels, bins], largest [channels]. Within its bin it is interpolated linearly, so that it is off by
        less than a bin's width: 2^-`digits` of itself at most.
        """
        import torch

        counts, edges = counts.double(), self.edges()
        below = counts.cumsum(1)
        wanted = share * below[:, -1:]
        place = torch.searchsorted(below, wanted).clamp(max=self.bins - 1)
        inside = counts.gather(1, place).clamp(min=1)
        before = below.gather(1, place) - counts.gather(1, place)
        begin = edges[place[:, 0]]
        end = torch.minimum(edges[place[:, 0] + 1], largest.double())
        end = torch.where(place[:, 0] == self.bins - 1, largest.double(), end)
        part = ((wanted - before) / inside).clamp(0, 1)[:, 0]
        found = begin + part * (end - begin).clamp(min=0)
        return torch.minimum(found, largest.double()).float()


def counted(rows: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the numbers [rows, channels] (f32) lie in each bin.

    Magnitudes of each channel in bins of `COARSE`, [channels, bins]; numbers of 0 and more, and those below 0, of all
    channels together in bins of `FINE`, [2, bins].
    """
    import torch

    bits = rows.contiguous().view(torch.int32)
    lowest = (127 + LOWEST) << FINE.digits
    places = ((bits & 0x7FFFFFFF) >> (23 - FINE.digits)).sub_(lowest).clamp_(0, FINE.bins - 1)
    channels = rows.shape[1]
    coarse = (places >> (FINE.digits - COARSE.digits)) + torch.arange(channels, dtype=torch.int32) * COARSE.bins
    fine = places.add_((bits < 0) * FINE.bins)
    return (
        torch.bincount(coarse.flatten(), minlength=channels * COARSE.bins).reshape(channels, COARSE.bins),
        torch.bincount(fine.flatten(), minlength=2 * FINE.bins).reshape(2, FINE.bins),
    )


COARSE = Scale(digits=2)
"""For each channel."""

FINE = Scale(digits=6)
"""For the values of all channels together."""
