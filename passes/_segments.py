"""A module cut into segments that run one after the other, so that the weights of one are held at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from xdsl.dialects.builtin import TensorType
from xdsl.dialects.func import ReturnOp
from xdsl.ir import Block, SSAValue

from ..dialects.operations._operation import Operation
from ..dialects.operations._shapes import product, shape_of
from ..dialects.operations.parameter import ParameterOp
from ._observed import Plan

TARGET = 32 << 20
"""Bytes of f32 weights of a segment, about: small layers run together."""

NEAR = 32
"""Operations before and behind a place among which it must be the narrowest to be cut."""


@dataclass
class Segment:
    """Operations that run together; `imports` come from earlier segments or the inputs, later ones read `exports`.

    `dead` are the values that nobody reads once an operation has run, by its place; `last_read` those of the imports
    that no later segment reads.
    """

    operations: list[Operation]
    imports: list[SSAValue] = field(default_factory=list)
    exports: list[SSAValue] = field(default_factory=list)
    dead: list[list[SSAValue]] = field(default_factory=list)
    last_read: list[SSAValue] = field(default_factory=list)


def fixed_values(block: Block) -> set[SSAValue]:
    """What follows from parameters alone, and is computed where it is read."""
    found: set[SSAValue] = set()
    for op in block.ops:
        follows = bool(op.operands) and all(operand in found for operand in op.operands)
        if isinstance(op, ParameterOp) or (follows and isinstance(op, Operation)):
            found.update(op.results)
    return found


def reads(op: Operation, plan: Plan, fixed: set[SSAValue]) -> list[SSAValue]:
    """What must be there when an operation runs: its operands, and the values observed then."""
    values, products = plan.at(op)
    every = [*op.operands, *(each.value for each in (*values, *products))]
    return [value for value in dict.fromkeys(every) if value not in fixed]


def segments_of(block: Block, plan: Plan, fixed: set[SSAValue]) -> list[Segment]:
    """The block in segments, cut where few values live, together about `TARGET` bytes of weights in each.

    Every reader of a weight lies in one segment, so that its gradient is whole there.
    """
    steps = [op for op in block.ops if isinstance(op, Operation) and not set(op.results) <= fixed]
    returned = [value for op in block.ops if isinstance(op, ReturnOp) for value in op.operands]
    read = [reads(op, plan, fixed) for op in steps]
    last: dict[SSAValue, int] = {}
    for place, values in enumerate(read):
        last.update(dict.fromkeys(values, place))
    last.update(dict.fromkeys(returned, len(steps)))
    cuts = _cuts(steps, read, last, _weight_bytes(steps, fixed), _held_together(steps, plan))
    found = [Segment(steps[begin:end]) for begin, end in zip([0, *cuts], [*cuts, len(steps)], strict=True)]
    begin = 0
    for segment in found:
        _fill(segment, begin, read, last)
        begin += len(segment.operations)
    return found


def _fill(segment: Segment, begin: int, read: list[list[SSAValue]], last: dict[SSAValue, int]) -> None:
    made: set[SSAValue] = set()
    end = begin + len(segment.operations)
    imports: dict[SSAValue, None] = {}
    for place, op in enumerate(segment.operations, begin):
        imports |= dict.fromkeys(value for value in read[place] if value not in made)
        made.update(op.results)
        here = [*read[place], *op.results]
        segment.dead.append([value for value in dict.fromkeys(here) if last.get(value, place) == place])
    segment.imports = list(imports)
    segment.last_read = [value for value in imports if last[value] < end]
    produced = [result for op in segment.operations for result in op.results]
    segment.exports = [value for value in produced if last.get(value, -1) >= end]


def _weight_bytes(steps: list[Operation], fixed: set[SSAValue]) -> list[int]:
    """Bytes in f32 of the parameters that each operation reads first."""
    seen: set[SSAValue] = set()
    found: list[int] = []
    for op in steps:
        new = {value for value in op.operands if value in fixed} - seen
        seen |= new
        found.append(sum(4 * product(shape_of(v)) for v in new if isinstance(v.type, TensorType)))
    return found


def _held_together(steps: list[Operation], plan: Plan) -> list[tuple[int, int]]:
    """Stretches that no cut may part: from the first to the last reader of each weight."""
    places = {op: place for place, op in enumerate(steps)}
    spans: dict[SSAValue, list[int]] = {}
    for operation, operand in plan.asked:
        unit = plan.gradients[plan.asked[operation, operand].gradients or ""]
        if unit.is_weight and not unit.is_table and isinstance(operation, Operation) and operation in places:
            spans.setdefault(unit.value, []).append(places[operation])
    return [(min(found), max(found)) for found in spans.values()]


def _cuts(
    steps: list[Operation],
    read: list[list[SSAValue]],
    last: dict[SSAValue, int],
    weights: list[int],
    together: list[tuple[int, int]],
) -> list[int]:
    """Places before which a segment begins, without the first."""
    alive = _alive(steps, read, last)
    forbidden = set[int]()
    for begin, end in together:
        forbidden.update(range(begin + 1, end + 1))
    waists = [
        place
        for place in range(1, len(steps))
        if alive[place] == min(alive[max(1, place - NEAR) : place + NEAR + 1]) and place not in forbidden
    ]
    cuts: list[int] = []
    begin, held = 0, 0
    for place, end in pairwise([*waists, len(steps)]):
        held += sum(weights[begin:place])
        begin = place
        if held and held + sum(weights[place:end]) > TARGET:
            cuts.append(place)
            held = 0
    return cuts


def _alive(steps: list[Operation], read: list[list[SSAValue]], last: dict[SSAValue, int]) -> list[int]:
    """How many values live before each operation."""
    change = [0] * (len(steps) + 2)
    begun: set[SSAValue] = set()
    for place, op in enumerate(steps):
        for value in (*read[place], *op.results):
            if value not in begun:
                begun.add(value)
                change[place + 1] += 1
                change[last.get(value, place) + 1] -= 1
    counts, total = [], 0
    for place in range(len(steps) + 1):
        total += change[place]
        counts.append(total)
    return counts
