"""`accumulate`: the accumulator of linear layers, those of experts included, whose operands are quantized."""

from __future__ import annotations

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import ModuleOp
from xdsl.passes import ModulePass

from ..dialects.accumulator import AccumulatorAttr
from ..dialects.errors import UsageError
from ..dialects.operations.contraction import ExpertLinearOp, LinearOp, why_no_accumulator
from ..dialects.operations.parameter import ParameterOp
from ._sites import module_name, root
from .quantize import matches, nearest


@dataclass(frozen=True)
class Accumulate(ModulePass):
    """Sum the products of linear layers, also of experts, exactly inside a block, then in `format`, as hardware does.

    Several in a row are a list, and the first match wins. `match` chooses modules as in `quantize`; a layer whose
    operands have no codes (one is wide), or whose weight or bias the model computes, is left as it is.
    `format` is f32, bf16 or e8m1 to e8m23; `rounding` of the accumulator is rne or rtz; `partials` sums are formed in
    turn and added at the end. Raises UsageError where no layer is changed.
    """

    name = "accumulate"

    match: str = "*"
    format: str = "f32"
    rounding: str = "rne"
    partials: int = 1

    def __post_init__(self) -> None:
        self.accumulator()  # a wrong one is told before anything runs

    def accumulator(self) -> AccumulatorAttr:
        """The accumulator that the options state. Raises UsageError where there is none such."""
        return AccumulatorAttr.of(self.format, self.rounding, self.partials)

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        layers = [layer for layer in op.walk() if isinstance(layer, LinearOp | ExpertLinearOp)]
        matched = [layer for layer in layers if matches(self.match, module_name(layer))]
        if not matched:
            near = nearest(self.match, [module_name(layer) for layer in layers])
            raise UsageError(f"accumulate: {self.match!r} matches 0 of {len(layers)} linear layers{near}")
        reasons = [_why_not(layer) for layer in matched]
        if all(reasons):
            raise UsageError(
                f"accumulate: no layer takes an accumulator: {reasons[0]}. One goes to layers that no earlier "
                "accumulate matched, with both operands in formats by rules before, and with stored weight and bias"
            )
        accumulator = self.accumulator()
        for layer, reason in zip(matched, reasons, strict=True):
            if reason is None:
                layer.acc = accumulator


def _why_not(layer: LinearOp | ExpertLinearOp) -> str | None:
    if layer.acc is not None:
        return "an earlier accumulate decided"
    for name, value in (("weight", layer.weight), ("bias", layer.bias)):
        # Weights are packed once, before the model runs, from what the checkpoint holds.
        if value is not None and not isinstance(root(value).owner, ParameterOp):
            return f"the {name} is computed in the model"
    return why_no_accumulator(layer)
