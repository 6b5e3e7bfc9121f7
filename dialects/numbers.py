"""Number formats for users: the table of formats, fake quantization, encoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import DYNAMIC_INDEX
from xdsl.ir import TypeAttribute

from .arguments import came, whole_number
from .errors import UsageError, did_you_mean
from .formats import BlockType, MixedType, Rounding, encode_tensor, quantize
from .formats import Encoded as Encoded
from .instances import INSTANCES, Instance, format_of
from .torch_operators import operator

if TYPE_CHECKING:
    from torch import Tensor


class UnknownFormatError(UsageError, KeyError):
    """No format in the table has that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class FormatTable(Mapping[str, Instance]):
    """Name -> Instance; printed, a table."""

    def __getitem__(self, name: str) -> Instance:
        if name not in INSTANCES:
            raise UnknownFormatError(f"unknown format {name!r}{did_you_mean(str(name), INSTANCES)}")
        return INSTANCES[name]

    def __iter__(self) -> Iterator[str]:
        return iter(INSTANCES)

    def __len__(self) -> int:
        return len(INSTANCES)

    def __str__(self) -> str:
        rows = [("format", "bits", "scale rule", "type", "note")]
        rows += [(i.name, f"{i.bits:g}", i.default_scale_rule or "-", i.text, i.note) for i in self.values()]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__


def formats() -> FormatTable:
    """Every named format with its type, bits per element, default scale rule, note and source."""
    return FormatTable()


def fake_quantize(
    x: Tensor,
    format: str | TypeAttribute | Instance,
    *,
    scale_rule: str | None = None,
    rounding: str = "rne",
    dim: int = -1,
    clip: float | None = None,
    seed: int = 0,
) -> Tensor:
    """`x` rounded to the values that `format` can hold, in its own dtype and shape, in memory of its own.

    x: any float dtype and shape. format: a name (`mxloom.formats()` lists them), a type's text, a type, or one of
    `formats()`. scale_rule: floor, ceil, even or rceil for power-of-two scales (None: the format's default); rounding:
    rne, rna, rtz or stochastic (from `seed`); dim: the dimension along which blocks lie (formats without blocks, and
    those with one scale for the tensor, round alike along any); clip: the part of the largest magnitude that the scale
    is made for. Raises UsageError for an unknown name, an argument of a wrong kind, or an option without meaning for
    the format.

    Where `x` requires a gradient, so does the result: rounding passes it straight through, saturated values included.
    """
    import torch

    how = Rounding(scale_rule=scale_rule, rounding=rounding, clip=clip, seed=seed)
    resolved = _resolved(format, x, dim)
    if torch.is_grad_enabled() and x.requires_grad:
        straight_through = operator("mxloom.quantize.default")
        return straight_through(x, str(resolved), how.scale_rule, how.rounding, how.clip, how.seed)
    return quantize(x, resolved, how)


def encode(
    x: Tensor,
    format: str | TypeAttribute | Instance,
    *,
    scale_rule: str | None = None,
    rounding: str = "rne",
    dim: int = -1,
    clip: float | None = None,
    seed: int = 0,
) -> Encoded:
    """`x` as codes and scales; `encode(x, ...).decode(x.dtype)` equals `fake_quantize(x, ...)` bit for bit."""
    how = Rounding(scale_rule=scale_rule, rounding=rounding, clip=clip, seed=seed)
    return encode_tensor(x, _resolved(format, x, dim), how)


def _resolved(format: str | TypeAttribute | Instance, x: Tensor, dim: int) -> TypeAttribute:
    """The format laid out for `x` with its blocks along `dim`. Raises UsageError where `dim` would have no effect."""
    import torch

    if not isinstance(x, torch.Tensor):
        raise UsageError(f"x is a torch tensor, got {came(x)}: make a tensor of it first")
    rank, dim = max(x.dim(), 1), whole_number("dim", dim)
    laid_out = format_of(format, rank=rank, dims=(dim,))
    if dim not in (-1, rank - 1) and _has_blocks(laid_out) and laid_out == format_of(format, rank=rank):
        raise UsageError(f"{laid_out} says itself how its blocks lie: dim={dim} would have no effect; leave it out")
    return laid_out


def _has_blocks(format: TypeAttribute) -> bool:
    """Whether a format has blocks smaller than the tensor."""
    block = format.low if isinstance(format, MixedType) else format
    return isinstance(block, BlockType) and set(block.dims) != {DYNAMIC_INDEX}
