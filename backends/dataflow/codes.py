"""How formats lie on wires: elements and scales by their numbers, taken from the types."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from xdsl.dialects.builtin import FloatNonfiniteBehavior, NoneAttr, f8E8M0FNU, f32
from xdsl.ir import Attribute

from ...dialects.errors import MxloomError
from ...dialects.formats import BlockType, is_wide
from ...dialects.formats._builtin import numbers_of
from ...dialects.formats._element import Element, Fixed, Minifloat, Trit
from ...dialects.formats._plain import Plain
from ...dialects.formats._scale import minifloat_of_scale
from ...dialects.formats.mixed import MixedType


@dataclass(frozen=True)
class ElementCode:
    """One number of `bits` bits: a whole multiple of 2^unit, of magnitude `largest` x 2^unit at most.

    A fixed-point number has no exponent bits. `nan` says which codes are no numbers: none, the one with all bits set
    (`code`), or all with the highest exponent (`exponent`).
    """

    bits: int
    exponent_bits: int
    mantissa_bits: int
    unit: int
    largest: int
    nan: str = "none"

    @classmethod
    def of(cls, element: Element) -> ElementCode:
        """The code of an element. Raises MxloomError for one that hardware does not read."""
        if isinstance(element, Fixed):
            largest = 1 if isinstance(element, Trit) else 1 << (element.bits - 1)
            return cls(element.bits, 0, 0, -element.fraction, largest)
        if not isinstance(element, Minifloat):
            raise MxloomError(f"hardware reads fixed-point numbers and minifloats, got {element}")
        semantics = element.semantics
        exponent_bits = semantics.bitwidth - 1 - semantics.mantissa_bits
        unit = element.lowest_exponent - semantics.mantissa_bits
        nan = "none"
        if semantics.nonfinite is FloatNonfiniteBehavior.IEEE:
            nan = "exponent"
        elif element.nan_code is not None:
            nan = "code"
        largest = round(element.largest * 2.0**-unit)
        return cls(semantics.bitwidth, exponent_bits, semantics.mantissa_bits, unit, largest, nan)

    @property
    def is_fixed(self) -> bool:
        return self.exponent_bits == 0

    @property
    def significand_bits(self) -> int:
        """Bits that meet in a multiplier."""
        return self.bits if self.is_fixed else self.mantissa_bits + 1

    @property
    def largest_shift(self) -> int:
        """How far a significand is shifted to the left at most."""
        if self.is_fixed:
            return 0
        return (1 << self.exponent_bits) - 2 - (self.nan == "exponent")

    @property
    def largest_code(self) -> int:
        """The code of the largest magnitude, without its sign; of a minifloat."""
        return (1 << (self.bits - 1)) - 1 - {"none": 0, "code": 1, "exponent": 1 << self.mantissa_bits}[self.nan]


@dataclass(frozen=True)
class ScaleCode:
    """A factor: significand x 2^(exponent + unit); `significand_bits` 0 is a power of two."""

    bits: int
    exponent_bits: int
    mantissa_bits: int
    unit: int
    nan: str

    @property
    def significand_bits(self) -> int:
        return self.mantissa_bits + 1 if self.mantissa_bits else 0

    @property
    def largest_exponent(self) -> int:
        """The largest number in the exponent's field that means a number, less the 1 that subnormals have too."""
        return (1 << self.exponent_bits) - 1 - (self.nan == "exponent") - (self.mantissa_bits > 0)


E8M0 = ScaleCode(8, 8, 0, -127, "code")
F32 = ScaleCode(32, 8, 23, -126 - 23, "exponent")


def scale_code(scale: Attribute) -> ScaleCode:
    """The code of a block's scale."""
    if scale == f8E8M0FNU:
        return E8M0
    if scale == f32:
        return F32
    number = ElementCode.of(minifloat_of_scale(scale))
    return ScaleCode(number.bits, number.exponent_bits, number.mantissa_bits, number.unit, number.nan)


@dataclass(frozen=True)
class OperandCode:
    """A contraction's operand: elements in blocks along the sum.

    `elements` has one entry, or two where each block is one of two kinds (low, high), told apart by one bit. `block` is
    None where no scale changes along the sum; `block_rows` rows share a scale, all of them where it is None.
    `tensor_scale` says that one f32 factor of the whole tensor follows.
    """

    name: str
    elements: tuple[ElementCode, ...]
    scale: ScaleCode | None = None
    block: int | None = None
    tensor_scale: bool = False
    block_rows: int | None = 1

    @cached_property
    def code_bits(self) -> int:
        return max(element.bits for element in self.elements)

    @property
    def is_mixed(self) -> bool:
        return len(self.elements) == 2

    @property
    def side_bits(self) -> int:
        """Bits that stand beside a block's codes: scale and kind."""
        return (self.scale.bits if self.scale else 0) + self.is_mixed

    @property
    def unit(self) -> int:
        """The exponent that the codes of both kinds are whole multiples of."""
        return min(element.unit for element in self.elements)

    @property
    def largest(self) -> int:
        """The largest magnitude, in multiples of 2^unit."""
        return max(element.largest << (element.unit - self.unit) for element in self.elements)


def operand_code(type: Attribute, size: int) -> OperandCode:
    """How a tensor of a type, whose sum runs over `size` numbers, comes to a contraction.

    Raises MxloomError, naming the type, where no hardware reads it.
    """
    if is_wide(type):
        raise MxloomError(f"{type} has no hardware: quantize the operand")
    if isinstance(type, MixedType):
        low, high = (operand_code(part, size) for part in (type.low, type.high))
        alike = (low.scale, low.block, low.block_rows) == (high.scale, high.block, high.block_rows)
        if not alike or low.tensor_scale or high.tensor_scale:
            raise MxloomError(f"{type}: hardware takes both kinds of blocks of one shape and with one kind of scale")
        elements = (*low.elements, *high.elements)
        return OperandCode(str(type), elements, low.scale, low.block, block_rows=low.block_rows)
    if isinstance(type, BlockType):
        if type.zero != NoneAttr():
            raise MxloomError(f"{type}: zero points have no hardware; use a symmetric format")
        scaling = type.scaling((1,) * len(type.dims))
        block = type.dims[-1]
        length = None if block < 0 or block >= size else block
        scale = scale_code(type.scale)
        tensor_scale = type.tensor_scale != NoneAttr()
        height = None if any(dim < 0 for dim in type.dims[:-1]) else prod(type.dims[:-1])
        return OperandCode(str(type), (ElementCode.of(scaling.element),), scale, length, tensor_scale, height)
    numbers = numbers_of(type)
    if not isinstance(numbers, Plain):
        raise MxloomError(f"{type} has no hardware")
    return OperandCode(str(type), (ElementCode.of(numbers.element_numbers),))
