"""How a contraction adds up: `#mx.accumulator<f32>`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from xdsl.dialects.builtin import IntAttr, StringAttr
from xdsl.ir import Attribute, ParametrizedAttribute
from xdsl.irdl import irdl_attr_definition, param_def
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from .errors import UsageError

MANTISSAS = {"f32": 23, "bf16": 7}
"""The accumulators with names of their own; any other is `e8m` and its mantissa bits, `e8m13` for one."""


@irdl_attr_definition
class AccumulatorAttr(ParametrizedAttribute):
    """`#mx.accumulator<e8m13, rtz, 4>`: 8 exponent bits as f32 has them, 13 mantissa bits, rounding, partial sums.

    Inside a segment of K where both operands keep one scale the sum of products is exact, then rounded to f32. It is
    multiplied with the product of the scales and added in one rounding to f32 (a fused multiply-add), and the sum is
    rounded to the accumulator's mantissa: `rne` to nearest, ties to even, or `rtz` towards zero. Segment b goes to
    partial sum b mod n, and the n sums are added in their order, as a pipelined adder does it. Without an accumulator
    a contraction sums as torch does.
    """

    name = "mx.accumulator"
    mantissa: IntAttr = param_def(converter=IntAttr.get)
    rounding: StringAttr = param_def(converter=StringAttr.get)
    partials: IntAttr = param_def(converter=IntAttr.get)

    @classmethod
    def of(cls, format: str = "f32", rounding: str = "rne", partials: int = 1) -> AccumulatorAttr:
        """The accumulator of a format's name: f32, bf16 or e8m1 to e8m23. Raises UsageError for any other."""
        try:
            return cls(_mantissa(format), rounding, partials)  # pyright: ignore[reportArgumentType]
        except VerifyException as error:
            raise UsageError(str(error)) from None

    @property
    def format(self) -> str:
        """The format's name."""
        bits = self.mantissa.data
        return next((name for name, mantissa in MANTISSAS.items() if mantissa == bits), f"e8m{bits}")

    @property
    def label(self) -> str:
        """`f32`, `bf16`, `e8m13 rtz`, `f32 x 4`: for tables."""
        rounding = "" if self.rounding.data == "rne" else f" {self.rounding.data}"
        return f"{self.format}{rounding}" + (f" x {self.partials.data}" if self.partials.data > 1 else "")

    def verify(self) -> None:
        bits = self.mantissa.data
        if not 1 <= bits <= 23:
            raise VerifyException(f"an accumulator has 1 to 23 mantissa bits, got {bits}")
        if self.rounding.data not in ("rne", "rtz"):
            raise VerifyException(f'an accumulator rounds "rne" or "rtz", got "{self.rounding.data}"')
        if bits == 23 and self.rounding.data != "rne":
            raise VerifyException("sums are formed in f32 by rounding to nearest: an f32 accumulator has rounding rne")
        if self.partials.data < 1:
            raise VerifyException(f"an accumulator has at least one partial sum, got {self.partials.data}")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            place = parser.pos
            format = parser.parse_identifier(" (f32, bf16 or e8m13)")
            rounding, partials = "rne", 1
            if parser.parse_optional_punctuation(",") is not None:
                rounding = parser.parse_identifier(" (rne or rtz)")
            if parser.parse_optional_punctuation(",") is not None:
                partials = parser.parse_integer(allow_boolean=False, allow_negative=False)
        try:
            found = cls.of(format, rounding, partials)
        except UsageError as error:
            parser.raise_error(str(error), place, parser.pos)
        return [found.mantissa, found.rounding, found.partials]

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_string(self.format)
            if self.rounding.data != "rne" or self.partials.data != 1:
                printer.print_string(f", {self.rounding.data}")
            if self.partials.data != 1:
                printer.print_string(f", {self.partials.data}")


def _mantissa(format: str) -> int:
    if format in MANTISSAS:
        return MANTISSAS[format]
    found = re.fullmatch(r"e8m([0-9]{1,2})", format)
    if found is None:
        raise UsageError(f'no accumulator is called "{format}": f32, bf16, or e8m1 to e8m23 (e8m13 has 22 bits)')
    return int(found[1])
