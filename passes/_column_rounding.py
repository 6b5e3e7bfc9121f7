"""Rounding one column of a weight at a time, under scales that stand or that follow the columns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from xdsl.dialects.builtin import DYNAMIC_INDEX, NoneAttr, f8E8M0FNU

from ..dialects.errors import UsageError
from ..dialects.formats import BlockType, Encoded, MixedType, Rounding
from ..dialects.formats._builtin import numbers_of
from ..dialects.formats._element import Fixed
from ..dialects.formats._format import Given
from ..dialects.formats._plain import Plain
from ..dialects.formats._rounding import round_to_integers
from ..dialects.formats._scaled import Scales
from ._brain_surgeon import Surgeon
from ._columns import matrix

if TYPE_CHECKING:
    from torch import Tensor
    from xdsl.ir import Attribute

    from ._sites import Site


@dataclass(eq=False)
class Grid:
    """The values that each element of a matrix [rows, K] may take: an element's, times a factor, around a zero."""

    element: Any
    factors: Tensor | None
    zeros: Tensor | None = None

    def column(self, values: Tensor, rows: slice, place: int, how: Rounding) -> Tensor:
        """Values [rows] rounded to what column `place` may hold."""
        if self.factors is None:
            return self.element.round(values.clone(), how)
        factors = self.factors[rows, place]
        scaled = values / factors
        if self.zeros is None:
            return self.element.round(scaled, how) * factors
        zeros = self.zeros[rows, place]
        bounded = scaled.clamp_(self.element.bottom_code - zeros, self.element.top_code - zeros)
        return round_to_integers(bounded, how) * factors


