"""Rounding as an operation of its own."""

from __future__ import annotations

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, StringAttr, TensorType
from xdsl.ir import Attribute
from xdsl.irdl import ParsePropInAttrDict, irdl_op_definition, operand_def, opt_operand_def, opt_prop_def, result_def
from xdsl.utils.exceptions import VerifyException

from .. import formats
from ..errors import UsageError
from ._operation import Call, Operation
from ._shapes import Shape, broadcast, element_of, fits, shape_of, text


@irdl_op_definition
class CastOp(Operation):
    """Round a tensor into the format of the result; the only operation that only rounds.

    `clip` is the part of each block's largest magnitude that its scale is made for, `seed` starts stochastic rounding,
    `threshold` decides for each block of a mixed format. Fixed-point numbers decide as hardware does: the impact of a
    block is summed exactly, each channel's share times its `sensitivity` (g^2, which broadcasts to the input).
    """

    name = "mx.cast"

    input = operand_def(TensorType)
    sensitivity = opt_operand_def(TensorType)
    result = result_def(TensorType)
    scale_rule = opt_prop_def(StringAttr)
    rounding = opt_prop_def(StringAttr)
    clip = opt_prop_def(FloatAttr)
    seed = opt_prop_def(IntegerAttr)
    threshold = opt_prop_def(FloatAttr)

    irdl_options = (ParsePropInAttrDict(),)
    assembly_format = (
        "$input (`,` `sensitivity` $sensitivity^)? attr-dict `:` type($input) (`,` type($sensitivity)^)? "
        "`to` type($result)"
    )

    def how(self) -> formats.Rounding:
        """The rounding that the properties state. Raises UsageError for a rule or rounding that nobody knows."""
        return formats.Rounding(
            scale_rule=self.scale_rule.data if self.scale_rule else None,
            rounding=self.rounding.data if self.rounding else "rne",
            clip=self.clip.value.data if self.clip else None,
            seed=self.seed.value.data if self.seed else 0,
            threshold=self.threshold.value.data if self.threshold else None,
            exact=isinstance(element_of(self.input), formats.FixedType)
            and isinstance(element_of(self.result), formats.MixedType),
        )

    def result_shape(self) -> Shape:
        return shape_of(self.input)

    def check(self) -> None:
        try:
            how = self.how()
        except UsageError as error:
            raise VerifyException(f"{self.name}: {error}") from None
        self.require(how.seed >= 0, f"a seed is 0 or more, got {how.seed}")
        self.require(
            how.rounding != "stochastic" or self.seed is not None, "stochastic rounding needs a seed: {seed = 0 : i64}"
        )
        check_rule(self, element_of(self.result), how.scale_rule)
        if self.sensitivity is not None:
            given, shape = shape_of(self.sensitivity), shape_of(self.input)
            kind = element_of(self.result)
            self.require(isinstance(kind, formats.MixedType), f"a sensitivity belongs to a mixed format, got {kind}")
            common = broadcast(given, shape)
            self.require(
                common is not None and len(common) == len(shape) and fits(common, shape),
                f"a sensitivity {text(given)} does not broadcast to {text(shape)}",
            )

    def call(self) -> Call:
        from ..torch_operators import quantize_call

        return Call(*quantize_call(self.input, element_of(self.result), self.how(), self.sensitivity))


def check_rule(op: Operation, element: Attribute, rule: str | None) -> None:
    """Raise VerifyException where a format of blocks has no such scale rule."""
    if rule is not None and isinstance(element, formats.BlockType):
        fitting = element.scale_rules()
        op.require(rule in fitting, f'scale rule "{rule}" does not fit {element}; it takes {" or ".join(fitting)}')
