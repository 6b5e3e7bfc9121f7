"""What a model is made of, as a compilation sees it: modules, shapes, ties, decision groups, what stays wide."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..backends.cost import TORCH
from ..dialects.operations._origin import parameters_of
from ..dialects.operations.parameter import ParameterOp
from ..passes._sites import Site, module_name, sites

if TYPE_CHECKING:
    from xdsl.dialects.builtin import ModuleOp

    from ..backends.cost import Cost
    from .compiled import Compiled


@dataclass(frozen=True)
class Layer:
    """One operation whose operands can have formats, at the inspected input sizes."""

    module: str
    kind: str
    weight: tuple[int, ...] | None
    macs: int
    weight_bytes: int
    sites: tuple[str, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Wide:
    """A parameter that no rule can give a format, and why."""

    name: str
    why: str
    elements: int
    bytes: int


@dataclass(frozen=True)
class Inspection:
    """A model's inventory. `ties` maps a second name of a tensor to its first; sizes in bytes are those as stored."""

    name: str
    task: str
    batch: int
    sequence: int
    parameters: int
    bytes: int
    layers: tuple[Layer, ...]
    wide: tuple[Wide, ...]
    opaque: dict[str, int]
    ties: dict[str, str]
    sums: dict[str, float]
    """Shares of MACs by how products are summed: an accumulator's name, or `torch` for its f32 product."""

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def groups(self) -> dict[str, list[str]]:
        """Sites that share one decision, by group."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            for site, group in zip(layer.sites, layer.groups, strict=True):
                found.setdefault(group, []).append(site)
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"macs": self.macs, "groups": self.groups}

    def __str__(self) -> str:
        head = (
            f"{self.name} ({self.task}): {self.parameters:,} parameters, {self.bytes:,} bytes, "
            f"{self.macs:,} MACs over {self.batch} x {self.sequence}, {len(self.groups)} decision groups"
        )
        parts = [head, _layer_table(self.layers, self.macs)]
        if self.ties:
            parts.append("tied\n" + "\n".join(f"  {alias} = {name}" for alias, name in sorted(self.ties.items())))
        shared = {name: members for name, members in self.groups.items() if len(members) > 1}
        if shared:
            parts.append("decided together\n" + "\n".join(_folded_groups(shared)))
        parts.append(_wide_table(self.wide, self.bytes))
        if set(self.sums) - {TORCH}:
            parts.append("sums: " + ", ".join(f"{name} {share:.1%} of MACs" for name, share in self.sums.items()))
        opaque = ", ".join(f"{name} ({count})" for name, count in sorted(self.opaque.items())) or "none"
        parts.append(f"torch operators kept as they came: {opaque}")
        return "\n\n".join(part for part in parts if part)


def inspect(compiled: Compiled, *, batch: int = 1, sequence: int | None = None) -> Inspection:
    """The inventory of a model; MACs are those of one forward over batch x sequence (None: the usual one of `cost`)."""
    sequence = compiled.usual_sequence if sequence is None else sequence
    cost = compiled.cost(batch=batch, sequence=sequence)
    stored = {tensor.name: tensor.bytes for tensor in cost.tensors}
    return Inspection(
        name=compiled.source.name,
        task=compiled.source.task,
        batch=batch,
        sequence=sequence,
        parameters=cost.parameters,
        bytes=cost.bytes,
        layers=tuple(_layers(compiled.module, cost, stored)),
        wide=tuple(_wide(compiled.module, stored)),
        opaque=dict(Counter(_target(op) for op in compiled.module.walk() if op.name == "mx.aten")),
        ties=dict(compiled.weights.aliases),
        sums=cost.sums,
    )


def _layers(module: ModuleOp, cost: Cost, stored: dict[str, int]) -> Iterable[Layer]:
    """Operations with sites first, then what else multiplies and sums: torch operators, products over one value."""
    macs = {contraction.name: contraction.macs for contraction in cost.contractions}
    by_operation: dict[Any, list[Site]] = {}
    for site in sites(module):
        by_operation.setdefault(site.operation, []).append(site)
    for operation, members in by_operation.items():
        weights = [site for site in members if site.role == "weight"]
        yield Layer(
            module=members[0].module,
            kind=members[0].kind,
            weight=weights[0].shape if weights else None,
            macs=macs.get(module_name(operation), 0),
            weight_bytes=sum(stored.get(source, 0) for site in weights for source in _sources(site)),
            sites=tuple(site.name for site in members),
            groups=tuple(site.group for site in members),
        )
    own = {module_name(operation) for operation in by_operation}
    for other in cost.contractions:
        if other.name not in own:
            yield Layer(other.name, other.kind, None, other.macs, 0, (), ())


def _sources(site: Site) -> Iterable[str]:
    return [parameter.source.data for parameter in parameters_of(site.value)]


def _wide(module: ModuleOp, stored: dict[str, int]) -> Iterable[Wide]:
    """Parameters of which no reader is a contraction or a look-up."""
    reached = {p for site in sites(module) if site.role == "weight" for p in parameters_of(site.value)}
    for op in module.walk():
        if not isinstance(op, ParameterOp) or op in reached:
            continue
        readers = [use.operation for use in op.result.uses]
        kinds = sorted({_target(reader) for reader in readers}) or ["nothing"]
        shape = op.result.type.get_shape()
        yield Wide(op.source.data, f"read by {', '.join(kinds)}", prod(shape), stored.get(op.source.data, 0))


def _target(op: Any) -> str:
    """`rms_norm`, or what an operation kept as it came is called: `aten.cumsum.default`."""
    return op.target.data if op.name == "mx.aten" else op.name.removeprefix("mx.")


def _layer_table(layers: Sequence[Layer], macs: int) -> str:
    rows: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        shape = "x".join(map(str, layer.weight)) if layer.weight else "-"
        rows.setdefault((folded(layer.module), layer.kind, shape), []).append(layer)
    cells = [("module", "kind", "weight", "number", "share of MACs", "weight bytes")]
    for (name, kind, shape), members in rows.items():
        share = sum(member.macs for member in members) / macs if macs else 0.0
        total = sum(member.weight_bytes for member in members)
        cells.append((name, kind, shape, str(len(members)), f"{share:.1%}", f"{total:,}"))
    return aligned(cells, right=(3, 4, 5))


def _wide_table(wide: Sequence[Wide], total: int) -> str:
    rows: dict[tuple[str, str], list[Wide]] = {}
    for item in wide:
        rows.setdefault((folded(item.name), item.why), []).append(item)
    cells = [("always wide", "why", "number", "bytes")]
    for (name, why), members in rows.items():
        cells.append((name, why, str(len(members)), f"{sum(member.bytes for member in members):,}"))
    return aligned(cells, right=(2, 3)) if wide else ""


def _folded_groups(groups: dict[str, list[str]]) -> Iterable[str]:
    alike = Counter(tuple(dict.fromkeys(map(folded, members))) for members in groups.values())
    for members, count in alike.items():
        yield f"  {count} x {' + '.join(members)}"


def folded(name: str) -> str:
    """The name with `*` for the numbers of layers, and without what made it unique: layers that repeat are alike."""
    return re.sub(r"(?<=\.attention)_\d+(?=\.|$)", "", re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))


def aligned(cells: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of text in columns as wide as their widest cell; columns in `right` stand at the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = (
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)
