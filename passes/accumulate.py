"""`accumulate`: the accumulator of linear layers, those of experts included, whose operands are quantized."""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..dialects.accumulator import AccumulatorAttr
from ..dialects.errors import UsageError
from ..dialects.operations.contraction import ExpertLinearOp, LinearOp, why_no_accumulator
from ._sites import module_name
from .quantize import matches


@dataclass(frozen=True)
class Accumulate(ModulePass):
    """Sum the products of linear layers, also of experts, exactly inside a block, then in `format`, as hardware does.

    `match` chooses modules as in `quantize`; a layer whose operands have no codes (one is wide) is left as it is.
    `format` is f32, bf16 or e8m1 to e8m23; `rounding` of the accumulator is rne or rtz; `partials` sums are formed in
    turn and added at the end. Raises UsageError where no layer is changed.
    """

    name = "accumulate"

    match: str = "*"
    format: str = "f32"
    rounding: str = "rne"
    partials: int = 1

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        accumulator = AccumulatorAttr.of(self.format, self.rounding, self.partials)
        layers = [layer for layer in op.walk() if isinstance(layer, LinearOp | ExpertLinearOp)]
        matched = [layer for layer in layers if matches(self.match, module_name(layer))]
        if not matched:
            raise UsageError(f"accumulate: no linear layer is called {self.match!r}; the module has {len(layers)}")
        reasons = [why_no_accumulator(layer) for layer in matched]
        if all(reasons):
            raise UsageError(f"accumulate: no layer takes an accumulator: {reasons[0]} (quantize both operands first)")
        for layer, reason in zip(matched, reasons, strict=True):
            if reason is None:
                layer.acc = accumulator
