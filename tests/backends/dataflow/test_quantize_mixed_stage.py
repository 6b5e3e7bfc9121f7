"""Mixed blocks made by the circuit are those of the definition, and the kind is that of the exact impact."""

from dataclasses import replace
from fractions import Fraction
from math import inf, nextafter

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.stages.quantize_mixed import QuantizeMixed
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import MixedType, Rounding, block_impact, encode_tensor, quantize
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point

from .stages import codes_of, compare, spread, words

FP4, FP8, E3M2, INT4, INT8 = "f4E2M1FN", "f8E4M3FN", "f6E3M2FN", "!mx.fixed<4, 2>", "!mx.fixed<8, 6>"
ROWS = 80


def mixed(low: str, high: str, block: int) -> MixedType:
    found = format_of(f"mixed<!mx.block<{block}x{low}>, !mx.block<{block}x{high}>>", rank=1)
    assert isinstance(found, MixedType)
    return found


def impacts_of(
    x: torch.Tensor, type: MixedType, rounding: str = "rne", weights: torch.Tensor | None = None
) -> list[Fraction]:
    """The sum over each block of g^2 (Q_low - Q_high)^2 in exact arithmetic (FGMP, section 3.1), row after row."""
    heavy = [Fraction(each) for each in (torch.ones(x.shape[1]) if weights is None else weights).tolist()]
    block = type.low_block.dims[-1]
    how = Rounding(rounding=rounding)
    pairs = zip(*(quantize(x, part, how).tolist() for part in (type.low, type.high)), strict=True)
    found: list[Fraction] = []
    for low, high in pairs:
        squares = [g * (Fraction(a) - Fraction(b)) ** 2 for g, a, b in zip(heavy, low, high, strict=True)]
        found += [sum(squares[start : start + block], Fraction()) for start in range(0, len(squares), block)]
    return found


