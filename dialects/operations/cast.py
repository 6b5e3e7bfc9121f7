"""Rounding as an operation of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, StringAttr, TensorType
from xdsl.irdl import ParsePropInAttrDict, irdl_op_definition, operand_def, opt_prop_def, result_def
from xdsl.utils.exceptions import VerifyException

from ..errors import did_you_mean
from ..formats import ROUNDINGS, SCALE_RULES
from ._operation import Call, Operation
from ._shapes import Shape, element_of, shape_of

if TYPE_CHECKING:
    from ..formats import Rounding


@irdl_op_definition
class CastOp(Operation):
    """Round a tensor into the format of the result; the only operation that only rounds.

    `clip` scales the largest value of each block before the scale is chosen, `seed` starts stochastic rounding.
    """

    name = "mx.cast"

    input = operand_def(TensorType)
    result = result_def(TensorType)
    scale_rule = opt_prop_def(StringAttr)
    rounding = opt_prop_def(StringAttr)
    clip = opt_prop_def(FloatAttr)
    seed = opt_prop_def(IntegerAttr)

    irdl_options = (ParsePropInAttrDict(),)
    assembly_format = "$input attr-dict `:` type($input) `to` type($result)"

    def how(self) -> Rounding:
        """The rounding that the properties state."""
        from ..formats import Rounding

        return Rounding(
            scale_rule=self.scale_rule.data if self.scale_rule else None,
            rounding=self.rounding.data if self.rounding else "rne",
            clip=self.clip.value.data if self.clip else None,
            seed=self.seed.value.data if self.seed else 0,
        )

    def result_shape(self) -> Shape:
        return shape_of(self.input)

    def check(self) -> None:
        check_rounding(self, self.scale_rule, self.rounding)
        self.require(
            self.clip is None or self.clip.value.data > 0, "clip must be a positive factor of the largest value"
        )

    def call(self) -> Call:
        from ..torch_operators import quantize_call

        return Call(*quantize_call(self.input, element_of(self.result), self.how()))


def check_rounding(op: Operation, scale_rule: StringAttr | None, rounding: StringAttr | None) -> None:
    """Raise VerifyException where an operation names a scale rule or a rounding that nobody knows."""
    for word, kind, known in ((scale_rule, "scale rule", SCALE_RULES), (rounding, "rounding", ROUNDINGS)):
        if word is not None and word.data not in known:
            hint = did_you_mean(word.data, known)
            raise VerifyException(f'{op.name}: unknown {kind} "{word.data}"{hint}; known: {", ".join(known)}')
