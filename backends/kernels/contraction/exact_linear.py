"""A linear layer that sums as its accumulator says: native kernels where there are, else the definition."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ....dialects import contractions
from ....dialects.contractions import Bounds, Coded, bounds_at_hand, bounds_of, fits_f64, segment_length
from ....dialects.formats import BlockType
from ....dialects.formats._builtin import numbers_of
from ....dialects.formats._element import Fixed
from ....dialects.formats._plain import Plain
from ..codes import Codes
from ..fake_quantization import switched_off
from .datapath import CODE_BYTES
from .native_linear import PackedLinear, codes_for, datapath
from .packing import unpack

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import Attribute

    from ....dialects.accumulator import AccumulatorAttr


def input_bounds(fmt: Attribute) -> tuple[Bounds, int | None]:
    """The bounds of the codes of a format, and the length of its segments; None is all of K."""
    numbers = numbers_of(fmt)
    if isinstance(numbers, Plain):
        return bounds_of(numbers.element_numbers), None
    assert isinstance(numbers, BlockType)
    scaling = numbers.scaling((1,) * len(numbers.dims))
    bounds = bounds_of(scaling.element)
    if scaling.zero_points:
        assert isinstance(scaling.element, Fixed)
        bounds = Bounds(float(scaling.element.top_code - scaling.element.bottom_code), 1.0)
    length = numbers.dims[-1]
    return bounds, length if length > 0 else None


class ExactLinear:
    """Weights as codes: packed for the processor at hand, or as the definition reads them. Never changed."""

    def __init__(
        self, weight: Coded, bias: Tensor | None, accumulator: AccumulatorAttr, input_format: Attribute
    ) -> None:
        self.accumulator, self.size, self.bias = accumulator, weight.size, bias
        self.columns = weight.codes.shape[0]
        self.why_not: str | None = None
        self._packed: PackedLinear | None = None
        bounds, own = input_bounds(input_format)
        own = None if own is not None and own >= weight.size else own
        length = segment_length(own, weight.length, weight.size)
        codes = codes_for(bounds, weight.bounds, length, whole=length >= weight.size)
        # Elements with a wide range (E5M2 by E5M2) fit f64 where the numbers at hand do, which each call looks at.
        self._bounds_at_hand = None if codes is not None else bounds_at_hand(weight.codes, weight.bounds)
        codes = codes or "f64"
        path = datapath(codes)
        if path is None:
            self.why_not = f"the processor multiplies no codes of {codes}"
        elif not weight.size or not weight.codes.shape[0]:
            self.why_not = "there is nothing to multiply"
        else:
            self._packed = PackedLinear(weight, bias, accumulator, path, own)
        self._coded = weight if self._packed is None else None
        self._over = weight.over
        self._bounds, self._input_bounds = weight.bounds, bounds

    @property
    def datapath(self) -> str | None:
        """The name of the datapath of its kernel."""
        return None if self._packed is None else self._packed.path.name

    def __call__(self, input: Codes | Coded) -> Tensor:
        """The layer on the codes of its input, f32."""
        if self._packed is not None and switched_off() is None:
            found = self._native(input)
            if found is not None:
                return found
        given = input if isinstance(input, Coded) else _as_definition(input, self.size, self._input_bounds)
        weight, bias = _on(self.weight(), given.codes.device), self.bias
        bias = None if bias is None else bias.to(given.codes.device)
        if contractions.holds_every_sum(given, weight, self.accumulator):
            return contractions.linear_in_f32(given, weight, bias)
        return contractions.linear(given, weight, bias, self.accumulator)

    def weight(self) -> Coded:
        """The weights as the definition reads them."""
        if self._coded is not None:
            return self._coded
        assert self._packed is not None
        packed = self._packed.packed
        codes, factors = unpack(packed, self._packed.path)
        codes = codes[..., : self._packed.length].flatten(1)[:, : self.size]
        return Coded(codes, factors, self._over, self._packed.length, self.size, self._bounds)

    def _native(self, input: Codes | Coded) -> Tensor | None:
        """The layer by the native kernel; None where codes lie on another device, or f64 may not hold their sums."""
        import torch

        packed = self._packed
        assert packed is not None
        path, segments, length = packed.path, packed.packed.segments, packed.length
        leading, width = input.codes.shape[:-1], input.codes.shape[-1]
        if self._bounds_at_hand is not None:
            found = bounds_at_hand(input.codes, self._input_bounds)
            if not fits_f64(found, self._bounds_at_hand, length):
                return None
        factors = input.scales if isinstance(input, Codes) else input.factors
        if not input.codes.is_cpu:
            return None
        count = factors.shape[-1]
        if isinstance(input, Codes) and self._fits(input):
            found = packed(input.codes.view(-1, width), input.scales, input.sums, _over(input, self._over))
            return found.view(*leading, packed.columns)
        own = width // count if isinstance(input, Codes) else input.length or self.size
        codes, factors = input.codes.reshape(-1, width), factors.reshape(-1, count)
        if not codes.numel():
            return codes.new_empty((*leading, packed.columns), dtype=torch.float32)
        codes = codes.to({"i8": torch.int8, "i16": torch.int16, "f64": torch.float64}[path.codes])
        codes = _cut(codes, segments * length)
        if own != length:
            factors = factors.repeat_interleave(segments if own >= self.size else own // length, -1)[:, :segments]
        if packed.packed.length != length:  # one segment that is all of K, filled up to whole loads
            codes = _cut(codes, packed.packed.length)
        sums = None
        if packed.numbers.offset:
            given = input.sums if isinstance(input, Codes) and own == length else None
            split = codes.unflatten(-1, (segments, -1))
            sums = split.sum(-1, dtype=torch.int32) if given is None else given.reshape(-1, count)[:, :segments]
        over = _over(input, self._over)
        found = packed(codes.contiguous(), factors.contiguous(), sums, over)
        return found.reshape(*leading, packed.columns)

    def _fits(self, input: Codes) -> bool:
        """Whether the kernel reads these codes as they are."""
        assert self._packed is not None
        packed, path = self._packed.packed, self._packed.path
        return (
            input.codes.shape[-1] == packed.segments * packed.length
            and input.scales.shape[-1] == packed.segments
            and input.codes.element_size() == CODE_BYTES[path.codes]
            and input.codes.is_contiguous()
            and input.codes.numel() > 0
        )


def _on(x: Coded, device: Any) -> Coded:
    """The same codes on a device."""
    if x.codes.device == device:
        return x
    over = None if x.over is None else x.over.to(device)
    return replace(x, codes=x.codes.to(device), factors=x.factors.to(device), over=over)


def _cut(codes: Tensor, width: int) -> Tensor:
    """Rows of `width`: cut off, or filled with zeros."""
    import torch

    missing = width - codes.shape[-1]
    return torch.nn.functional.pad(codes, (0, missing)) if missing > 0 else codes[:, :width]


def _over(input: Codes | Coded, weight: Tensor | None) -> float | None:
    """The factor of the input as a whole; None where neither operand has one."""
    over = input.over if isinstance(input, Codes) else None if input.over is None else float(input.over)
    if over is None or over == 1.0:
        return None if weight is None else 1.0
    return over


def _as_definition(input: Codes, size: int, bounds: Bounds) -> Coded:
    """The codes of a kernel as the definition reads them."""
    import torch

    count = input.scales.shape[-1]
    length = input.codes.shape[-1] // count
    over = None if input.over == 1.0 else torch.tensor(input.over, dtype=torch.float32)
    codes = input.codes[..., :size].to(torch.float64)
    return Coded(codes, input.scales, over, None if length >= size else length, size, bounds)
