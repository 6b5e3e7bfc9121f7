"""That an operation is computed in integers, as dataflow hardware does it: `#mx.integer<8>`."""

from __future__ import annotations

from collections.abc import Sequence

from xdsl.dialects.builtin import IntAttr
from xdsl.ir import Attribute, ParametrizedAttribute
from xdsl.irdl import irdl_attr_definition, param_def
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

FEWEST, MOST = 2, 12
"""log2 of the entries of a table, at least and at most."""


@irdl_attr_definition
class IntegerMeaningAttr(ParametrizedAttribute):
    """`#mx.integer<8>`: the operation means its function in `dialects.integer`, with tables of 2^8 entries.

    Its operands and its result are then fixed point, and every step in between is exact integer arithmetic.
    """

    name = "mx.integer"
    table_bits: IntAttr = param_def(converter=IntAttr.get)

    def verify(self) -> None:
        if not FEWEST <= self.table_bits.data <= MOST:
            raise VerifyException(
                f"a table has 2^{FEWEST} to 2^{MOST} entries, got 2^{self.table_bits.data}: "
                f"the number is their logarithm, {FEWEST} to {MOST}"
            )

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        with parser.in_angle_brackets():
            return [IntAttr(parser.parse_integer())]

    def print_parameters(self, printer: Printer) -> None:
        printer.print_string(f"<{self.table_bits.data}>")
