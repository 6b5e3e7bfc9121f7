"""Which weights stand on the chip: the largest come from outside until the others fit."""

from __future__ import annotations

from .graph import Graph, Node
from .stages.contraction import Contraction


def loaded_bytes(graph: Graph) -> float:
    """Bytes of all memories that are loaded before the design works."""
    return sum(node.stage.loaded_bits for node in graph.nodes.values()) / 8


def next_streamed(graph: Graph, limit: float) -> list[str]:
    """The sites of the linear layers, the largest first, without whose weights a design keeps at most `limit` bytes.

    Empty where it does already; where no choice meets the limit, every linear layer that still keeps its weight.
    """
    found: list[str] = []
    left = loaded_bytes(graph)
    linears = [node for node in graph.nodes.values() if isinstance(node.stage, Contraction) and not node.stage.dynamic]
    for node in sorted(linears, key=_weight_bytes, reverse=True):
        if left <= limit:
            break
        found.append(node.site)
        left -= _weight_bytes(node)
    return found


def _weight_bytes(node: Node) -> float:
    """Bytes of a linear layer's weight, without its bias, which stays."""
    assert isinstance(node.stage, Contraction)
    stage = node.stage
    biases = stage.copies * stage.groups * stage.unit.bias.width if stage.unit.bias else 0
    return (stage.loaded_bits - biases) / 8
