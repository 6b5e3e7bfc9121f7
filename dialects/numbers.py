"""Number formats for users: the table of formats, fake quantization, encoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from xdsl.ir import TypeAttribute

from .formats import Encoded as Encoded
from .formats import Rounding, encode_tensor, quantize
from .instances import INSTANCES, Instance, format_of

if TYPE_CHECKING:
    from torch import Tensor


class FormatTable(Mapping[str, Instance]):
    """Name -> Instance; printed, a table."""

    def __getitem__(self, name: str) -> Instance:
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
    format: str | TypeAttribute,
    *,
    scale_rule: str | None = None,
    rounding: str = "rne",
    dim: int = -1,
    clip: float | None = None,
    seed: int = 0,
) -> Tensor:
    """`x` rounded to the values that `format` can hold, in its own dtype and shape.

    x: any float dtype and shape. format: a name (`mxloom.formats()` lists them), a type's text, or a type.
    scale_rule: floor, ceil, even or rceil for power-of-two scales (None: the format's default); rounding: rne, rna, rtz
    or stochastic (from `seed`); dim: the dimension along which blocks lie; clip: the part of the largest magnitude that
    the scale is made for. Raises UsageError for an unknown name or an option without meaning for the format.
    """
    how = Rounding(scale_rule=scale_rule, rounding=rounding, clip=clip, seed=seed)
    return quantize(x, _resolved(format, x, dim), how)


def encode(
    x: Tensor,
    format: str | TypeAttribute,
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


def _resolved(format: str | TypeAttribute, x: Tensor, dim: int) -> TypeAttribute:
    if not isinstance(format, str):
        return format
    return format_of(format, rank=max(x.dim(), 1), dims=(dim,))
