"""What memories are filled with: encoded tensors as words, in the order in which a stage reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .codes import OperandCode

if TYPE_CHECKING:
    from numpy import ndarray
    from torch import Tensor

    from ...dialects.formats import Encoded


@dataclass(frozen=True)
class Rows:
    """A matrix as a contraction reads it: codes [rows, padded size], what stands beside the blocks [rows, blocks]."""

    codes: ndarray
    sides: ndarray


def rows_of(encoded: Encoded, code: OperandCode, padded: int) -> Rows:
    """The rows of an encoded matrix [rows, size], zeros behind them up to `padded`."""
    import torch

    rows, size = encoded.shape
    codes = np.zeros((rows, padded), np.int64)
    codes[:, :size] = encoded.codes.to(torch.int64).numpy() & ((1 << code.code_bits) - 1)
    if code.scale is None or encoded.scales is None:
        return Rows(codes, np.zeros((rows, 0), np.int64))
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[encoded.scales.element_size()]
    scales = encoded.scales.view(whole).to(torch.int64).numpy() & ((1 << code.scale.bits) - 1)
    height = rows if code.block_rows is None else code.block_rows
    scales = scales.reshape(-1, scales.shape[-1])[np.arange(rows) // height]
    length = padded if code.block is None else code.block
    missing = -(-padded // length) - scales.shape[1]
    return Rows(codes, np.pad(scales, ((0, 0), (0, missing))))


@dataclass(frozen=True, eq=False)
class MixedBlocks:
    """A matrix encoded in both kinds of a mixed format; `is_low` [grid of blocks] says which kind each block has."""

    low: Encoded
    high: Encoded
    is_low: Tensor


def rows_of_kinds(mixed: MixedBlocks, code: OperandCode, padded: int) -> Rows:
    """The rows of a matrix [rows, size] of two kinds of blocks, each block in its kind, which stands on its scale."""
    low, high = (
        rows_of(encoded, replace(code, elements=(element,)), padded)
        for encoded, element in zip((mixed.low, mixed.high), code.elements, strict=True)
    )
    rows, blocks = low.sides.shape
    height = rows if code.block_rows is None else code.block_rows
    given = mixed.is_low.numpy()[np.arange(rows) // height]
    kinds = np.pad(given, ((0, 0), (0, blocks - given.shape[1])), constant_values=True)
    length = padded if code.block is None else code.block
    spread = kinds.repeat(length, axis=1)[:, :padded]
    assert code.scale is not None
    sides = np.where(kinds, low.sides, high.sides) | (kinds.astype(np.int64) << code.scale.bits)
    return Rows(np.where(spread, low.codes, high.codes), sides)


def packed(numbers: ndarray, width: int) -> ndarray:
    """The last dimension's numbers of `width` bits side by side, the first lowest: uint8 [..., bytes]."""
    return np.packbits(bits_of(numbers, width), axis=-1, bitorder="little")


def bits_of(numbers: ndarray, width: int) -> ndarray:
    """The bits of the last dimension's numbers of `width` bits side by side, the lowest first: uint8 [..., bits]."""
    bits = (numbers[..., None] >> np.arange(width)) & 1
    return bits.astype(np.uint8).reshape(*numbers.shape[:-1], -1)


def widened(parts: Sequence[ndarray], width: int) -> ndarray:
    """Words of several memories, one after the other, as beats of `width` bits."""
    size = -(-width // 8)
    return np.concatenate([np.pad(part, ((0, 0), (0, size - part.shape[1]))) for part in parts])
