"""What a compilation yields: the typed module with its weights, callable like the model it came from."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import ArrayAttr, IntegerAttr, ModuleOp, StringAttr
from xdsl.dialects.func import FuncOp

from ..backends.cost import Cost, cost
from ..backends.coverage import Coverage, coverage
from ..backends.stored_tensors import stored_tensors
from ..backends.weight_store import WeightStore
from ..dialects.arguments import whole_number
from ..dialects.errors import UsageError
from ..dialects.formats import MixedType, is_wide
from ..dialects.operations._origin import stored_readers
from ..dialects.operations._shapes import UNKNOWN, element_of, shape_of
from ..dialects.operations.parameter import ParameterOp
from .inputs import completed, field_names, fitted, not_captured
from .model_source import ModelSource

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from ..backends.kernels.conversions import Conversion, Summation


SEQUENCE = 512
"""Tokens of the forward that costs are stated for where nothing else is said."""

LARGEST_SIZE = 2**20
"""Of a batch and of a sequence: torch counts the elements of a tensor in 63 bits."""


@dataclass
class Compiled:
    """A typed module, its weights, and the model it came from.

    Called with the model's inputs by name or in the module's order, it yields the model's outputs (a named tuple with
    None where the model yields it; a bare tensor where the model yields one), with the exact numerics of the types.
    Float inputs of another dtype than the module reads, which is f32 whatever the model's own, are converted: exactly
    from bf16 and f16.
    """

    module: ModuleOp
    weights: WeightStore
    source: ModelSource
    pipeline: str = ""
    recipe: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    evaluation: Any = None

    def __repr__(self) -> str:
        return f"<Compiled {self.source.name} ({self.source.task}): {self.pipeline or 'all wide'}>"

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        from torch import autocast

        arguments = self.arguments(*inputs, **named)
        with autocast(arguments[0].device.type if arguments else "cpu", enabled=False):  # the types say what is narrow
            results = self.emulation(*arguments)
        if not self.outputs:
            return results[0]
        found, absent = iter(results), self._absent
        values = [None if place in absent else next(found) for place in range(len(self.outputs))]
        return namedtuple("Outputs", field_names(self.outputs))(*values)

    @property
    def function(self) -> FuncOp:
        return next(op for op in self.module.body.block.ops if isinstance(op, FuncOp))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the module's inputs, in order."""
        return tuple(a.name_hint or f"input_{i}" for i, a in enumerate(self.function.body.block.args))

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the model's outputs, of those too that are None; empty where the model yields a bare tensor."""
        names = self.function.attributes.get("outputs")
        if not isinstance(names, ArrayAttr):
            return ()
        return tuple(name.data for name in names.data if isinstance(name, StringAttr))

    @property
    def _absent(self) -> tuple[int, ...]:
        """The places of the outputs that are None."""
        places = self.function.attributes.get("absent")
        if not isinstance(places, ArrayAttr):
            return ()
        return tuple(place.value.data for place in places.data if isinstance(place, IntegerAttr))

    @cached_property
    def emulation(self) -> GraphModule:
        """The module as an FX graph that runs on torch tensors; `print(compiled.emulation.code)` reads it."""
        from ..backends.emulate import build

        return build(self.module, self.weights)

    @property
    def conversions(self) -> tuple[Conversion, ...]:
        """The formats that values are rounded into at run time; whether a native kernel does it, or why not."""
        from ..backends.kernels.conversions import conversions

        return conversions(self.emulation)

    @property
    def summations(self) -> tuple[Summation, ...]:
        """The linear layers that state an accumulator; whether a native kernel sums, or why not."""
        from ..backends.kernels.conversions import summations

        return summations(self.emulation)

    def arguments(self, *inputs: Tensor, **named: Tensor) -> list[Tensor]:
        """The inputs in the module's order and dtypes.

        Raises UsageError where one is missing, unknown, given twice, or not of the input's type (rank, sizes that were
        fixed, floats or integers).
        """
        names = self.inputs
        if len(inputs) > len(names):
            raise UsageError(f"{self.source.name} takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)}")
        given = dict(zip(names, inputs, strict=False))
        twice, unknown = sorted(given.keys() & named.keys()), sorted(named.keys() - set(names))
        if twice or unknown:
            what = f"input {twice[0]!r} came twice" if twice else f"unknown input {unknown[0]!r}"
            hint = "" if twice else not_captured(self.source, unknown[0])
            raise UsageError(f"{self.source.name}: {what}; its inputs are {', '.join(names)}{hint}")
        given = completed(given | named, names, self.source.config)
        missing = [n for n in names if n not in given]
        if missing:
            raise UsageError(f"{self.source.name}: input {missing[0]!r} is missing; its inputs are {', '.join(names)}")
        arguments = self.function.body.block.args
        own = [f"{self.source.name}: input {name!r}" for name in names]
        return [fitted(given[n], argument, what) for n, argument, what in zip(names, arguments, own, strict=True)]

    def cost(self, *, batch: int = 1, sequence: int | None = None) -> Cost:
        """Bits, bytes, MACs and memory traffic, per site and in total, for one forward of batch x sequence.

        The sequence is 512 where none is given, or what the model's table of positions holds if that is less.
        """
        return cost(self.module, self.weights, sizes=self.sizes(batch, sequence), state=self.source.state)

    def coverage(self, *, batch: int = 1, sequence: int | None = None) -> Coverage:
        """Which share of MACs and bytes has which format, and what stayed wide, and why; sizes as in `cost`."""
        return coverage(self.module, self.weights, sizes=self.sizes(batch, sequence), state=self.source.state)

    @property
    def usual_sequence(self) -> int:
        """512, or what the model's table of positions holds if that is less."""
        from .evaluated import positions

        return min(SEQUENCE, positions(self.source.config) or SEQUENCE)

    def sizes(self, batch: int, sequence: int | None = None) -> list[tuple[int, ...]]:
        """The shape of every input, its dynamic sizes filled in: the first is the batch, the others the sequence."""
        whole_number("batch", batch, 1, LARGEST_SIZE)
        sequence = self.usual_sequence if sequence is None else sequence
        whole_number("sequence", sequence, 1, LARGEST_SIZE)
        shapes = [shape_of(a) for a in self.function.body.block.args]
        fill = (batch, *[sequence] * 8)
        return [tuple(f if d == UNKNOWN else d for d, f in zip(shape, fill, strict=False)) for shape in shapes]

    def packed(self) -> tuple[ModuleOp, WeightStore]:
        """The module with each quantized weight as a parameter of its format, and the store that holds it."""
        from ..passes._context import CompileContext
        from ..passes.pack import Pack

        module, weights = self.module.clone(), self.weights.copy()
        Pack().apply(CompileContext(weights=weights), module)
        return module, weights

    def report(self) -> dict[str, Any]:
        """Everything worth knowing about the compilation, for JSON: model, pipeline, cost, coverage, provenance."""
        return {
            "model": self.source.name,
            "task": self.source.task,
            "pipeline": self.pipeline,
            "recipe": self.recipe,
            "cost": self.cost().to_json(),
            "coverage": self.coverage().to_json(),
            "evaluation": self.evaluation and self.evaluation.to_json(),
            "notes": self.notes(),
            "provenance": self.provenance,
        }

    def _twice_stored(self) -> list[str]:
        """A line for each weight that its uses read in different formats, which the file holds once for each."""
        formats = dict[str, list[str]]()
        for tensor in stored_tensors(self.module, self.weights, self.source.state):
            formats.setdefault(self.weights.canonical(tensor.name), []).append(tensor.format)
        return [
            f"{name} is stored {len(own)} times, as {' and '.join(own)}: its uses read it in different formats"
            for name, own in formats.items()
            if len(own) > 1
        ]

    def undecided(self) -> list[str]:
        """A line on the weights whose size the cost does not know: packing them decides how many blocks are high."""
        found: dict[str, None] = {}
        for op in self.module.walk():
            if isinstance(op, ParameterOp) and is_wide(element_of(op.result)):
                casts = [cast for cast in stored_readers(op) if cast is not None]
                if any(isinstance(element_of(cast.result), MixedType) for cast in casts):
                    found[op.source.data] = None
        if not found:
            return []
        return [
            f"{len(found)} weights in mixed formats are counted as the most that they can take: a threshold decides "
            f"which blocks are high when they are packed: {', '.join(list(found)[:3])}"
            f"{', ...' if len(found) > 3 else ''}"
        ]

    def _coarse(self) -> list[str]:
        """A line on the values whose range is too small to have significant bits (`legalize-hardware`)."""
        named = self.function.attributes.get("coarse")
        names = (
            [each.data for each in named.data if isinstance(each, StringAttr)] if isinstance(named, ArrayAttr) else []
        )
        if not names:
            return []
        return [
            f"{len(names)} values were 0, or so small that fixed point leaves them fewer than 8 significant bits, in "
            f"all calibration inputs: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        ]

    def notes(self) -> list[str]:
        """What is unusual: about the checkpoint, what passes told, and what the formats did to it."""
        told = self.provenance.get("notes", [])
        return [*self.source.notes, *told, *self._twice_stored(), *self.undecided(), *self._coarse()]

    def save(self, directory: str | Path) -> Path:
        """Write the artefact folder (see `mxloom.load`)."""
        from .artefact import save

        return save(self, directory)

    def to_hf(self) -> Any:
        """A Hugging Face model with these numerics whose `generate()` works with its cache."""
        from .hugging_face import to_hf

        return to_hf(self)
