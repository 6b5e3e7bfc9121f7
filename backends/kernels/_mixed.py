"""Tensors whose blocks are kept in one of two formats: both by kernels, the choice by the definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...dialects.formats import MixedType, Rounding
from ._prepared import Prepared

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class PreparedMixed:
    """Rounds tensors of one shape and dtype into a mixed format, with a threshold of block impact."""

    mixed: MixedType
    how: Rounding
    low: Prepared
    high: Prepared

    def __call__(self, x: Tensor, out: Tensor | None, sensitivity: Tensor | None = None) -> Tensor:
        """`x` rounded, into `out` where it is given; `out` may be `x`."""
        assert self.how.threshold is not None
        if x.is_contiguous():
            low, high = self.low(x, None), self.high(x, None)
            rounded = self.mixed.chosen(low, high, self.how.threshold, sensitivity, exact=self.how.exact)
        else:  # torch adds a block's impact in the order of memory, which the definition takes from `x`
            rounded = self.mixed.quantize(x, self.how, sensitivity)
        return rounded if out is None else out.copy_(rounded)
