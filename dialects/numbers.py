"""Number formats for users: the table of formats, encoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from xdsl.dialects.builtin import DYNAMIC_INDEX
from xdsl.ir import TypeAttribute

from .arguments import came, whole_number
from .errors import UsageError, did_you_mean
from .formats import BlockType, MixedType, Rounding, encode_tensor
from .formats import Encoded as Encoded
from .instances import INSTANCES, Instance, format_of

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
    return encode_tensor(x, laid_out(format, x, dim), how)


def laid_out(format: str | TypeAttribute | Instance, x: Tensor, dim: int) -> TypeAttribute:
    """The format laid out for `x` with its blocks along `dim`. Raises UsageError where `dim` would have no effect."""
    import torch

    if not isinstance(x, torch.Tensor):
        raise UsageError(f"x is a torch tensor, got {came(x)}: make a tensor of it first")
    rank, dim = max(x.dim(), 1), whole_number("dim", dim)
    found = format_of(format, rank=rank, dims=(dim,))
    if dim not in (-1, rank - 1) and _has_blocks(found) and found == format_of(format, rank=rank):
        raise UsageError(f"{found} says itself how its blocks lie: dim={dim} would have no effect; leave it out")
    return found


def _has_blocks(format: TypeAttribute) -> bool:
    """Whether a format has blocks smaller than the tensor."""
    block = format.low if isinstance(format, MixedType) else format
    return isinstance(block, BlockType) and set(block.dims) != {DYNAMIC_INDEX}
