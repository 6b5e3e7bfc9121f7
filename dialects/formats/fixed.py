"""Fixed point: two's complement numbers with a point at a stated place."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import IntAttr
from xdsl.ir import Attribute, ParametrizedAttribute
from xdsl.irdl import irdl_attr_definition, param_def
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from ._element import Fixed
from ._format import Format
from ._plain import Plain


@irdl_attr_definition
class FixedType(ParametrizedAttribute, Plain, Format):
    """`!mx.fixed<8, 6>`: 8 bits, 6 of them after the point; the element of MXINT8 (OCP MX 1.0, section 5.3.4).

    A value is code * 2^-fraction; `fraction` may be negative (`!mx.fixed<8, -3>`: multiples of 8) or exceed the width.
    On its own it uses the full range and saturates at both ends.
    """

    name = "mx.fixed"
    width: IntAttr = param_def(converter=IntAttr.get)
    fraction: IntAttr = param_def(converter=IntAttr.get)

    @property
    def element_numbers(self) -> Fixed:
        return Fixed(self.width.data, self.fraction.data)

    @property
    def bits(self) -> float:
        return self.width.data

    def verify(self) -> None:
        if not 2 <= self.width.data <= 32:
            raise VerifyException(f"a fixed-point format has 2 to 32 bits, a sign among them, got {self.width.data}")
        if not -64 <= self.fraction.data <= 64:
            raise VerifyException(f"the point of a fixed-point format lies within 64 bits, got {self.fraction.data}")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            width = parser.parse_integer()
            parser.parse_punctuation(",")
            return IntAttr(width), IntAttr(parser.parse_integer())

    def print_parameters(self, printer: Printer) -> None:
        printer.print_string(f"<{self.width.data}, {self.fraction.data}>")
