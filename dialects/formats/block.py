"""Block formats: elements that share a scale (OCP MX, NVFP4, integers per channel, group or tensor, ternary)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    ArrayAttr,
    IntAttr,
    IntegerType,
    NoneAttr,
    f8E4M3FN,
    f8E5M2,
    f8E8M0FNU,
    f32,
)
from xdsl.ir import Attribute, ParametrizedAttribute, TypeAttribute
from xdsl.irdl import irdl_attr_definition
from xdsl.parser import AttrParser
from xdsl.printer import Printer
from xdsl.utils.exceptions import VerifyException

from ..errors import UsageError
from . import _scaled
from ._builtin import element_of, numbers_of
from ._element import Fixed, Trit
from ._format import POWER_OF_TWO_RULES, SEARCHED_RULES, Format, Given, Layout, Parts, Rounding
from ._plain import byte_stream
from ._scale import SCALE_TYPES, scale_dtype
from ._searched import refuse_clip, rules_of
from ._tiling import Tiling

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@irdl_attr_definition
class BlockType(ParametrizedAttribute, Format):
    """Elements that share one scale, block by block, along the last dimensions of the tensor.

    `!mx.block<32xf4E2M1FN>` is OCP MXFP4: the scale is left out of the text where it is OCP's f8E8M0FNU.
    `!mx.block<16xf4E2M1FN, f8E4M3FN, f32>` is NVFP4: block scales under one f32 scale of the tensor.
    `?` takes a dimension whole; `zero i8` gives every block a zero point of that type.
    """

    name = "mx.block"
    shape: ArrayAttr[IntAttr]
    element: TypeAttribute
    scale: TypeAttribute
    tensor_scale: TypeAttribute | NoneAttr
    zero: TypeAttribute | NoneAttr

    @classmethod
    def of(
        cls,
        dims: Sequence[int],
        element: TypeAttribute,
        scale: TypeAttribute = f8E8M0FNU,
        tensor_scale: TypeAttribute | None = None,
        zero: TypeAttribute | None = None,
    ) -> BlockType:
        """The type of blocks of `dims` (`?` is DYNAMIC_INDEX)."""
        shape = ArrayAttr([IntAttr(dim) for dim in dims])
        return cls(shape, element, scale, tensor_scale or NoneAttr(), zero or NoneAttr())

    def with_dims(self, dims: Sequence[int]) -> BlockType:
        """The same numbers in blocks of another shape."""
        return BlockType(
            ArrayAttr([IntAttr(dim) for dim in dims]), self.element, self.scale, self.tensor_scale, self.zero
        )

    @property
    def dims(self) -> tuple[int, ...]:
        """The block's size along each of the last dimensions; DYNAMIC_INDEX takes the whole one."""
        return tuple(dim.data for dim in self.shape)

    @property
    def bits(self) -> float:
        if DYNAMIC_INDEX in self.dims:
            return numbers_of(self.element).bits
        return numbers_of(self.element).bits + self._bits_beside / prod(self.dims)

    def storage_bits(self, shape: Sequence[int]) -> int:
        tiling = self.tiling(shape)
        codes = element_of(self.element).stream_bits(tiling.stored_elements)
        return codes + prod(tiling.grid) * self._bits_beside + (0 if self.tensor_scale == NoneAttr() else 32)

    @property
    def _bits_beside(self) -> int:
        """Bits of a block's scale and zero point."""
        zero = self.zero.width.data if isinstance(self.zero, IntegerType) else 0
        return int(numbers_of(self.scale).bits) + zero

    @property
    def default_scale_rule(self) -> str:
        """even for minifloats and floor for integers under a power of two; absmax, absmean, minmax under a float."""
        element = element_of(self.element)
        if self.scale == f8E8M0FNU:
            return "floor" if isinstance(element, Fixed) else "even"
        if self.zero != NoneAttr():
            return "minmax"
        return "absmean" if isinstance(element, Trit) else "absmax"

    def scale_rules(self) -> tuple[str, ...]:
        """The scale rules that fit this format, the default first."""
        default, two_levels = self.default_scale_rule, self.tensor_scale != NoneAttr()
        searched = rules_of(self.scale, two_levels, self.zero != NoneAttr())
        if self.scale == f8E8M0FNU:
            return (default, *(rule for rule in POWER_OF_TWO_RULES if rule != default), *searched)
        return ("absmean", "absmax") if default == "absmean" else (default, *searched)

    def tiling(self, shape: Sequence[int]) -> Tiling:
        """How these blocks lie on a tensor of `shape`."""
        if reason := self.why_not(shape):
            raise UsageError(reason)
        return Tiling(tuple(shape), self.dims)

    def why_not(self, shape: Sequence[int]) -> str | None:
        if len(self.dims) <= len(shape):
            return None
        return (
            f"a block of {len(self.dims)} dimensions does not lie on a tensor of {len(shape)}: {self} on {list(shape)}"
            "; give the tensor as many dimensions (reshape), or use a format without blocks"
        )

    def quantize(self, x: Tensor, how: Rounding) -> Tensor:
        return _scaled.quantize(x, self.scaling(x.shape), how, self.rule(how))

    def encode(self, x: Tensor, how: Rounding, given: Given) -> Parts:
        full_range = bool(given) and not given.symmetric
        return _scaled.encode(x, self.scaling(x.shape, full_range=full_range), how, self.rule(how), given)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        return _scaled.decode(parts, self.scaling(parts.codes.shape), dtype)

    def pack(self, parts: Parts) -> Tensor:
        return element_of(self.element).pack(self.tiling(parts.codes.shape).stream(parts.codes))

    def layout(self, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Layout:
        import torch

        tiling, element = self.tiling(shape), element_of(self.element)
        layout: Layout = {"codes": byte_stream(element.stream_bits(tiling.stored_elements))}
        layout["scales"] = (scale_dtype(self.scale), tiling.grid)
        if self.tensor_scale != NoneAttr():
            layout["global_scale"] = (torch.float32, ())
        if self.zero != NoneAttr():
            layout["zero_points"] = byte_stream(element.stream_bits(prod(tiling.grid)))
        return layout

    def store(self, parts: Parts) -> dict[str, Tensor]:
        tensors = {"codes": self.pack(parts), "scales": parts.scales, "global_scale": parts.global_scale}
        if parts.zero_points is not None:
            tensors["zero_points"] = element_of(self.element).pack(parts.zero_points.reshape(-1))
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def restore(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        tiling, element = self.tiling(shape), element_of(self.element)
        codes = tiling.unstream(element.unpack(tensors["codes"], tiling.stored_elements))
        zeros = tensors.get("zero_points")
        if zeros is not None:
            zeros = element.unpack(zeros, prod(tiling.grid)).reshape(tiling.grid)
        return Parts(codes, tensors["scales"], tensors.get("global_scale"), zeros)

    def rule(self, how: Rounding) -> str:
        """The scale rule that a rounding means for this format. Raises UsageError for one that does not fit."""
        if how.threshold is not None:
            raise UsageError(f"{self} is one format for all blocks: a threshold belongs to !mx.mixed; leave it out")
        rule = how.scale_rule or self.default_scale_rule
        if rule not in self.scale_rules():
            raise UsageError(f"scale rule {rule!r} does not fit {self}: use {' or '.join(self.scale_rules())}")
        if rule in SEARCHED_RULES:
            refuse_clip(how, rule)
        return rule

    def scaling(self, shape: Sequence[int], *, full_range: bool = False) -> _scaled.Scaling:
        """Integers are symmetric unless a zero point or a given scale asks for the full two's complement range."""
        element = element_of(self.element)
        affine = self.zero != NoneAttr()
        if isinstance(element, Fixed) and not isinstance(element, Trit):
            element = Fixed(element.width, element.fraction, symmetric=not (affine or full_range))
        return _scaled.Scaling(self.tiling(shape), element, self.scale, self.tensor_scale != NoneAttr(), affine)

    def verify(self) -> None:
        if not self.dims or any(not 1 <= dim < 2**31 and dim != DYNAMIC_INDEX for dim in self.dims):
            raise VerifyException(f"a block has positive dimensions or ?, got {list(self.dims)}; at most 2^31 - 1")
        if isinstance(self.element, BlockType):
            raise VerifyException("a block of blocks is not a format: an element is one number")
        element = element_of(self.element, VerifyException)
        if self.scale not in SCALE_TYPES:
            names = ", ".join(map(str, SCALE_TYPES))
            raise VerifyException(f"a scale is one of {names}, got {self.scale}")
        if self.tensor_scale != NoneAttr() and (self.tensor_scale != f32 or self.scale not in (f8E4M3FN, f8E5M2)):
            raise VerifyException(
                "a tensor scale is f32 and stands over block scales in f8E4M3FN or f8E5M2, "
                f"got {self.tensor_scale} over {self.scale}"
            )
        if self.zero == NoneAttr():
            return
        if not isinstance(self.element, IntegerType) or self.zero != self.element:
            raise VerifyException(f"a zero point is an integer like the elements, got {self.zero} for {self.element}")
        if self.scale == f8E8M0FNU or self.tensor_scale != NoneAttr() or not isinstance(element, Fixed):
            raise VerifyException(f"a zero point needs one float scale per block, got {self.scale}")

    @classmethod
    def parse_parameters(cls, parser: AttrParser) -> Sequence[Attribute]:
        scales: list[Attribute] = []
        zero: Attribute = NoneAttr()
        with parser.in_angle_brackets():
            dims, element = parser.parse_ranked_shape()
            while parser.parse_optional_punctuation(","):
                if parser.parse_optional_keyword("zero"):
                    zero = parser.parse_type()
                    break
                scales.append(parser.parse_type())
            if len(scales) > 2:
                parser.raise_error(f"a block has a scale and a tensor scale, got {len(scales)} scales")
        scales += [f8E8M0FNU, NoneAttr()][len(scales) :]
        return [ArrayAttr([IntAttr(dim) for dim in dims]), element, *scales, zero]

    def print_parameters(self, printer: Printer) -> None:
        with printer.in_angle_brackets():
            printer.print_dimension_list(self.dims)
            printer.print_string("x")
            printer.print_attribute(self.element)
            beside = [part for part in (self.scale, self.tensor_scale) if part != NoneAttr()]
            for part in [] if beside == [f8E8M0FNU] else beside:
                printer.print_string(", ")
                printer.print_attribute(part)
            if self.zero != NoneAttr():
                printer.print_string(", zero ")
                printer.print_attribute(self.zero)
