"""From a typed, static module to a design: one stage for each operation, and the streams between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from xdsl.dialects.builtin import IntegerType, ModuleOp, TensorType
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Attribute, SSAValue

from ...dialects.errors import MxloomError
from ...dialects.formats import FixedType, is_wide, quantize
from ...dialects.integer import Point
from ...dialects.names import identifier, unique
from ...dialects.operations._operation import Operation
from ...dialects.operations._shapes import element_of, shape_of, text
from ...dialects.operations._values import path_of
from ...dialects.operations.cast import CastOp
from ...dialects.operations.parameter import ParameterOp
from ..reference import Weights, body
from .flow import Flow, in_order, row_major
from .graph import Boundary, Graph, Place
from .keywords import port_name

if TYPE_CHECKING:
    from torch import Tensor

Lowering = Callable[["Design", Any], None]
LOWERINGS: dict[str, Lowering] = {}
"""How each operation becomes stages, by its name."""


def lowers(*names: str) -> Callable[[Lowering], Lowering]:
    """The function that makes stages of the operations with these names."""

    def keep(function: Lowering) -> Lowering:
        for name in names:
            LOWERINGS[name] = function
        return function

    return keep


@dataclass
class Design:
    """A design in the making: its stages so far, where values are found, and the quantizers that readers share.

    `streamed` names the linear layers whose weights come from outside.
    """

    weights: Weights
    streamed: frozenset[str] = frozenset()
    graph: Graph = field(default_factory=Graph)
    flows: dict[SSAValue, Flow] = field(default_factory=dict)
    quantized: dict[tuple[Any, ...], Place] = field(default_factory=dict)

    def flow(self, value: SSAValue, operation: Operation) -> Flow:
        """Where a value is found. Raises MxloomError for one that no stage gives."""
        if value not in self.flows:
            raise refusal(operation, f"its operand {path_of(value) or value.type} is no stream of fixed-point numbers")
        return self.flows[value]

    def constant(self, value: SSAValue) -> Tensor | None:
        """The values of a parameter, casts applied; None for what the model computes."""
        owner = value.owner
        if isinstance(owner, ParameterOp):
            element = element_of(value)
            if is_wide(element):
                return self.weights.wide(owner.source.data)
            return self.weights.encoded(owner.source.data, element, shape_of(value)).decode()
        if isinstance(owner, CastOp):
            found = self.constant(owner.input)
            return None if found is None else quantize(found, element_of(value), owner.how())
        return None

    def give(self, operation: Operation, place: Place, result: int = 0) -> None:
        """Note where an operation's result is found: a stream in the row-major order of its shape."""
        value = operation.results[result]
        self.flows[value] = Flow.whole(place, point_of(value, operation), shape_of(value))


def lower(module: ModuleOp, weights: Weights, streamed: frozenset[str] = frozenset()) -> Graph:
    """The design of a module whose shapes are all known and whose values are fixed point or of narrow formats.

    The weights of the linear layers whose sites (`Node.site`) are `streamed` come from outside.
    Raises MxloomError, naming the operation and its place in the model, for all that has no hardware, at once.
    """
    from . import lowerings  # noqa: F401  (fills LOWERINGS)

    block = body(module)
    design = Design(weights, streamed)
    refused: list[str] = []
    for argument in block.args:
        name = port_name(argument.name_hint or f"input_{argument.index}")
        name = unique(name, lambda each: any(each == other.name for other in design.graph.inputs))
        boundary = Boundary(name, _input_point(argument), shape_of(argument))
        design.graph.inputs.append(boundary)
        design.flows[argument] = Flow.whole(Place("", name), boundary.point, boundary.shape)
    for operation in block.ops:
        if isinstance(operation, ReturnOp):
            _outputs(design, operation)
        elif operation.name in LOWERINGS:
            try:
                LOWERINGS[operation.name](design, operation)
            except MxloomError as error:
                refused.append(str(error))
                _skip(design, operation)
        elif isinstance(operation, Operation):
            refused.append(str(refusal(operation, "the operation has no hardware")))
            _skip(design, operation)
    if refused:
        raise MxloomError("no hardware for this module:\n" + "\n".join(f"  {line}" for line in refused))
    if not design.graph.nodes:
        raise MxloomError("no hardware for this module: it gives back what it is given")
    return design.graph


