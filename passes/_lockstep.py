"""A module and its float model run side by side, operation by operation, over calibration inputs.

What an operation is about to read is seen in both, so that a pass can choose its weights for the inputs that it will
really have: those that casts have rounded, behind weights that are rounded already. What it chooses is then run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from xdsl.dialects.builtin import ModuleOp
from xdsl.dialects.func import ReturnOp
from xdsl.ir import SSAValue

from ..backends.reference import body, results
from ..dialects.errors import MxloomError
from ..dialects.operations._operation import Operation
from ..dialects.operations.contraction import Contraction, ExpertLinearOp
from ..dialects.operations.parameter import ParameterOp
from ._bare import bare
from ._observed import Products, geometry
from ._samples import Sample
from ._segments import fixed_values
from ._sites import Site, root, sites_of
from ._sums import parts_of
from ._sweep import parameter_values

if TYPE_CHECKING:
    from torch import Tensor

    from ..backends.weight_store import WeightStore

Values = dict[SSAValue, Any]


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of the rows that a weight meets, [parts, K, K] f64: parts are experts, or groups of a convolution.

    With X the rows of the float model and Y those of the module: `own` = 2 Y^T Y / rows, `cross` = 2 X^T Y / rows.
    """

    rows: Tensor
    own: Tensor
    cross: Tensor


Choose = Callable[[list[Site], Moments], None]
"""Told, before an operation runs, which of its weights are meant and what rows they meet."""


@dataclass
class Lockstep:
    """The two runs. `chosen` are the operands to be asked about, by operation."""

    module: ModuleOp
    weights: WeightStore
    samples: Sequence[Sample]
    chosen: dict[Operation, list[Site]]
    _kept: dict[tuple[object, ...], Moments] = field(default_factory=dict)

    def run(self, choose: Choose) -> None:
        """Run both over all samples; `choose` may change the weights of the operation that it is told of."""
        import torch

        self._float, twins = bare(self.module, self.weights)
        own, other = _Run(self.module, self.weights, self.samples), _Run(self._float, self.weights, self.samples)
        with torch.no_grad():
            for op in list(body(self.module).ops):
                if isinstance(op, ReturnOp) or not isinstance(op, Operation):
                    continue
                twin = cast("Operation | None", twins.get(op))
                if op in self.chosen and twin is not None:
                    choose(self.chosen[op], self._moments(op, twin, own, other))
                    own.refresh(op)
                if op.parent is not None:
                    own.step(op)
                if twin is not None and twin.parent is not None:
                    other.step(twin)

    def _moments(self, op: Operation, twin: Operation, own: _Run, other: _Run) -> Moments:
        site = next(s for s in sites_of(op) if s.role == "activation")
        operation = cast(Contraction, op)
        key = (site.value, *geometry(operation, site.operand))
        if key not in self._kept:
            self._kept.clear()  # operations that read one value stand together
            self._kept[key] = self._summed(site, cast(Contraction, twin), own, other)
        return self._kept[key]

    def _summed(self, site: Site, twin: Contraction, own: _Run, other: _Run) -> Moments:
        import torch

        operation = cast(Contraction, site.operation)
        products, plain = Products(site.name, operation, site.operand), Products(site.name, twin, site.operand)
        size = (products.parts, products.size, products.size)
        rows = torch.zeros(products.parts, dtype=torch.int64)
        moments = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for number, sample in enumerate(self.samples):
            seen = own.value(number, site.value), other.value(number, root(getattr(twin, site.operand)))
            index = own.value(number, operation.index) if isinstance(operation, ExpertLinearOp) else None
            pairs = zip(
                parts_of(products, seen[0], index, sample), parts_of(plain, seen[1], index, sample), strict=True
            )
            for part, (mine, wide) in enumerate(pairs):
                mine, wide = mine.float(), wide.float()
                if not bool(mine.isfinite().all()):
                    raise MxloomError(f"{site.name}: NaN or infinite values reach it in calibration input {number}")
                rows[part] += len(mine)
                moments[0][part] += mine.T @ mine
                moments[1][part] += wide.T @ mine
        if not int(rows.sum()):
            raise MxloomError(f"{site.name} was reached 0 times in calibration (tokens 0)")
        scale = 2 / rows.clamp(min=1).reshape(-1, 1, 1)
        return Moments(rows, moments[0] * scale, moments[1] * scale)


class _Run:
    """The values of one module for all samples, each kept until its last reader has run."""

    def __init__(self, module: ModuleOp, weights: WeightStore, samples: Sequence[Sample]) -> None:
        self.block, self.weights = body(module), weights
        self.fixed = fixed_values(self.block)
        self.values: list[Values] = [dict(zip(self.block.args, s.inputs, strict=True)) for s in samples]
        self.constants: Values = {}
        self._left: dict[SSAValue, int] = {}

    def step(self, op: Operation) -> None:
        """Run an operation for all samples, unless it follows from parameters alone."""
        if all(result in self.fixed for result in op.results) or isinstance(op, ParameterOp):
            return
        call = op.shape_call() if isinstance(op, Contraction) else op.call()
        for number, held in enumerate(self.values):
            given = {operand: self.value(number, operand) for operand in op.operands}
            held |= zip(op.results, results(op, call, given), strict=True)
        for operand in set(op.operands):
            self._read(operand, op)
        self.constants = {k: v for k, v in self.constants.items() if k not in op.operands}

    def value(self, number: int, value: SSAValue) -> Any:
        held = self.values[number]
        return held[value] if value in held else self._constant(value)

    def refresh(self, op: Operation) -> None:
        """Forget the constants that an operation reads: a pass has changed them."""
        self.fixed = fixed_values(self.block)
        self.constants.clear()

    def _read(self, value: SSAValue, op: Operation) -> None:
        """Let go of a value whose last reader has run."""
        if value in self.fixed:
            return
        if value not in self._left:
            self._left[value] = len({use.operation for use in value.uses})
        self._left[value] -= 1
        if self._left[value] == 0:
            for held in self.values:
                held.pop(value, None)

    def _constant(self, value: SSAValue) -> Tensor:
        if value not in self.constants:
            owner = cast(Operation, value.owner)
            if isinstance(owner, ParameterOp):
                self.constants[value] = parameter_values(owner, self.weights)
            else:
                given = {operand: self._constant(operand) for operand in owner.operands}
                self.constants |= zip(owner.results, results(owner, owner.call(), given), strict=True)
        return self.constants[value]
