"""Features of the stages that move numbers and change none."""

from __future__ import annotations

from ..rtl import address_bits
from ..stages.route import Fifo, Fork, Reorder
from ..stages.select import Select
from .features import Features, features


@features.register
def _(design: Fork) -> Features:
    return {"control": design.ways, "constant": 1.0}


@features.register
def _(design: Fifo) -> Features:
    return {"register": design.width, "control": address_bits(design.depth), "constant": 1.0}


@features.register
def _(design: Reorder) -> Features:
    axes = [axis.size for axis in design.axes if axis.size > 1]
    return {
        "register": design.width,
        "control": sum(map(address_bits, axes)) + (len(axes) + 4) * address_bits(design.count),
        "constant": 1.0,
    }


@features.register
def _(design: Select) -> Features:
    return {
        "register": design.width + 1,
        "control": address_bits(design.size) + address_bits(design.inner),
        "constant": 1.0,
    }
