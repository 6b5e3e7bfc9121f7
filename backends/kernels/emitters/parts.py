"""The functions that a layout's rounding is made of, with names for their arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from ....dialects.errors import MxloomError
from .._layout import Layout
from ..block_function import BlockFunction, block_function, element_function, measure_function, scale_function
from .tensor_scale import magnitudes_without_nan, tensor_scale_function

if TYPE_CHECKING:
    from xdsl.dialects.func import FuncOp

Part = tuple["FuncOp", list[str]]


@lru_cache(maxsize=64)
def parts(numbers: BlockFunction) -> dict[str, Part]:
    """The functions by what they do.

    Without a scale: q. With one: measure, whose results are reduced over a block; scale, from the reduced ones;
    elements. For a scale of the tensor, magnitudes_without_nan and tensor_scale beside them.
    """
    if numbers.scale is None:
        return {"q": (block_function(numbers), ["values", "given", "over"])}
    reduced = ["low", "high"] if numbers.zero_points else ["largest"]
    scales = ["step", "divisor", *["zero"] * numbers.zero_points]
    found = {
        "measure": (measure_function(numbers), ["values"]),
        "scale": (scale_function(numbers, None), [*reduced, "over"]),
        "elements": (element_function(numbers), ["values", *scales]),
    }
    if numbers.tensor_scale:
        found["magnitudes_without_nan"] = (magnitudes_without_nan(1), ["values"])
        found["tensor_scale"] = (tensor_scale_function(numbers), ["largest"])
    return found


def refuse(layout: Layout, language: str) -> None:
    """Raise MxloomError for a layout that takes more than the functions of a block."""
    if layout.function.noisy:
        raise MxloomError(f"no kernel in {language} for stochastic rounding, whose noise is drawn on the processor")
    if layout.kind not in ("elements", "blocks", "rows", "whole") or layout.function.rule == "absmean":
        raise MxloomError(f"no kernel in {language} for the scale rule {layout.function.rule}")
