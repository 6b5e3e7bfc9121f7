"""The one definition of rounding into blocks that share a scale; quantizing and encoding both stand on it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import f8E8M0FNU

from ..errors import MxloomError
from ._element import Element, Fixed
from ._format import GIVEN_PARTS, SEARCHED_RULES, Given, Parts, Rounding
from ._plain import working_dtype
from ._rounding import round_to_integers
from ._scale import (
    divided,
    finite,
    power_of_two_bytes,
    powers_of_two,
    scale_dtype,
    store_scale,
    tensor_scale,
)
from ._searched import searched_scales
from ._tiling import Tiling

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from xdsl.ir import Attribute


@dataclass(frozen=True)
class Scaling:
    """How the blocks of one tensor are scaled: layout, element, scale type, tensor scale or zero points or neither."""

    tiling: Tiling
    element: Element
    scale: Attribute
    two_levels: bool
    zero_points: bool


@dataclass(frozen=True)
class Scales:
    """Stored scales, one per block in the shape of the grid; the tensor's scale; zero points."""

    stored: Tensor
    tensor: Tensor | None = None
    zeros: Tensor | None = None

    def factors(self, dtype: torch.dtype) -> Tensor:
        """What an element's value is multiplied with, in f32 or f64; the product of both levels is rounded once."""
        import torch

        if self.stored.dtype == torch.float8_e8m0fnu:
            return powers_of_two(self.stored.view(torch.uint8), dtype)
        factors = self.stored.to(dtype)
        return factors if self.tensor is None else factors * self.tensor.to(dtype)


@dataclass(frozen=True)
class Rounded:
    """A tensor split into blocks and rounded: element values (zero point taken off), scales."""

    values: Tensor
    scales: Scales
    zeros: Tensor | None


def quantize(x: Tensor, scaling: Scaling, how: Rounding, rule: str) -> Tensor:
    """`x` rounded to the block format, in its dtype."""
    rounded = _round(x, scaling, how, rule, Given())
    factors = scaling.tiling.spread(rounded.scales.factors(rounded.values.dtype))
    return _bounded(scaling.tiling.merge(rounded.values.mul_(factors)), x.dtype)


def encode(x: Tensor, scaling: Scaling, how: Rounding, rule: str, given: Given) -> Parts:
    """Codes and scales of `x`."""
    rounded = _round(x, scaling, how, rule, given)
    values = rounded.values if rounded.zeros is None else rounded.values + rounded.zeros
    codes = scaling.tiling.merge(scaling.element.codes(values))
    return Parts(codes, rounded.scales.stored, rounded.scales.tensor, rounded.scales.zeros)


def decode(parts: Parts, scaling: Scaling, dtype: torch.dtype) -> Tensor:
    """The values of codes and scales, in `dtype`."""
    import torch

    assert parts.scales is not None
    work = working_dtype(dtype, scaling.element)
    scales = Scales(parts.scales, parts.global_scale, parts.zero_points)
    values = scaling.tiling.split(scaling.element.values(parts.codes, work))
    if scales.zeros is not None:
        values = values - scaling.tiling.spread(scales.zeros.to(work))
    products = scaling.tiling.merge(values * scaling.tiling.spread(scales.factors(work)))
    if not scaling.element.has_infinity:
        return _bounded(products, dtype)
    infinite = scaling.tiling.merge(values).isinf()
    return torch.where(infinite, products.to(dtype), _bounded(products.clone(), dtype))


