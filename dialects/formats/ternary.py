"""Ternary weights: -1, 0 and 1 (BitNet b1.58, arXiv 2402.17764)."""

from __future__ import annotations

from xdsl.ir import ParametrizedAttribute
from xdsl.irdl import irdl_attr_definition

from ._element import Trit
from ._format import Format
from ._plain import Plain


@irdl_attr_definition
class TernaryType(ParametrizedAttribute, Plain, Format):
    """`!mx.ternary`: -1, 0 or 1. Five trits share a byte (3^5 = 243), so that one costs 1.6 bits."""

    name = "mx.ternary"

    @property
    def element_numbers(self) -> Trit:
        return Trit()

    @property
    def bits(self) -> float:
        return 8 / 5
