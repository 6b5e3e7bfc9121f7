"""Coverage: which share of MACs and bytes has which format, what stayed wide, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from xdsl.dialects.builtin import ModuleOp

from ..dialects.operations._values import path_of
from ..dialects.operations.opaque import AtenOp
from .cost import TORCH, UNKNOWN, cost, ratio
from .weight_store import WeightStore


@dataclass(frozen=True)
class Coverage:
    """Shares between 0 and 1: `macs` by the formats of the operands, `bytes` and `elements` by stored format.

    `quantized_macs` is the share of MACs all of whose operands are narrow, `weights_only_macs` that of those whose
    weight alone is. `accumulators` are shares of MACs by how products are summed, `torch` in the order of its f32
    operators; `torch_sums` names these operations. `wide` lists each operand that stayed wide: its name, its share of
    MACs, and why; torch operators that multiply and sum, and that no structured operation stands for, are among them.
    """

    macs: dict[str, float]
    bytes: dict[str, float]
    elements: dict[str, float]
    quantized_macs: float
    weights_only_macs: float
    wide: tuple[tuple[str, float, str], ...]
    opaque: tuple[str, ...]
    accumulators: dict[str, float] = field(default_factory=dict)
    torch_sums: tuple[tuple[str, float], ...] = ()

    def summary(self) -> str:
        by_format = ", ".join(f"{name} {share:.1%}" for name, share in sorted(self.macs.items(), key=lambda kv: -kv[1]))
        lines = [f"{self.quantized_macs:.1%} of MACs with every operand quantized: {by_format}"]
        if self.weights_only_macs:
            lines.append(f"{self.weights_only_macs:.1%} of MACs with the weight alone quantized")
        if set(self.accumulators) - {TORCH}:
            lines.append(self._summed())
        kept = self._kept()
        if kept:
            rest = f"; and {len(kept) - 8} more" if len(kept) > 8 else ""
            lines.append(f"kept wide: {'; '.join(kept[:8])}{rest}")
        unknown = dict.fromkeys(_folded(name.rpartition(".")[0]) for name, _, why in self.wide if why == UNKNOWN)
        if unknown:
            lines.append(f"{UNKNOWN}: {', '.join(unknown)}")
        return "\n".join(lines)

    def _summed(self) -> str:
        """How products are summed, where some operations state it."""
        stated = {name: share for name, share in self.accumulators.items() if name != TORCH}
        blocks = ", ".join(name if len(stated) == 1 else f"{name} ({share:.1%})" for name, share in stated.items())
        shares: dict[str, float] = {}
        for name, share in self.torch_sums:
            shares[_folded(name)] = shares.get(_folded(name), 0.0) + share
        order = sorted(shares, key=lambda name: -shares[name])
        named = ", ".join(f"{name} {shares[name]:.1%}" for name in order[:8])
        rest = f" and {len(order) - 8} more" if len(order) > 8 else ""
        line = f"{sum(stated.values()):.1%} of MACs summed exactly inside blocks, blocks added in {blocks}"
        return f"{line}; in torch's f32: {named}{rest}" if named else line

    def _kept(self) -> list[str]:
        """What stayed wide, the largest share first; layers that differ in their number alone stand together."""
        shares: dict[tuple[str, str], dict[str, float]] = {}
        operands: dict[tuple[str, str], dict[str, None]] = {}
        for name, share, why in self.wide:
            if why == UNKNOWN:
                continue
            module, _, operand = name.rpartition(".")
            key = _folded(module), why
            shares.setdefault(key, {})[module] = share
            operands.setdefault(key, {})[operand] = None
        order = sorted(shares, key=lambda key: -sum(shares[key].values()))
        return [
            f"{name} ({', '.join(operands[name, why])}; {sum(shares[name, why].values()):.1%} of MACs: {why})"
            for name, why in order
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _folded(module: str) -> str:
    """The name with `*` for the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", module)


def coverage(
    module: ModuleOp, weights: WeightStore, sizes: Sequence[tuple[int, ...]], *, state: Iterable[str] = ()
) -> Coverage:
    """Which share of MACs and bytes has which format, what stayed wide, and why; arguments as in `cost`."""
    total = cost(module, weights, sizes, state=state)
    macs, bytes, elements = dict[str, float](), dict[str, float](), dict[str, float]()
    for c in total.contractions:
        macs[c.formats] = macs.get(c.formats, 0.0) + ratio(c.macs, total.macs)
    for t in total.tensors:
        bytes[t.format] = bytes.get(t.format, 0.0) + ratio(t.bytes, total.bytes)
        elements[t.format] = elements.get(t.format, 0.0) + ratio(t.elements, total.parameters)
    full = sum(c.macs for c in total.contractions if not c.wide)
    weights_only = sum(c.macs for c in total.contractions if c.wide and c.weights and not {*c.weights} & {*c.wide})
    wide = tuple((f"{c.name}.{o}", ratio(c.macs, total.macs), c.why) for c in total.contractions for o in c.wide)
    opaque = tuple(f"{path_of(op.results[0])} ({op.target.data})" for op in module.walk() if isinstance(op, AtenOp))
    shares = ratio(full, total.macs), ratio(weights_only, total.macs)
    summed = tuple((c.name, ratio(c.macs, total.macs)) for c in total.contractions if c.accumulator == TORCH)
    return Coverage(macs, bytes, elements, *shares, wide, opaque, total.sums, summed)