def _bounded(products: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of element and scale (overwritten) in `dtype`: at most its largest finite number, which they may pass.

    Where a block holds an infinity, its scale is made for 2^128, and a finite element may round up to as much.
    """
    import torch

    top = min(torch.finfo(dtype).max, torch.finfo(products.dtype).max)
    return products.clamp_(-top, top).to(dtype)


def _round(x: Tensor, scaling: Scaling, how: Rounding, rule: str, given: Given) -> Rounded:
    tiling, element = scaling.tiling, scaling.element
    blocks = tiling.split(x.to(working_dtype(x.dtype, element)))
    if given and element.nan_code is None and x.isnan().any():
        raise MxloomError("NaN has no code under given scales: replace it before encoding")
    scales = _accept(given, scaling) if _complete(given) else _choose(blocks, scaling, how, rule, given.global_scale)
    scaled = _divide(blocks, scales, tiling)
    if scales.zeros is None:
        return Rounded(element.round(scaled, how), scales, None)
    assert isinstance(element, Fixed)
    zeros = tiling.spread(scales.zeros.to(scaled.dtype))
    bounded = scaled.clamp_(element.bottom_code - zeros, element.top_code - zeros)
    return Rounded(round_to_integers(bounded, how).add_(0.0), scales, zeros)


def _divide(blocks: Tensor, scales: Scales, tiling: Tiling) -> Tensor:
    """Blocks over their scales: times the exact inverse of a power of two; a product that underflowed to 0 gives 0."""
    import torch

    if scales.stored.dtype == torch.float8_e8m0fnu:
        inverses = powers_of_two(scales.stored.view(torch.uint8), blocks.dtype, inverse=True)
        return blocks * tiling.spread(inverses)
    factors = scales.factors(blocks.dtype)
    return blocks / tiling.spread(factors.masked_fill_(factors == 0, torch.inf))


def _complete(given: Given) -> bool:
    """Whether more is given than the scale over the block scales, which leaves these to the rule."""
    return any(getattr(given, part) is not None for part in GIVEN_PARTS if part != "global_scale")


def _choose(blocks: Tensor, scaling: Scaling, how: Rounding, rule: str, over: Tensor | None = None) -> Scales:
    """The scales that the rule makes for these blocks, where it is given under a scale of the tensor."""
    import torch

    if over is not None and not scaling.two_levels:
        raise MxloomError("given scales: global_scale has no place in this format")
    if rule in SEARCHED_RULES:
        return searched_scales(blocks, scaling, how, rule, over)
    if rule == "minmax":
        return _affine(blocks, scaling, how)
    grid, element = scaling.tiling.grid, scaling.element
    magnitudes = blocks.abs()
    if rule == "absmean":
        return Scales(store_scale(_mean(magnitudes, scaling).reshape(grid), scaling.scale))
    largest = _clipped(magnitudes.amax(scaling.tiling.axes).reshape(grid), how)
    if scaling.scale == f8E8M0FNU:
        return Scales(power_of_two_bytes(largest, element, rule).view(torch.float8_e8m0fnu))
    largest = finite(largest)
    if not scaling.two_levels:
        return Scales(store_scale(divided(largest.to(torch.float64), element.largest), scaling.scale))
    overall = _clipped(_largest_number(magnitudes, largest), how)
    over = (
        tensor_scale(overall, element, scaling.scale) if over is None else _exactly(over, (), torch.float32, "global")
    )
    quotients = divided(largest, element.largest) / over.to(largest.dtype)
    return Scales(store_scale(quotients.to(torch.float64), scaling.scale), over)


def _largest_number(magnitudes: Tensor, largest: Tensor) -> Tensor:
    """The largest magnitude of a tensor, NaN left out."""
    if largest.numel() == 0:
        return largest.new_zeros(())
    return finite(magnitudes.nan_to_num(nan=0.0).amax() if largest.isnan().any() else magnitudes.amax())


def _clipped(largest: Tensor, how: Rounding) -> Tensor:
    return largest if how.clip is None else largest * how.clip


def _mean(magnitudes: Tensor, scaling: Scaling) -> Tensor:
    """The mean magnitude of each block's own elements, padding left out, summed in f64."""
    import torch

    tiling = scaling.tiling
    sums = finite(magnitudes).to(torch.float64).sum(tiling.axes)
    own = tiling.split(torch.ones(tiling.shape, dtype=torch.float64, device=sums.device)).sum(tiling.axes)
    return sums / own


def _affine(blocks: Tensor, scaling: Scaling, how: Rounding) -> Scales:
    """scale = (max - min) / (2^b - 1) with 0 inside the range; zero = rint(lowest code - min / scale), clamped.

    TensorFlow Lite quantization specification; `algorithms` of linear quantization with a zero point.
    """
    import torch

    element = scaling.element
    assert isinstance(element, Fixed)
    axes, grid = scaling.tiling.axes, scaling.tiling.grid
    low = _clipped(finite(blocks.amin(axes).reshape(grid)).to(torch.float64).clamp(max=0), how)
    high = _clipped(finite(blocks.amax(axes).reshape(grid)).to(torch.float64).clamp(min=0), how)
    stored = store_scale(divided(high - low, element.top_code - element.bottom_code), scaling.scale)
    zeros = (element.bottom_code - low / stored.to(torch.float64)).round_()
    zeros = zeros.clamp_(element.bottom_code, element.top_code).masked_fill_(high == low, 0.0)
    return Scales(stored, None, zeros.nan_to_num_(nan=0.0).to(element.code_dtype))


def _accept(given: Given, scaling: Scaling) -> Scales:
    """Scales that stand already, kept bit for bit: right in number, exact in the format's scale type, complete."""
    import torch

    needed = {"scales": True, "global_scale": scaling.two_levels, "zero_points": scaling.zero_points}
    for name in GIVEN_PARTS:
        wanted = needed.get(name, False)
        if (getattr(given, name) is not None) != wanted:
            raise MxloomError(f"given scales: {name} {'is missing' if wanted else 'has no place in this format'}")
    grid = scaling.tiling.grid
    assert given.scales is not None
    stored = _exactly(given.scales, grid, scale_dtype(scaling.scale), "scales")
    over = None if given.global_scale is None else _exactly(given.global_scale, (), torch.float32, "global_scale")
    zeros = given.zero_points
    if zeros is not None:
        zeros = _exactly(zeros, grid, scaling.element.code_dtype, "zero_points")
    return Scales(stored, over, zeros)


def _exactly(given: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    import torch

    if given.dtype == torch.uint8 and dtype == torch.float8_e8m0fnu:
        given = given.view(dtype)
    if given.numel() != prod(shape):
        raise MxloomError(f"given {name} have shape {list(given.shape)}, the blocks of this tensor {list(shape)}")
    stored = given if given.dtype == dtype else given.to(dtype)
    wide = given.to(torch.float64) if given.dtype != torch.float8_e8m0fnu else _e8m0(given)
    back = stored.to(torch.float64) if dtype != torch.float8_e8m0fnu else _e8m0(stored)
    if not torch.equal(wide.nan_to_num(nan=-1.0), back.nan_to_num(nan=-1.0)):
        raise MxloomError(f"given {name} are not exact in {dtype}: they would be changed, and stored scales are kept")
    return stored.reshape(shape)


def _e8m0(stored: Tensor) -> Tensor:
    import torch

    return powers_of_two(stored.view(torch.uint8), torch.float64)