def expected_beats(x: torch.Tensor, type: MixedType, is_low: list[bool], rounding: str = "rne") -> np.ndarray:
    """Each block in its kind: codes, the first lowest, the scale, and a 1 on top for the low kind."""
    size = x.shape[1]
    code, block = operand_code(type, size), type.low_block.dims[-1]
    encoded = [encode_tensor(x, part, Rounding(rounding=rounding)) for part in (type.low, type.high)]  # pyright: ignore[reportArgumentType]
    numbers: list[int] = []
    for place, low in enumerate(is_low):
        row, start = place // -(-size // block), place % -(-size // block) * block
        chosen, element = (encoded[0], code.elements[0]) if low else (encoded[1], code.elements[1])
        codes = (chosen.codes[row, start : start + block].long() & ((1 << element.bits) - 1)).tolist()
        number = sum(each << (lane * code.code_bits) for lane, each in enumerate(codes))
        assert chosen.scales is not None
        side = int(chosen.scales.view(torch.uint8)[row, start // block]) | int(low) << 8
        numbers.append(number | side << (block * code.code_bits))
    return words(numbers, block * code.code_bits + code.side_bits)


def check(
    type: MixedType, threshold: float, *, size: int = 70, width: int = 24, fraction: int = 12, rounding: str = "rne"
) -> list[bool]:
    """Compare a stage under all stalls; returns which blocks are low."""
    x = spread((ROWS, size), width, 3)
    values = x.double() * 2.0**-fraction
    code, block = operand_code(type, size), type.low_block.dims[-1]
    impacts = impacts_of(values, type, rounding)
    is_low = [impact <= threshold for impact in impacts]
    stage = QuantizeMixed(Point(width, fraction), code, block, ROWS, size, threshold, rounding)
    run = compare(stage, {"in": codes_of(x, width)}, {"out": expected_beats(values, type, is_low, rounding)})
    ends = run.given["out"].reshape(ROWS, -1)[:, -1]
    # Steady state: the first rows fill two banks.
    assert abs((ends[-1] - ends[19]) - stage.cycles / ROWS * 60) <= 1
    return is_low


@pytest.mark.parametrize("size", [70, 64, 33])
@pytest.mark.parametrize("block", [16, 32])
def test_thresholds_that_leave_all_some_and_none_low(block: int, size: int) -> None:
    type = mixed(FP4, FP8, block)
    values = spread((ROWS, size), 24, 3).double() * 2.0**-12
    impacts = sorted(impacts_of(values, type))
    most = impacts[int(0.7 * len(impacts))]
    assert all(check(type, inf, size=size))
    assert not any(check(type, -1.0, size=size))
    share = sum(check(type, float(most), size=size)) / len(impacts)
    assert 0.65 <= share <= 0.75
    zeros = sum(impact == 0 for impact in impacts)
    assert 0 < zeros == sum(check(type, 0.0, size=size))


@pytest.mark.parametrize("block", [16, 32])
def test_a_block_whose_impact_is_the_threshold_stays_low(block: int) -> None:
    """Ties, and thresholds one step of f64 below them, at large, middle and small impacts."""
    type = mixed(FP4, FP8, block)
    values = spread((ROWS, block), 24, 3).double() * 2.0**-12
    impacts = sorted(each for each in impacts_of(values, type) if each)
    for tie in (impacts[0], impacts[len(impacts) // 2], impacts[-1]):
        at, below = (sum(check(type, each, size=block)) for each in (float(tie), nextafter(float(tie), 0.0)))
        assert at - below == impacts.count(tie)


@pytest.mark.parametrize(
    ("low", "high"), [(FP4, FP8), (FP4, E3M2), (FP4, INT8), (INT4, INT8), (INT4, FP8), (E3M2, FP8), (FP8, FP4)]
)
@pytest.mark.parametrize(("width", "fraction"), [(24, 12), (16, 20), (6, 3)])
def test_kinds_and_widths(low: str, high: str, width: int, fraction: int) -> None:
    type = mixed(low, high, 16)
    values = spread((ROWS, 40), width, 3).double() * 2.0**-fraction
    impacts = sorted(impacts_of(values, type))
    check(type, float(impacts[len(impacts) // 2]), size=40, width=width, fraction=fraction)


@pytest.mark.parametrize("rounding", ["rna", "rtz"])
def test_roundings(rounding: str) -> None:
    type = mixed(FP4, FP8, 16)
    values = spread((ROWS, 40), 24, 3).double() * 2.0**-12
    impacts = sorted(impacts_of(values, type, rounding))
    check(type, float(impacts[len(impacts) // 2]), size=40, rounding=rounding)


@pytest.mark.parametrize(("size", "block"), [(70, 32), (64, 16), (33, 16)])
def test_sensitivities_of_channels(size: int, block: int) -> None:
    """Channels of no, of little and of the most weight; the definition, in f64, decides alike."""
    type, point = mixed(FP4, FP8, block), Point(12, 14)
    codes = torch.randint(0, 2048, (size,), generator=torch.Generator().manual_seed(1))
    codes = (codes >> torch.arange(size) % 11).masked_fill(torch.arange(size) % 7 == 0, 0)
    codes[1::9] = 2047
    weights = codes.double() * 2.0**-point.fraction
    x = spread((ROWS, size), 24, 3)
    values = x.double() * 2.0**-12
    impacts = impacts_of(values, type, weights=weights)
    stage = QuantizeMixed(Point(24, 12), operand_code(type, size), block, ROWS, size, 0.0, "rne", point)
    (memory,) = stage.memories
    load = codes_of(torch.cat([codes, codes.new_zeros(memory.depth - size)]), point.width)
    for tie in (sorted(impacts)[len(impacts) * 7 // 10], max(impacts)):
        for threshold in (float(tie), nextafter(float(tie), 0.0)):
            is_low = [impact <= threshold for impact in impacts]
            how = Rounding(threshold=threshold, exact=True)
            assert [not each for each in is_low] == (
                block_impact(values.float(), type, weights, how) > threshold
            ).flatten().tolist()
            stage = replace(stage, threshold=threshold)
            compare(stage, {"in": codes_of(x, 24)}, {"out": expected_beats(values, type, is_low)}, load)


def test_what_has_no_hardware_is_refused() -> None:
    wide = operand_code(mixed(FP4, "f8E5M2", 32), 64)
    with pytest.raises(MxloomError, match=r"f8E5M2.*the impact of a block takes \d+ digits, and the reference has 53"):
        QuantizeMixed(Point(24, 12), wide, 32, 4, 64)
    with pytest.raises(MxloomError, match="blocks of 32 numbers in beats of 16"):
        QuantizeMixed(Point(24, 12), operand_code(mixed(FP4, FP8, 32), 64), 16, 4, 64)
