"""A compiled model, or a part of it, as dataflow hardware: from the typed module to a design with real vectors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import ModuleOp

from ..backends.dataflow.cost.design import design_cost, resources
from ..backends.dataflow.folding import Limits
from ..backends.dataflow.graph import Graph
from ..backends.dataflow.keywords import RESERVED
from ..backends.dataflow.lowering import lower
from ..backends.dataflow.rtl import circuit_text
from ..backends.dataflow.sizing import fit
from ..backends.dataflow.timing import Timing
from ..backends.dataflow.verification import Vectors, vectors
from ..backends.reference import Interpreter, body
from ..backends.static import static
from ..backends.weight_store import WeightStore
from ..dialects.arguments import came, whole_number
from ..dialects.errors import MxloomError, UsageError, shortened
from ..dialects.names import identifier
from ..passes._context import CompileContext
from ..passes.extract import Extract, belongs
from ._atomic import new_folder
from ._target import check_target
from .calibration import calibration_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import SSAValue

    from .compiled import Compiled

POSITIONS = 16
"""Positions of a sequence that a design is made for where nothing else is said."""
COST, INTERFACE = "cost.json", "interface.json"


@dataclass(frozen=True)
class Hardware:
    """A design made from a model: its stages, and the static module that it must equal.

    `timing` says its cycles before it is made. `whole` is the static module of the whole model, `inputs` its values
    that the design takes in, `assumed` what was taken for granted about inputs.
    """

    compiled: Compiled
    name: str
    part: str | None
    positions: int
    module: ModuleOp
    weights: WeightStore
    whole: ModuleOp
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

        `given` as for calibration: a text, its file, dictionaries of inputs, or None. Inputs shorter than the design's
        are repeated; where there are fewer than `count`, they come again, rolled along their last dimension.
        """
        whole_number("vectors", count, 1, 10_000)
        interpreter = Interpreter(self.whole, self.weights)
        found: list[list[Tensor]] = []
        for sample in _samples(self.compiled, body(self.whole).args, count, given):
            seen: dict[SSAValue, Tensor] = {}
            interpreter(*sample, observe=lambda value, held, seen=seen: seen.__setitem__(value, held))
            found.append([seen[value] for value in self.inputs])
        return vectors(self.module, self.weights, self.graph, found)

    @cached_property
    def cost(self) -> dict[str, Any]:
        """What the design costs: see `design_cost`."""
        return design_cost(self.graph, self.timing)

    def save(self, directory: str | Path, vectors: Vectors) -> Path:
        """Write the design as one folder, whole or not at all; only an emitted design that is there is replaced."""
        from json import dumps

        from ..backends.dataflow.emission import files

        target = check_target(directory, is_emitted, "emitted design")
        told = {
            "model": self.compiled.source.name,
            "pipeline": self.compiled.pipeline,
            "part": self.part,
            "positions": self.positions,
            "assumed": self.assumed,
        }
        written = files(self.graph, self.name, vectors, told) | {COST: dumps(self.cost, indent=2) + "\n"}
        with new_folder(target) as folder:
            for name, text in written.items():
                path = folder / name
                if not path.resolve().is_relative_to(folder.resolve()):
                    raise MxloomError(f"{name!r} leads out of the folder of the design: nothing was written")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
        return target


def is_emitted(folder: Path) -> bool:
    """Whether the folder is one that `Hardware.save` wrote."""
    return all((folder / name).exists() for name in (INTERFACE, COST, "rtl", "synth.ys"))


def hardware(
    compiled: Compiled,
    part: str | None = None,
    *,
    name: str | None = None,
    positions: int = POSITIONS,
    limits: Limits | None = None,
) -> Hardware:
    """The design of a model or of the `part` of it that a module's name stands for (model.layers.0).

    It takes one sequence of so many `positions`. Raises UsageError for a name that Verilog does not take, a part that
    is not there and limits that no folding meets, and MxloomError naming every operation that has no hardware.
    """
    name = _checked_name(name, part)
    whole_number("sequence", positions, 1, 65536)
    whole, weights, assumed = static(compiled.module, compiled.weights, compiled.sizes(1, positions))
    module = whole.clone()
    inputs: list[SSAValue] = list(body(whole).args)
    if part is not None:
        extract = Extract(part=(part,))
        inputs = extract.inputs(whole)
        extract.apply(CompileContext(weights=weights), module)
        module.verify()
        assumed = [each for each in assumed if belongs(each.partition(":")[0], (part,))]
    try:
        graph = lower(module, weights)
    except MxloomError as error:
        raise MxloomError(f"{error}{_hint(compiled, part)}") from None
    graph.add_forks()
    graph.add_queues()
    timing = fit(graph, limits or Limits(), resources)
    return Hardware(compiled, name, part, positions, module, weights, whole, inputs, graph, timing, assumed)


def _hint(compiled: Compiled, part: str | None) -> str:
    """What to do about a module that has no hardware."""
    if "legalize-hardware" not in compiled.pipeline:
        return "\ncompile the model with the pass legalize-hardware (in a recipe: passes: [legalize-hardware])"
    return "" if part is not None else "\na part of the model may have hardware: --part model.layers.0"


def _checked_name(name: str | None, part: str | None) -> str:
    """The design's name: a Verilog identifier that nothing reserves."""
    if name is None:
        made = identifier(part) if part else "design"
        return made if re.fullmatch(r"[A-Za-z]\w*", made, re.A) and made not in RESERVED else f"design_{made}"
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w{0,99}", name, re.A):
        raise UsageError(
            f"a design's name is made of letters, digits and underscores, 100 at most and no digit first, "
            f"got {shortened(repr(name)) if isinstance(name, str) else came(name)}"
        )
    if name in RESERVED or name == "bench":
        raise UsageError(f'"{name}" is a word of Verilog or of the test bench: choose another name')
    return name


def _samples(compiled: Compiled, arguments: Any, count: int, given: Any) -> list[list[Tensor]]:
    """Inputs of the static module: those for calibration, cut or repeated to its sizes."""
    from ..dialects.operations._shapes import shape_of

    own = {argument.name_hint: argument for argument in compiled.function.body.block.args}
    wanted = [own[argument.name_hint] for argument in arguments]
    found = calibration_inputs(compiled.source, list(own.values()), given, count)
    place = {name: index for index, name in enumerate(own)}
    samples = [
        [_fitted(sample[place[w.name_hint]], shape_of(a)) for w, a in zip(wanted, arguments, strict=True)]
        for sample in found
    ]
    rolled = samples[:]
    while len(rolled) < count:
        turn = len(rolled) // len(samples)
        rolled += [[tensor.roll(turn, -1) for tensor in sample] for sample in samples]
    return rolled[:count]


def _fitted(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor cut, or repeated, to a shape of its rank."""
    for axis, size in enumerate(shape):
        times = -(-size // tensor.shape[axis])
        tensor = tensor.repeat([times if other == axis else 1 for other in range(tensor.ndim)]).narrow(axis, 0, size)
    return tensor.contiguous()
