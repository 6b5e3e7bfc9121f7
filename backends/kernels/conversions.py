"""What an emulation rounds and sums at run time, and whether native kernels do it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

from ...dialects import torch_operators
from ...dialects.formats import Rounding
from ...dialects.mx import parse_type
from .codes import prepare_codes
from .fake_quantization import switched_off, why_not

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class Conversion:
    """`count` places where values are rounded into `format`; why torch does it, None where a kernel does.

    `as_codes` says that codes are made, for layers with an accumulator, and not values.
    """

    format: str
    how: Rounding
    count: int
    why_not: str | None
    as_codes: bool = False

    def __str__(self) -> str:
        by = "a kernel" if self.why_not is None else f"torch ({self.why_not})"
        what = f"codes of {self.format}" if self.as_codes else self.format
        return f"{self.count} x {what}, {self.how.scale_rule or 'its scale rule'}, {self.how.rounding}: {by}"


@dataclass(frozen=True)
class Summation:
    """`count` linear layers that sum in `accumulator`, by the kernel of a datapath, or by torch, and then why."""

    accumulator: str
    count: int
    datapath: str | None
    why_not: str | None

    def __str__(self) -> str:
        by = f"a kernel ({self.datapath})" if self.why_not is None else f"torch ({self.why_not})"
        return f"{self.count} x linear, {self.accumulator}: {by}"


def conversions(emulation: GraphModule) -> tuple[Conversion, ...]:
    """Every format that an emulation rounds inputs and intermediate values into; f32 values on a CPU are assumed."""
    found = Counter(rounded for node in emulation.graph.nodes if (rounded := _rounding(node, emulation)) is not None)
    return tuple(
        Conversion(format, how, count, _why_not(format, how, as_codes), as_codes)
        for (format, how, as_codes), count in sorted(found.items(), key=str)
    )


def summations(emulation: GraphModule) -> tuple[Summation, ...]:
    """The layers of an emulation that state an accumulator; every other contraction is torch's."""
    from .contraction.exact_layers import ExactLayers

    layers = [layer for group in emulation.modules() if isinstance(group, ExactLayers) for layer in group.layers]
    off = switched_off()
    found = Counter((layer.accumulator.label, layer.datapath, layer.why_not or off) for layer in layers)
    return tuple(
        Summation(accumulator, count, datapath, reason)
        for (accumulator, datapath, reason), count in sorted(found.items(), key=str)
    )


def _why_not(format: str, how: Rounding, as_codes: bool) -> str | None:
    import torch

    if not as_codes:
        return why_not(parse_type(format), how, torch.float32, (2, 2, 2, 2))
    found = switched_off() or prepare_codes(parse_type(format), how, (2, 2, 2, 2), torch.float32)
    return found if isinstance(found, str) else None


def _rounding(node: Node, emulation: GraphModule) -> tuple[str, Rounding, bool] | None:
    """The format that a node rounds into, how, and whether to codes."""
    if node.op == "call_module":
        from .contraction.exact_layers import ExactLayers

        group = emulation.get_submodule(str(node.target))
        return (group.format, group.how, True) if isinstance(group, ExactLayers) else None
    if node.target is torch_operators.operator("mxloom.quantize.default"):
        given: dict[str, Any] = signature(torch_operators.quantize).bind(*node.args, **node.kwargs).arguments
        given = {name: value for name, value in given.items() if name != "input"}
        return given.pop("format"), Rounding(**given), False
    if node.target is torch_operators.operator("mxloom.attention.default") and node.kwargs.get("probabilities"):
        kept: Any = node.kwargs
        return kept["probabilities"], Rounding(kept.get("scale_rule"), kept.get("rounding", "rne")), False
    return None