@dataclass(eq=False)
class ColumnRounding:
    """How the columns of one weight are rounded, and the encoding that comes of it."""

    site: Site
    format: BlockType | MixedType
    how: Rounding
    given: Encoded
    low: Grid
    high: Grid | None = None
    choice: Tensor | None = None
    groups: Tensor | None = None
    """[K] the group of each column where scales follow the columns; None where they are frozen."""
    stored: dict[str, Tensor] = field(default_factory=dict)
    """Where scales follow: what each element's block stores, [rows, K]."""

    @staticmethod
    def follows(format: Attribute) -> bool:
        """Whether scales follow the columns by default: float scales of integers, one row to a block."""
        if not isinstance(format, BlockType) or format.tensor_scale != NoneAttr() or format.scale == f8E8M0FNU:
            return False
        return isinstance(format.scaling((1,) * len(format.dims)).element, Fixed) and _one_row(format)

    def solved(self, surgeon: Surgeon, piece: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """A piece of the matrix as the surgeon rounds it, and plainly rounded under the cast's own scales."""
        import torch

        plain = torch.stack([self._column(piece[:, k], rows, k) for k in range(piece.shape[1])], 1)
        enter = None if self.groups is None else self._entering(surgeon, rows)
        return surgeon.rounded(piece, lambda values, place: self._column(values, rows, place), enter), plain

    def keep_plain(self, worse: Tensor, rounded: Tensor, plain: Tensor, rows: slice) -> Tensor:
        """The rounded rows, plain ones where they are better; their scales go back with them."""
        if self.groups is not None and bool(worse.any()):
            again = _elementwise(self.site, self.given, self.format)
            for part, values in again.items():
                self.stored[part][rows][worse] = values[rows][worse]
        return plain.where(worse[:, None], rounded)

    def encoded(self, values: Tensor) -> Encoded:
        """The encoding of a tensor of values that the grids hold."""
        parts = {name: getattr(self.given, name) for name in _KEPT if getattr(self.given, name) is not None}
        if self.groups is not None:
            parts |= {name: self._per_block(tensor) for name, tensor in self.stored.items()}
        found = numbers_of(self.format).encode(values, self.how, Given(**parts, symmetric=True))
        return Encoded.of(self.format, found)

    def _column(self, values: Tensor, rows: slice, place: int) -> Tensor:
        low = self.low.column(values, rows, place, self.how)
        if self.high is None or self.choice is None:
            return low
        return self.high.column(values, rows, place, self.how).where(self.choice[rows, place], low)

    def _entering(self, surgeon: Surgeon, rows: slice) -> Any:
        """What gives a group its scales when its first column is reached."""
        assert self.groups is not None and isinstance(self.format, BlockType)
        ordered, seen = self.groups[surgeon.order], set[int]()

        def enter(columns: Tensor, place: int) -> None:
            group = int(ordered[place])
            if group in seen:
                return
            seen.add(group)
            places = (ordered == group).nonzero()[:, 0]
            self._follow(columns[places].T, surgeon.order[places], rows)

        return enter

    def _follow(self, values: Tensor, places: Tensor, rows: slice) -> None:
        """Give the columns `places` the scales that the rule makes for these values [rows, columns]."""
        assert isinstance(self.format, BlockType) and self.low.factors is not None
        line = self.format.with_dims([values.shape[1]])
        parts = line.encode(values.contiguous(), self.how, Given(global_scale=self.given.global_scale, symmetric=True))
        assert parts.scales is not None
        self.stored["scales"][rows.start : rows.stop, places] = parts.scales.float()
        scales = Scales(parts.scales, parts.global_scale, parts.zero_points)
        self.low.factors[rows.start : rows.stop, places] = scales.factors(values.dtype)
        if parts.zero_points is not None and self.low.zeros is not None:
            self.low.zeros[rows.start : rows.stop, places] = parts.zero_points.float()
            self.stored["zero_points"][rows.start : rows.stop, places] = parts.zero_points.float()

    def _per_block(self, values: Tensor) -> Tensor:
        """One number per block of what each of its elements has."""
        from ._columns import from_matrix

        assert isinstance(self.format, BlockType)
        tiling = self.format.tiling(self.site.shape)
        split = tiling.split(from_matrix(self.site, values))
        for axis in reversed(tiling.axes):
            split = split.select(axis, 0)
        return split.reshape(tiling.grid)


_KEPT = ("scales", "global_scale", "zero_points", "choice", "high_scales", "high_global_scale", "high_zero_points")


def column_rounding(site: Site, wide: Tensor, given: Encoded | None, how: Rounding, *, updated: bool) -> ColumnRounding:
    """How the columns of a weight are rounded: under the scales that `given` has, or those of the cast's rule.

    UsageError for a mixed format whose blocks have no format yet.
    """
    format = cast("BlockType | MixedType", site.format)
    if given is None:
        if isinstance(format, MixedType):
            raise UsageError("its blocks have no format yet: run `mix` before")
        given = Encoded.of(format, format.encode(wide, how, Given()))
    if isinstance(format, MixedType):
        assert given.choice is not None
        low = _grid(site, format.low, given.scales, given.global_scale, given.zero_points)
        high = _grid(site, format.high, given.high_scales, given.high_global_scale, given.high_zero_points)
        tiling = format.low_block.tiling(site.shape)
        choice = matrix(site, _spread(tiling, given.choice.bool(), site.shape))
        return ColumnRounding(site, format, how, given, low, high, choice)
    low = _grid(site, format, given.scales, given.global_scale, given.zero_points)
    if not updated:
        return ColumnRounding(site, format, how, given, low)
    if not _one_row(format):
        raise UsageError(f"the scales of {format} reach over several rows: they are frozen (scales=frozen)")
    stored = _elementwise(site, given, format)
    return ColumnRounding(site, format, how, given, low, groups=_groups(site, format), stored=stored)


def _grid(site: Site, format: Attribute, scales: Any, over: Any, zeros: Any) -> Grid:
    import torch

    numbers = numbers_of(format)
    if isinstance(numbers, Plain):
        return Grid(numbers.element_numbers, None)
    assert isinstance(format, BlockType)
    tiling = format.tiling(site.shape)
    factors = Scales(scales, over).factors(torch.float32)
    factors = factors.masked_fill(factors == 0, torch.inf)
    spread = matrix(site, _spread(tiling, factors, site.shape)).clone()
    offsets = None if zeros is None else matrix(site, _spread(tiling, zeros.float(), site.shape)).clone()
    return Grid(format.scaling(site.shape).element, spread, offsets)


def _spread(tiling: Any, per_block: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One number per block as one per element."""
    import torch

    split = torch.ones_like(tiling.split(torch.ones(shape)), dtype=per_block.dtype)
    return tiling.merge(split * tiling.spread(per_block))


def _elementwise(site: Site, given: Encoded, format: BlockType | MixedType) -> dict[str, Tensor]:
    """What the blocks of a weight store, one number per element, [rows, K] f32."""
    assert isinstance(format, BlockType)
    tiling = format.tiling(site.shape)
    parts = {"scales": given.scales, "zero_points": given.zero_points}
    return {
        name: matrix(site, _spread(tiling, part.float(), site.shape)).clone()
        for name, part in parts.items()
        if part is not None
    }


def _groups(site: Site, format: BlockType) -> Tensor:
    """The group of each column: the blocks of the first row, numbered from 0."""
    import torch

    tiling = format.tiling(site.shape)
    count = 1
    for size in tiling.grid:
        count *= size
    numbers = torch.arange(count).reshape(tiling.grid)
    return torch.unique(matrix(site, _spread(tiling, numbers.float(), site.shape))[0], return_inverse=True)[1]


def _one_row(format: BlockType) -> bool:
    """Whether a block lies in one row: all but one of its sizes are 1, or it takes the summed dimensions whole."""
    sizes = [dim for dim in format.dims if dim != 1]
    return len(sizes) <= 1 or (set(sizes) == {DYNAMIC_INDEX} and 1 in format.dims)