def _skip(design: Design, operation: Any) -> None:
    """Stand in for what an operation would give, so that every fault is told once."""
    for value in operation.results:
        if isinstance(value.type, TensorType):
            shape = shape_of(value)
            design.flows[value] = Flow(Place("", ""), Point(24, 0), shape, row_major(shape), prod(shape))


def _outputs(design: Design, operation: ReturnOp) -> None:
    graph = design.graph
    taken: set[str] = {each.name for each in (*graph.inputs, *graph.streamed)}
    for index, value in enumerate(operation.arguments):
        base = port_name(path_of(value) or f"output_{index}")
        name = next(n for n in (base, *(f"{base}_out{i}" for i in range(index + 2))) if n not in taken)
        taken.add(name)
        if value not in design.flows:
            raise MxloomError(
                f"the output {path_of(value)} {text(shape_of(value))} is no stream of fixed-point numbers"
            )
        flow = design.flows[value]
        graph.outputs.append(Boundary(name, flow.point, flow.shape))
        graph.connect(in_order(graph, flow, site_of_value(value)), Place("", name))


def refusal(operation: Operation, why: str) -> MxloomError:
    """An error that names the operation and its place in the model."""
    return MxloomError(f"{path_of(operation.results[0]) or operation.name} ({operation.name}): {why}")


def check_finite(operation: Operation, value: SSAValue, tensor: Tensor) -> None:
    """Raise MxloomError, naming the operation, for a parameter with NaN, which has no place in a sum of integers."""
    if not bool(tensor.isfinite().all()):
        raise refusal(operation, f"its parameter {value.name_hint} holds NaN or infinity, which hardware does not")


def point_of(value: SSAValue, operation: Operation | None = None) -> Point:
    """The fixed-point format of a value."""
    element = element_of(value)
    if isinstance(element, FixedType):
        return Point(element.width.data, element.fraction.data)
    message = f"{path_of(value) or 'a value'} is {element}, not fixed point: run the pass legalize-hardware first"
    raise refusal(operation, message) if operation is not None else MxloomError(message)


def _input_point(argument: SSAValue) -> Point:
    """The format of an input: its own, or that of the cast which alone reads it."""
    if isinstance(element_of(argument), FixedType):
        return point_of(argument)
    if isinstance(element_of(argument), IntegerType):
        raise MxloomError(
            f'the input "{argument.name_hint}" is {argument.type}: streams carry fixed-point numbers, and what looks '
            "values up by whole numbers (an embedding) has no hardware"
        )
    if not is_wide(element_of(argument)):
        raise MxloomError(
            f'the input "{argument.name_hint}" is {argument.type}: streams of a design carry fixed-point numbers; '
            "take the part that rounds this value as well (a whole layer)"
        )
    readers = [use.operation for use in argument.uses]
    if readers and all(isinstance(r, CastOp) and isinstance(element_of(r.result), FixedType) for r in readers):
        points = {point_of(r.results[0]) for r in readers}
        if len(points) == 1:
            return points.pop()
    raise MxloomError(
        f'the input "{argument.name_hint}" is {argument.type} and no cast makes it fixed point: '
        "run the pass legalize-hardware first"
    )


def site_of(operation: Operation) -> str:
    """The name of an operation's place in the model, fit for hardware."""
    return site_of_value(operation.results[0]) or identifier(operation.name.removeprefix("mx."))


def site_of_value(value: SSAValue) -> str:
    """The name of a value, fit for hardware."""
    return identifier(path_of(value)) if path_of(value) else ""


def moved(flow: Flow, **changes: Any) -> Flow:
    """The flow with another format or view."""
    return replace(flow, **changes)


def attribute_number(attribute: Attribute | None, default: Any = None) -> Any:
    """The Python number in an attribute."""
    value = getattr(attribute, "value", None)
    return default if value is None else value.data
