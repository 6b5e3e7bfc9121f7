"""Minifloats that builtin lacks: a sign, exponent bits, mantissa bits."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import FloatNonfiniteBehavior, FloatSemantics, IntAttr
from xdsl.ir import Attribute, ParametrizedAttribute
from xdsl.irdl import irdl_attr_definition, param_def
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from ._element import Minifloat
from ._format import Format
from ._plain import Plain


@irdl_attr_definition
class MinifloatType(ParametrizedAttribute, Plain, Format):
    """`!mx.float<3, 1>`: a sign, 3 exponent bits with bias 2^(3-1) - 1, 1 mantissa bit.

    Every code is a number, as in the FP6 and FP4 of OCP MX 1.0 (section 5.3): no infinity, no NaN; subnormals, both
    zeros. Rounding saturates.
    """

    name = "mx.float"
    exponent: IntAttr = param_def(converter=IntAttr.get)
    mantissa: IntAttr = param_def(converter=IntAttr.get)

    @property
    def element_numbers(self) -> Minifloat:
        exponent = self.exponent.data
        bias = (1 << (exponent - 1)) - 1
        return Minifloat(FloatSemantics(exponent, self.mantissa.data, bias, FloatNonfiniteBehavior.FINITE_ONLY))

    @property
    def bits(self) -> float:
        return 1 + self.exponent.data + self.mantissa.data

    def verify(self) -> None:
        if not 1 <= self.exponent.data <= 7:
            raise VerifyException(f"a minifloat has 1 to 7 exponent bits, got {self.exponent.data}")
        if self.mantissa.data < 0 or self.bits > 16:
            raise VerifyException(
                f"a minifloat has at most 16 bits in all, got 1 + {self.exponent.data} + {self.mantissa.data}"
            )

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            exponent = parser.parse_integer()
            parser.parse_punctuation(",")
            return IntAttr(exponent), IntAttr(parser.parse_integer())

    def print_parameters(self, printer: Printer) -> None:
        printer.print_string(f"<{self.exponent.data}, {self.mantissa.data}>")
