"""A compiled model for one size of its inputs: parts of it as stages, and the values that it computes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import ModuleOp

from ..backends.dataflow.graph import Graph
from ..backends.dataflow.lowering import lower
from ..backends.dataflow.sizing import place_queues
from ..backends.reference import Interpreter, body
from ..backends.static import static
from ..backends.weight_store import WeightStore
from ..dialects.arguments import whole_number
from ..dialects.errors import MxloomError
from ..dialects.formats import FixedType
from ..dialects.operations._integer_meaning import pair
from ..dialects.operations._shapes import element_of, shape_of
from ..passes._context import CompileContext
from ..passes.extract import Extract, belongs
from .calibration import calibration_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import SSAValue

    from .compiled import Compiled


RANDOM = "inputs: the artefact of a plain module holds none; vectors are random numbers over the ranges of its inputs"


@dataclass(frozen=True)
class StaticModel:
    """A compiled model for sequences of so many positions: its module with all sizes known, and what was assumed."""

    compiled: Compiled
    module: ModuleOp
    weights: WeightStore
    assumed: list[str]

    @classmethod
    def of(cls, compiled: Compiled, positions: int) -> StaticModel:
        whole_number("sequence", positions, 1, 65536)
        return cls(compiled, *static(compiled.module, compiled.weights, compiled.sizes(1, positions)))

    def lowered(
        self, part: str | None, streamed: frozenset[str] = frozenset()
    ) -> tuple[ModuleOp, list[SSAValue], Graph]:
        """(the module of a part, the model's values that it takes in, its stages with their forks and queues).

        The weights of the linear layers at the sites `streamed` come from outside.
        """
        module = self.module.clone()
        inputs: list[SSAValue] = list(body(self.module).args)
        if part is not None:
            extract = Extract(part=(part,))
            inputs = extract.inputs(self.module)
            extract.apply(CompileContext(weights=self.weights), module)
            module.verify()
        try:
            graph = lower(module, self.weights, streamed)
        except MxloomError as error:
            raise MxloomError(f"{error}{_hint(self.compiled, part)}") from None
        graph.add_forks()
        place_queues(graph)
        return module, inputs, graph

    def values(self, wanted: Sequence[SSAValue], count: int, given: Any = None) -> list[list[Tensor]]:
        """What the model computes for values of its module, from so many inputs.

        `given` as for calibration: a text, its file, dictionaries of inputs, or None. Inputs shorter than the module's
        are repeated; where there are fewer than `count`, they come again, rolled along their last dimension.
        """
        whole_number("vectors", count, 1, 10_000)
        interpreter, kept = Interpreter(self.module, self.weights), set(wanted)
        found: list[list[Tensor]] = []
        for sample in _samples(self.compiled, body(self.module).args, count, given):
            seen: dict[SSAValue, Tensor] = {}

            def observe(value: SSAValue, held: Tensor, seen: dict[SSAValue, Tensor] = seen) -> None:
                if value in kept:
                    seen[value] = held

            interpreter(*sample, observe=observe)
            found.append([seen[value] for value in wanted])
        return found

    def assumed_of(self, part: str | None) -> list[str]:
        """What was taken for granted about a part."""
        told = [each for each in self.assumed if part is None or belongs(each.partition(":")[0], (part,))]
        return [*told, *([RANDOM] if lacks_inputs(self.compiled) else [])]


def _hint(compiled: Compiled, part: str | None) -> str:
    """What to do about a module that has no hardware."""
    if "legalize-hardware" not in compiled.pipeline:
        return "\ncompile the model with the pass legalize-hardware (in a recipe: passes: [legalize-hardware])"
    return "" if part is not None else "\na part of the model may have hardware: --part model.layers.0"


def lacks_inputs(compiled: Compiled) -> bool:
    """Whether nothing but a user can say what goes in: a plain module that was loaded, whose inputs are numbers."""
    arguments = compiled.function.body.block.args
    fixed = all(isinstance(element_of(argument), FixedType) for argument in arguments)
    source = compiled.source
    return fixed and not source.inputs and getattr(source.model, "main_input_name", None) is None


def _random(arguments: Sequence[SSAValue], count: int) -> list[list[Tensor]]:
    """Normally distributed numbers, of which one in ten thousand leaves an input's range, from a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ranges = [2.0 ** (width - 1 - fraction) for width, fraction in map(pair, arguments)]
    return [
        [torch.randn(shape_of(a), generator=generator) * most / 4 for a, most in zip(arguments, ranges, strict=True)]
        for _ in range(count)
    ]


def _samples(compiled: Compiled, arguments: Any, count: int, given: Any) -> list[list[Tensor]]:
    """Inputs of the static module: those for calibration, cut or repeated to its sizes."""
    if given is None and lacks_inputs(compiled):
        return _random(list(arguments), count)
    own = {argument.name_hint: argument for argument in compiled.function.body.block.args}
    wanted = [own[argument.name_hint] for argument in arguments]
    found = calibration_inputs(compiled.source, list(own.values()), given, count)
    place = {name: index for index, name in enumerate(own)}
    fitted = [
        [_fitted(sample[place[w.name_hint]], shape_of(a)) for w, a in zip(wanted, arguments, strict=True)]
        for sample in found
    ]
    rolled = fitted[:]
    while len(rolled) < count:
        turn = len(rolled) // len(fitted)
        rolled += [[tensor.roll(turn, -1) for tensor in sample] for sample in fitted]
    return rolled[:count]


def _fitted(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor cut, or repeated, to a shape of its rank."""
    for axis, size in enumerate(shape):
        times = -(-size // tensor.shape[axis])
        tensor = tensor.repeat([times if other == axis else 1 for other in range(tensor.ndim)]).narrow(axis, 0, size)
    return tensor.contiguous()
