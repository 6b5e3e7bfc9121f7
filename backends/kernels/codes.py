"""Tensors as whole numbers under one factor for each block of a row: what arithmetic on codes reads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from ...dialects.contractions import bounds_of
from ...dialects.formats import BlockType
from . import native
from ._layout import LARGEST_VECTOR, block_numbers
from ._prepared import largest_bits, tensor_scale
from ._team import team_size
from .block_function import BlockFunction, magnitudes
from .code_function import code_bits, code_function, code_scale_function, why_no_codes
from .codes_kernel import Factors, code_groups_kernel, code_rows_kernel
from .lowering import GROUP

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.dialects.builtin import ModuleOp
    from xdsl.ir import Attribute

    from ...dialects.formats import Rounding
    from ...dialects.formats._tiling import Tiling


class Codes(NamedTuple):
    """A tensor [..., K] in blocks of B along its last dimension, n = ceil(K / B) of them.

    codes [..., n x B], int8 or int16: value / (scale of its block x step of the element); zeros behind K. Where that
    takes more bits, f64: value / scale, the element as it is, and sums are 0.
    scales [..., n], f32: scale x step. sums [..., n], int32: the sum of the block's codes. Where one scale stands for
    several rows it is repeated for each, and sums are those of the row; a format without scales has its step for every
    row.

    over: the scale of the tensor over those of the blocks, 1 where the format has none.

    value = code x (scale x over), both products rounded to f32, is what `dialects.formats.quantize` gives, but for the
    sign of zeros (negative zero has code 0), and but for tensors where `exact` is false: some scale x step is no f32,
    or a value may pass f32, where the definition gives the largest finite number. A block with a NaN (a row, in a
    format without scales) has scale NaN and codes 0.
    """

    codes: Tensor
    scales: Tensor
    sums: Tensor
    exact: bool
    over: float = 1.0


@dataclass(frozen=True)
class CodeLayout:
    """How the rows of one tensor are cut into blocks for codes.

    `rows` of `blocks` blocks of `size` values; `padding` are zeros behind each block while the kernel works. `whole`:
    one scale for the tensor, so that rows share the largest magnitude. `kernel` is how it is made.
    """

    function: BlockFunction
    rows: int
    blocks: int
    size: int
    padding: int
    whole: bool
    in_registers: bool
    tiling: Tiling | None


class PreparedCodes:
    """Turns tensors of one shape and dtype (f32, bf16, f16) into codes by a native kernel."""

    def __init__(self, layout: CodeLayout, shape: tuple[int, ...], dtype: Any, factors: Factors = ()) -> None:
        import torch

        self.layout, self.shape, self.factors = layout, shape, factors
        leading = shape[:-1]
        self.codes_shape = (*leading, layout.blocks * layout.size)
        self.blocks_shape = (*leading, layout.blocks)
        self.code_dtype = {8: torch.int8, 16: torch.int16, 64: torch.float64}[code_bits(layout.function)]
        if layout.in_registers:
            self._kernel = _groups_kernel(layout.function, factors)
        else:
            self._kernel = _rows_kernel(layout.function, layout.whole, factors)
        self._in_place = layout.tiling is None and not layout.padding and dtype == torch.float32

    def __call__(
        self,
        x: Tensor,
        codes_out: Tensor | None = None,
        scales_out: Tensor | None = None,
        sums_out: Tensor | None = None,
        multiplied: Sequence[Tensor] = (),
    ) -> Codes:
        """The codes of `x`; what is given is written and returned: contiguous, of the shapes and dtypes of `Codes`.

        `x` is multiplied first with the tensors in `multiplied` (f32, contiguous), which are what `factors` say.
        """
        import torch

        layout = self.layout
        source = x if self._in_place and x.is_contiguous() else self._in_order(x)
        rows = layout.rows * layout.blocks
        codes = _memory(codes_out, self.codes_shape, self.code_dtype)
        scales = _memory(scales_out, self.blocks_shape, torch.float32)
        sums = _memory(sums_out, self.blocks_shape, torch.int32)
        padded = codes
        if layout.padding:
            padded = torch.empty((rows, layout.size + layout.padding), dtype=self.code_dtype, device="cpu")
        exact, over = self._run(source, padded, scales, sums, multiplied)
        if layout.padding:
            codes.view(rows, layout.size).copy_(padded[:, : layout.size])
        return Codes(codes, scales, sums, exact, over)

    def _in_order(self, x: Tensor) -> Tensor:
        """The values of the blocks, in f32, one block behind the other, each with zeros behind it."""
        import torch

        layout = self.layout
        source = x.float()
        source = (source if layout.tiling is None else layout.tiling.stream(source)).contiguous()
        if layout.padding:
            source = torch.nn.functional.pad(source.reshape(-1, layout.size), (0, layout.padding))
        return source

    def _run(
        self, source: Tensor, codes: Tensor, scales: Tensor, sums: Tensor, multiplied: Sequence[Tensor]
    ) -> tuple[bool, float]:
        layout = self.layout
        numbers, count = layout.function, layout.rows * layout.blocks
        threads = team_size(source.numel())
        over = tensor_scale(source, numbers, threads) if numbers.tensor_scale else 1.0
        given = largest_bits(source, threads) if layout.whole else 0
        outputs = _Addresses(codes.data_ptr(), scales.data_ptr(), sums.data_ptr(), *(t.data_ptr() for t in multiplied))
        inexact = self._kernel(
            source.data_ptr(),
            ctypes.addressof(outputs),
            count,
            given=given,
            over=over,
            length=layout.blocks if layout.in_registers else layout.size + layout.padding,
            threads=min(threads, count),
        )
        return not inexact, over


_Addresses = ctypes.c_void_p * 6


@lru_cache(maxsize=4096)
def prepare_codes(
    fmt: Attribute, how: Rounding, shape: tuple[int, ...], dtype: Any, factors: Factors = ()
) -> PreparedCodes | str:
    """What turns CPU tensors of a shape and dtype into codes, or why there are none for this format.

    `factors` is what the values are multiplied with before. Raises UsageError for options that mean nothing for the
    format, as rounding itself does.
    """
    import torch

    layout = _layout(fmt, how, shape)
    if isinstance(layout, str):
        return layout
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}"
    if factors and (reason := _why_no_factors(layout, dtype)):
        return reason
    return native.why_not() or PreparedCodes(layout, shape, dtype, factors)


def _why_no_factors(layout: CodeLayout, dtype: Any) -> str | None:
    """Why values are not multiplied on the way to their codes."""
    import torch

    if layout.tiling is not None or layout.padding or dtype != torch.float32:
        return "the values are brought into another order first"
    if layout.whole or layout.function.tensor_scale:
        return "the scale of the tensor is found first"
    return None if layout.in_registers or layout.blocks == 1 else "a row has several long blocks"


def _layout(fmt: Attribute, how: Rounding, shape: tuple[int, ...]) -> CodeLayout | str:
    numbers = block_numbers(fmt, how)
    if isinstance(numbers, str):
        return numbers
    if numbers.noisy:
        return "no codes by stochastic rounding"
    if numbers.rule in ("minmax", "absmean"):
        return f"no codes for the scale rule {numbers.rule}"
    if reason := why_no_codes(numbers):
        return reason
    if not prod(shape) or not shape:
        return "there is no row to round"
    rows, length = prod(shape[:-1]), shape[-1]
    tiling, size, blocks, whole = None, length, 1, False
    if isinstance(fmt, BlockType):
        found = fmt.tiling(shape)
        tiling = found if found.is_ragged else None
        whole = prod(found.grid) == 1 and rows > 1 and not numbers.tensor_scale
        if not whole:
            if any(step != 1 for step in found.block[:-1]):
                return "its blocks reach over several rows"
            size, blocks = found.block[-1], found.tiles[-1]
    if code_bits(numbers) < 64 and size * bounds_of(numbers.element).largest >= 1 << 31:
        return "sums of codes need more than 32 bits"
    if isinstance(fmt, BlockType) and not whole and size <= LARGEST_VECTOR and size & (size - 1) == 0:
        return CodeLayout(replace(numbers, lanes=size), rows, blocks, size, 0, whole, True, tiling)
    padding = -size % 8
    lanes = next(lanes for lanes in (32, 16, 8) if (size + padding) % lanes == 0)
    return CodeLayout(replace(numbers, lanes=lanes), rows, blocks, size, padding, whole, False, tiling)


def _memory(given: Tensor | None, shape: tuple[int, ...], dtype: Any) -> Tensor:
    import torch

    if given is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    assert (given.shape, given.dtype) == (shape, dtype), f"{given.dtype} {given.shape} for {dtype} {shape}"
    assert given.is_contiguous()
    return given


@lru_cache(maxsize=1024)
def _groups_kernel(numbers: BlockFunction, factors: Factors) -> native.Kernel:
    def make() -> ModuleOp:
        scale, codes = code_scale_function(numbers, GROUP), code_function(numbers)
        return code_groups_kernel(magnitudes(numbers.lanes), scale, codes, code_bits(numbers), factors)

    return native.Kernel(f"code groups {numbers} {factors}", make)


@lru_cache(maxsize=1024)
def _rows_kernel(numbers: BlockFunction, given: bool, factors: Factors) -> native.Kernel:
    def make() -> ModuleOp:
        scale, codes = code_scale_function(numbers, None), code_function(numbers)
        bits = code_bits(numbers)
        return code_rows_kernel(magnitudes(numbers.lanes), scale, codes, bits, given=given, factors=factors)

    return native.Kernel(f"code rows {numbers} {given} {factors}", make)
