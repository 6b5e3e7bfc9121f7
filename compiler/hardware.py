"""A compiled model, or a part of it, as dataflow hardware: from the typed module to a design with real vectors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import ModuleOp

from ..backends.dataflow.cost.design import design_cost, resources
from ..backends.dataflow.folding import Limits
from ..backends.dataflow.graph import Graph
from ..backends.dataflow.keywords import RESERVED, port_name
from ..backends.dataflow.placement import loaded_bytes, next_streamed
from ..backends.dataflow.rtl import circuit_text
from ..backends.dataflow.sizing import fit
from ..backends.dataflow.timing import Timing
from ..backends.dataflow.verification import Vectors, vectors
from ..dialects.arguments import came, whole_number
from ..dialects.errors import MxloomError, UsageError, shortened
from ..dialects.names import identifier
from ._atomic import new_folder
from ._target import check_target
from .static_model import StaticModel

if TYPE_CHECKING:
    from xdsl.ir import SSAValue

    from .compiled import Compiled

POSITIONS = 16
"""Positions of a sequence that a design is made for where nothing else is said."""
COST, INTERFACE = "cost.json", "interface.json"


@dataclass(frozen=True)
class Hardware:
    """A design made from a model: its stages, and the static module that it must equal.

    `timing` says its cycles before it is made. `inputs` are the values of the whole model that the design takes in,
    `assumed` what was taken for granted about inputs.
    """

    model: StaticModel
    name: str
    part: str | None
    positions: int
    module: ModuleOp
    inputs: list[SSAValue]
    graph: Graph
    timing: Timing
    assumed: list[str]

    @cached_property
    def text(self) -> str:
        """The circuit, in CIRCT's hw, comb and seq dialects."""
        return circuit_text(self.graph.module(self.name))

    def vectors(self, count: int, given: Any = None) -> Vectors:
        """Beats of so many inputs that the model itself gives the part, and what the reference makes of them.

        `given` as for `StaticModel.values`.
        """
        found = self.model.values(self.inputs, count, given)
        return vectors(self.module, self.model.weights, self.graph, found)

    @cached_property
    def cost(self) -> dict[str, Any]:
        """What the design costs: see `design_cost`."""
        return design_cost(self.graph, self.timing)

    def save(self, directory: str | Path, vectors: Vectors) -> Path:
        """Write the design as one folder, whole or not at all; only an emitted design that is there is replaced."""
        from json import dumps

        from ..backends.dataflow.emission import files

        written = files(self.graph, self.name, vectors, self.told) | {COST: dumps(self.cost, indent=2) + "\n"}
        return write_design(directory, written)

    @property
    def told(self) -> dict[str, Any]:
        """What the design is of, for `interface.json`."""
        return {
            "model": self.model.compiled.source.name,
            "pipeline": self.model.compiled.pipeline,
            "part": self.part,
            "positions": self.positions,
            "assumed": self.assumed,
        }


def write_design(directory: str | Path, files: dict[str, str]) -> Path:
    """Write an emitted design's files, whole or not at all; only an emitted design that is there is replaced."""
    target = check_target(directory, is_emitted, "emitted design")
    with new_folder(target) as folder:
        for name, text in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise MxloomError(f"{name!r} leads out of the folder of the design: nothing was written")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return target


def is_emitted(folder: Path) -> bool:
    """Whether the folder is one that `Hardware.save` wrote, with nothing beside it but what `make` leaves there."""
    written = {INTERFACE, COST, "rtl", "synth.ys"}
    made = {*written, "Makefile", "test", "vectors", "build", "build.log", "synth.json"}
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    return written <= there <= made


def hardware(
    compiled: Compiled,
    part: str | None = None,
    *,
    name: str | None = None,
    positions: int = POSITIONS,
    limits: Limits | None = None,
    memory: int | None = None,
) -> Hardware:
    """The design of a model or of the `part` of it that a module's name stands for (model.layers.0).

    It takes one sequence of so many `positions`. With `memory` at most so many bytes are loaded before it works: the
    largest weights of linear layers are streams of the design instead, and come once for each input. Raises UsageError
    for a name that Verilog does not take, a part that is not there and limits that nothing meets, and MxloomError
    naming every operation that has no hardware.
    """
    name = checked_name(name, part)
    if memory is not None:
        whole_number("memory", memory, 0, 2**50)
    model = StaticModel.of(compiled, positions)
    module, inputs, graph, timing = _placed(model, part, limits or Limits(), memory)
    check_apart(name, graph)
    return Hardware(model, name, part, positions, module, inputs, graph, timing, model.assumed_of(part))


def _placed(
    model: StaticModel, part: str | None, limits: Limits, memory: int | None
) -> tuple[ModuleOp, list[SSAValue], Graph, Timing]:
    """A part's module, its inputs and its stages, folded, with the largest weights outside where memory has an end."""
    streamed = frozenset[str]()
    most = inf if memory is None else memory
    while True:
        module, inputs, graph = model.lowered(part, streamed)
        outside = next_streamed(graph, most)
        if not outside:
            _check_memory(graph, part, most)
            timing = fit(graph, limits, resources)
            outside = next_streamed(graph, most)  # rows of weights are filled up to the units of a folding
            if not outside:
                return module, inputs, graph, timing
        streamed |= {*outside}


def _check_memory(graph: Graph, part: str | None, most: float) -> None:
    """Raise UsageError where what must stand on the chip does not fit."""
    needed = ceil(loaded_bytes(graph))
    if needed > most:
        raise UsageError(
            f"{most:,.0f} bytes on chip are too few for {part or 'the model'}: with the weight of every linear layer "
            f"outside, norms, biases and angles take {needed:,}; the nearest is --memory {needed}"
        )


def check_apart(name: str, graph: Graph) -> None:
    """Raise UsageError where a design would have the name of one of its streams or stages."""
    if name in {*graph.input_streams, *graph.output_streams, *graph.nodes}:
        raise UsageError(f'"{name}" is a stream or a stage of the design itself: choose another name')


def checked_name(name: str | None, part: str | None) -> str:
    """The design's name: a Verilog identifier that nothing reserves."""
    if name is None:
        made = identifier(part) if part else "design"
        return made if re.fullmatch(r"[A-Za-z]\w*", made, re.A) and made not in RESERVED else f"design_{made}"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w{0,99}", name, re.A):
        raise UsageError(
            f"a design's name is made of letters, digits and underscores, 100 at most and no digit first, "
            f"got {shortened(repr(name)) if isinstance(name, str) else came(name)}"
        )
    if port_name(name) != name:
        raise UsageError(f'"{name}" is a word of Verilog, of the design or of its test bench: choose another name')
    return name
