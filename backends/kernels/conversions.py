"""What an emulation rounds at run time, and whether native kernels do it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from ...dialects import torch_operators
from ...dialects.formats import Rounding
from ...dialects.mx import parse_type
from .fake_quantization import why_not

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Conversion:
    """`count` places where values are rounded into `format`; why torch does it, None where a kernel does."""

    format: str
    how: Rounding
    count: int
    why_not: str | None

    def __str__(self) -> str:
        by = "a kernel" if self.why_not is None else f"torch ({self.why_not})"
        return f"{self.count} x {self.format}, {self.how.scale_rule or 'its scale rule'}, {self.how.rounding}: {by}"


def conversions(emulation: GraphModule) -> tuple[Conversion, ...]:
    """Every format that an emulation rounds inputs and intermediate values into; f32 values on a CPU are assumed."""
    import torch

    found = Counter(rounded for node in emulation.graph.nodes if (rounded := _rounding(node)) is not None)
    return tuple(
        Conversion(format, how, count, why_not(parse_type(format), how, torch.float32, (2, 2, 2, 2)))
        for (format, how), count in sorted(found.items(), key=str)
    )


def _rounding(node: Node) -> tuple[str, Rounding] | None:
    """The format that a node rounds into, and how."""
    if node.target is torch_operators.operator("mxloom.quantize.default"):
        given: dict[str, Any] = signature(torch_operators.quantize).bind(*node.args, **node.kwargs).arguments
        given = {name: value for name, value in given.items() if name != "input"}
        return given.pop("format"), Rounding(**given)
    if node.target is torch_operators.operator("mxloom.attention.default") and node.kwargs.get("probabilities"):
        kept: Any = node.kwargs
        return kept["probabilities"], Rounding(kept.get("scale_rule"), kept.get("rounding", "rne"))
    return None
