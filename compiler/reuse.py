"""One layer's hardware for all layers of a list: loaded anew for each, what comes out being what the next one reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.dataflow.bench import VECTORS
from ..backends.dataflow.cost.design import resources
from ..backends.dataflow.cost.off_chip import rounds_cost
from ..backends.dataflow.folding import Limits
from ..backends.dataflow.graph import Graph
from ..backends.dataflow.rounds import Round, check_same, predicted_cycles, share_stages
from ..backends.dataflow.sizing import fit
from ..backends.dataflow.timing import Timing
from ..backends.dataflow.verification import beats_of_tensors, on_grid
from ..dialects.errors import MxloomError, UsageError
from ..dialects.names import identifier
from ..dialects.operations._operation import Operation
from ..dialects.operations._values import path_of
from ..passes._sites import module_name
from ..passes.extract import Extract
from .hardware import COST, POSITIONS, Hardware, check_apart, checked_name, write_design
from .static_model import StaticModel

if TYPE_CHECKING:
    from xdsl.ir import SSAValue

    from .compiled import Compiled


@dataclass(frozen=True)
class Layer:
    """A layer of the list: its design, which is the first layer's but for the words of memories, and what it gives."""

    name: str
    graph: Graph
    output: SSAValue


@dataclass(frozen=True)
class Reused:
    """The first layer's design, and the layers of `part` whose work it does, round after round."""

    design: Hardware
    part: str
    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        return self.design.name

    @property
    def graph(self) -> Graph:
        return self.design.graph

    @property
    def timing(self) -> Timing:
        return self.design.timing

    @property
    def text(self) -> str:
        """The circuit, in CIRCT's hw, comb and seq dialects."""
        return self.design.text

    @cached_property
    def assumed(self) -> list[str]:
        """What was taken for granted about the layers."""
        return self.design.model.assumed_of(self.part)

    def rounds(self, count: int, given: Any = None) -> list[Round]:
        """Each layer's words, and beats of so many inputs as the model itself computes them before and behind it.

        `given` as for `StaticModel.values`.
        """
        (start,), graph = self.design.inputs, self.graph
        values = self.design.model.values([start, *(layer.output for layer in self.layers)], count, given)
        found: list[Round] = []
        for place, layer in enumerate(self.layers):
            inputs = [[on_grid(each[place], graph.inputs[0].point)] for each in values]
            outputs = [[each[place + 1]] for each in values]
            found.append(Round(layer.name, layer.graph.configuration(), beats_of_tensors(graph, inputs, outputs)))
        return found

    @cached_property
    def cost(self) -> dict[str, Any]:
        """What the design costs (`design_cost`), and under `reuse` what comes from outside (`rounds_cost`)."""
        own, work = self.design.cost, predicted_cycles(self.graph, 1).work
        energy = sum(own["total"]["energy_pj"].values())
        return own | {"reuse": rounds_cost(self.graph, len(self.layers), work, self.timing.interval, energy)}

    def save(self, directory: str | Path, rounds: list[Round]) -> Path:
        """Write the design as one folder, whole or not at all; only an emitted design that is there is replaced."""
        from json import dumps

        from ..backends.dataflow.emission import files_of_rounds

        folders = {f"{VECTORS}/{identifier(each.name)}": each for each in rounds}
        told = self.design.told | {
            "part": self.part,
            "assumed": self.assumed,
            "reuse": {
                "order": "for each layer: load its words, then send every input; what comes out is the next layer's "
                "input, in the same order and format",
                "loading_words": len(rounds[0].configuration),
                "layers": [{"name": each.name, "folder": folder} for folder, each in folders.items()],
            },
        }
        files = files_of_rounds(self.graph, self.name, folders, told)
        return write_design(directory, files | {COST: dumps(self.cost, indent=2) + "\n"})


def reused(
    compiled: Compiled,
    part: str,
    *,
    name: str | None = None,
    positions: int = POSITIONS,
    limits: Limits | None = None,
) -> Reused:
    """The design of the first layer of the list `part` (model.layers), for all of its layers.

    Raises UsageError for a name that is no list of two layers or more, and MxloomError, naming the first difference,
    for layers that are not the same hardware or that read anything but what the layer before gives.
    """
    name = checked_name(name, part)
    model = StaticModel.of(compiled, positions)
    names = _layers(model, part)
    module, inputs, graph = model.lowered(names[0])
    lowered = {names[0]: (inputs, graph)} | {each: model.lowered(each)[1:] for each in names[1:]}
    outputs = {each: Extract(part=(each,)).outputs(model.module) for each in names}
    for each in names:
        _check_ends(each, lowered[each], outputs[each])
    for before, each in pairwise(names):
        if lowered[each][0] != outputs[before]:
            (found,) = lowered[each][0]
            raise MxloomError(f"{each} reads {path_of(found)}, which {before} does not give: {_CHAIN}")
    for each in names[1:]:
        try:
            check_same(graph, lowered[each][1])
        except MxloomError as error:
            raise MxloomError(f"{each} is not the hardware of {names[0]}: {error}\n{_hint(compiled, part)}") from None
    _check_chain(names[0], graph)
    if not graph.loaded:
        raise MxloomError(f"{names[0]} has no memory that is loaded: nothing makes it another layer's hardware")
    check_apart(name, graph)
    timing = fit(graph, limits or Limits(), resources)
    for each in names[1:]:
        share_stages(graph, lowered[each][1])
    layers = tuple(Layer(each, lowered[each][1], outputs[each][0]) for each in names)
    design = Hardware(model, name, names[0], positions, module, inputs, graph, timing, model.assumed_of(names[0]))
    return Reused(design, part, layers)


_CHAIN = "one layer's hardware serves others where each reads what the one before gives, and nothing else"


def _layers(model: StaticModel, part: str) -> list[str]:
    """The names of a list's layers. Raises UsageError where there are not two."""
    paths = [module_name(op) for op in model.module.walk() if isinstance(op, Operation) and op.results]
    numbers = {int(found[1]) for path in paths if (found := re.match(rf"{re.escape(part)}\.(\d+)(\.|$)", path, re.A))}
    if len(numbers) < 2:
        raise UsageError(
            f'"{part}" is no list of layers: the model has {len(numbers)} modules named {part}.N; '
            "name the list itself, as model.layers"
        )
    return [f"{part}.{number}" for number in sorted(numbers)]


def _check_ends(name: str, lowered: tuple[list[SSAValue], Graph], outputs: list[SSAValue]) -> None:
    """Raise MxloomError unless a layer takes one value and gives one."""
    for side, values in (("reads", lowered[0]), ("gives", outputs)):
        if len(values) != 1:
            given = ", ".join(path_of(value) or "a value" for value in values) or "nothing"
            raise MxloomError(f"{name} {side} {given}: {_CHAIN}")


def _check_chain(name: str, graph: Graph) -> None:
    """Raise MxloomError unless what a layer gives can be what the next one takes."""
    (given,), (out,) = graph.inputs, graph.outputs
    for what, a, b in (("format", given.point, out.point), ("shape", given.shape, out.shape)):
        if a != b:
            raise MxloomError(f"{name} takes the {what} {a} and gives {b}: {_CHAIN}")


def _hint(compiled: Compiled, part: str) -> str:
    """What to do about layers that differ."""
    shares = re.search(r"legalize-hardware\{[^}]*share", compiled.pipeline)
    if shares is None:
        return f'give every layer the same formats: compile with legalize-hardware{{share="{part}"}}'
    return "only layers of one kind, with the same sizes and formats, share hardware"
