"""Blocks under scales in E4M3 made by the circuit are those of the definition, at every boundary between two codes."""

import pytest
import torch

from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.simulation.traffic import Stalls
from mxloom.backends.dataflow.stages.quantize_scaled import QuantizeScaled
from mxloom.dialects.formats import encode_tensor
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point

from .stages import STALLS, codes_of, compare, operand_beats, spread

FORMAT = format_of("!mx.block<16xf4E2M1FN, f8E4M3FN>", rank=1)
SOME = {name: STALLS[name] for name in ("none", "random 0.5")}


def check(x: torch.Tensor, point: Point, stalls: dict[str, Stalls] = SOME) -> None:
    """Numbers [rows, size] as codes of `point`: all beats are those of the encoded tensor."""
    rows, size = x.shape
    code = operand_code(FORMAT, size)
    stage = QuantizeScaled(point, code, 16, rows, size)
    encoded = encode_tensor(x.float() * 2.0**-point.fraction, FORMAT)  # pyright: ignore[reportArgumentType]
    given = {"in": codes_of(x, point.width)}
    compare(stage, given, {"out": operand_beats(encoded, code, 16, 16)}, stalls=stalls)


@pytest.mark.parametrize("size", [64, 70, 16, 7])
@pytest.mark.parametrize("fraction", [0, 5, 12, 20, 24, 29, 34, 40])
def test_all_magnitudes(size: int, fraction: int) -> None:
    check(spread((60, size), 24, fraction + size), Point(24, fraction))


@pytest.mark.parametrize("fraction", [0, 7, 9, 10, 11, 12, 13, 16, 20])
def test_every_largest_magnitude_and_many_ties(fraction: int) -> None:
    """Numbers of 10 bits: each magnitude is the largest of a block, and the others lie on boundaries often."""
    generator = torch.Generator().manual_seed(fraction)
    largest = torch.arange(513)[:, None].clamp(max=512)
    rest = (torch.rand(513, 15, generator=generator) * 2 - 1) * (largest + 0.5)
    x = torch.cat([-largest, rest.trunc().long().clamp(max=511)], 1)
    check(x, Point(10, fraction))


@pytest.mark.parametrize("fraction", [9, 14, 20])
def test_boundaries_of_wide_numbers_and_their_neighbours(fraction: int) -> None:
    """6 x the middle between two scales, and boundary x scale for every digit of the scale, one more and one less."""
    top = (1 << 23) - 1
    quarters = torch.tensor([1, 3, 5, 7, 10, 14, 20])
    rows = []
    for digits in range(8, 16):
        for place in (0, 3, 9, 13):
            # The largest number is 6 x scale, so that every boundary of the block is a multiple of its quarter.
            scale = digits << place
            bounds = quarters * scale
            numbers = torch.cat([bounds, bounds + 1, torch.tensor([24 * scale, -1])])
            rows += [numbers.clamp(max=top), 1 - numbers.clamp(max=top)]
            middle = 3 * (2 * digits + 1) << place
            rows += [torch.full((16,), each).clamp(max=top) for each in (middle - 1, middle, middle + 1)]
    check(torch.stack(rows), Point(24, fraction))


def test_zeros_and_both_ends() -> None:
    x = torch.zeros(6, 16, dtype=torch.long)
    x[1, 3], x[2], x[3], x[4, 0], x[5, 7] = 1, -(1 << 23), (1 << 23) - 1, -1, -(1 << 23)
    for fraction in (0, 12, 23, 40):
        check(x, Point(24, fraction), STALLS)
