"""The accumulator of a contraction: exact sums of segments, shifted into a saturating window."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Two's complement of `width` bits whose lowest bit stands for 2^lsb."""

    width: int
    lsb: int
