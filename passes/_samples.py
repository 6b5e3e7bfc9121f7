"""Inputs to calibrate with, one sequence each, and which of their positions are data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xdsl.ir import SSAValue

from ..dialects.errors import MxloomError, UsageError
from ..dialects.operations._shapes import UNKNOWN, shape_of

if TYPE_CHECKING:
    from torch import Tensor

MASK = "attention_mask"
"""The input that says which tokens are data: 0 is padding."""


@dataclass(frozen=True)
class Sample:
    """One sequence: the module's inputs, and the mask [batch, tokens] of its data where not all of it is."""

    inputs: tuple[Tensor, ...]
    mask: Tensor | None = None

    @property
    def tokens(self) -> int | None:
        """How many tokens are data; None where that is all."""
        return None if self.mask is None else int(self.mask.sum())

    def rows(self, leading: Sequence[int], what: str) -> Tensor | None:
        """Which rows of a value are data, flat, for all its sizes but that of its channels; None where all are.

        Raises MxloomError where a row stands for no token that can be told.
        """
        if self.mask is None:
            return None
        batch, tokens = self.mask.shape
        leading = tuple(leading)
        if leading == (batch,):
            return self.mask.any(1)
        if leading == (batch * tokens,):
            return self.mask.flatten()
        if tokens == 1 and leading[:1] == (batch,):
            return self.mask.reshape(batch, *[1] * (len(leading) - 1)).expand(leading).flatten()
        places = [axis for axis, size in enumerate(leading) if axis > 0 and size == tokens]
        if leading[:1] != (batch,) or not places:
            raise MxloomError(
                f"{what}: its rows {list(leading)} cannot be told to be tokens of {list(self.mask.shape)}, of which "
                "some are padding; give sequences without padding, one by one"
            )
        shape = [1] * len(leading)
        shape[0], shape[places[0]] = batch, tokens
        return self.mask.reshape(shape).expand(leading).flatten()


def samples_of(arguments: Sequence[SSAValue], inputs: Iterable[Sequence[Tensor]]) -> list[Sample]:
    """Every sequence of the inputs on its own, without the padding around it, where the module's sizes may change.

    A batch whose size the module has fixed comes once for each of its sequences, the others being no data.
    Raises MxloomError for values that are NaN or infinite, and for an input without data.
    """
    found: list[Sample] = []
    for place, given in enumerate(inputs):
        _check(arguments, place, given)
        found += _sequences(arguments, place, [tensor.detach().cpu() for tensor in given])
    return found


def _check(arguments: Sequence[SSAValue], place: int, given: Sequence[Tensor]) -> None:
    if len(given) != len(arguments):
        raise UsageError(f"calibration input {place}: the module takes {len(arguments)} inputs, got {len(given)}")
    for argument, tensor in zip(arguments, given, strict=True):
        if tensor.is_floating_point() and (bad := int((~tensor.isfinite()).sum())):
            raise MxloomError(
                f"calibration input {place}: {bad} of {tensor.numel()} values of {argument.name_hint} are NaN or "
                "infinite; leave such inputs out"
            )


def _sequences(arguments: Sequence[SSAValue], place: int, given: Sequence[Tensor]) -> list[Sample]:
    sizes = {tensor.shape[0] if tensor.ndim else 0 for tensor in given}
    (batch,) = sizes if len(sizes) == 1 else (1,)  # inputs that have no size in common are one sequence
    if batch < 2:
        return [_cut(arguments, given, _data(arguments, place, given))]
    if all(shape_of(argument)[:1] == (UNKNOWN,) for argument in arguments):
        rows = [[tensor[row : row + 1] for tensor in given] for row in range(batch)]
        return [_cut(arguments, one, _data(arguments, place, one)) for one in rows]
    data = _data(arguments, place, given)
    rows = data.new_zeros(batch, batch).fill_diagonal_(True).unbind()
    return [_cut(arguments, given, data & row[:, None]) for row in rows]


def _data(arguments: Sequence[SSAValue], place: int, given: Sequence[Tensor]) -> Tensor:
    """Which positions are data: [batch, tokens], or [batch, 1] where no input counts tokens."""
    import torch

    names = [argument.name_hint for argument in arguments]
    if MASK in names and given[names.index(MASK)].ndim == 2:
        data = given[names.index(MASK)] != 0
        if not bool(data.any(1).all()):
            raise MxloomError(f"calibration input {place}: its {MASK} is 0 everywhere, so it has no data (tokens 0)")
        return data
    tokens = next((tensor for tensor in given if tensor.ndim == 2 and not tensor.is_floating_point()), None)
    batch = given[0].shape[0] if given and given[0].ndim else 1
    return torch.ones(batch, 1, dtype=torch.bool) if tokens is None else torch.ones_like(tokens, dtype=torch.bool)


def _cut(arguments: Sequence[SSAValue], given: Sequence[Tensor], data: Tensor) -> Sample:
    """A sample without what lies before the first and behind the last token of data, where sizes may change."""
    names = [argument.name_hint or "" for argument in arguments]
    places = data.any(0).nonzero()
    kept = slice(int(places[0]), int(places[-1]) + 1)
    along = [_is_along(name, tensor, data.shape[1]) for name, tensor in zip(names, given, strict=True)]
    free = [shape_of(argument)[1] == UNKNOWN for argument, is_cut in zip(arguments, along, strict=True) if is_cut]
    if kept.stop - kept.start < data.shape[1] and free and all(free):
        given = [tensor[:, kept] if is_cut else tensor for tensor, is_cut in zip(given, along, strict=True)]
        data = data[:, kept]
    return Sample(tuple(given), None if bool(data.all()) else data)


def _is_along(name: str, tensor: Tensor, tokens: int) -> bool:
    """Whether an input has one value, or one row, for each token that the mask speaks of."""
    return tensor.ndim > 1 and tensor.shape[1] == tokens and not name.startswith("decoder_")
