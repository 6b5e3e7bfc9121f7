"""Features of designs against counts by hand; the lists of designs."""

from dataclasses import replace

import pytest

from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.cost.designs import (
    blind_designs,
    design_of,
    fit_designs,
    held_out_designs,
    operand,
)
from mxloom.backends.dataflow.cost.features import (
    Multiplier,
    dsp_blocks,
    features,
    features_on,
    multipliers,
    nonzero_digits,
    shifter_cells,
    tree_bits,
)
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.float_sum import FloatSum
from mxloom.backends.dataflow.floats import ADD_STEPS
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.stages.pointwise import Binary
from mxloom.backends.dataflow.window import Window
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point

from .cost_designs import unit


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int8", "mxint8"),
        ("int4", "mxint4"),
        ("e2m1", "mxfp4"),
        ("e2m3", "mxfp6_e2m3"),
        ("e3m2", "mxfp6_e3m2"),
        ("e4m3", "mxfp8_e4m3"),
        ("e5m2", "mxfp8_e5m2"),
        ("trit:f32", "ternary"),
    ],
)
def test_operands_of_the_lists_are_those_of_the_formats(text: str, name: str) -> None:
    expected = operand_code(format_of(name, rank=2), 4096)
    assert replace(operand(text), name=expected.name) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int4:bf16:128", "int4_g128"),
        ("int8:f32", "int8_channel"),
        ("int8:f32:?x?", "int8_tensor"),
        ("e2m1:e4m3:16", "nvfp4"),
    ],
)
def test_scales_of_the_lists_hold_for_as_many_numbers_as_those_of_the_formats(text: str, name: str) -> None:
    found, expected = operand(text), operand_code(format_of(name, rank=2), 4096)
    assert (found.scale, found.block, found.block_rows) == (expected.scale, expected.block, expected.block_rows)
    assert operand("int4:bf16:4x32").block_rows == 4 and operand("int4:bf16:4x32").block == 32


def test_lines_that_describe_nothing() -> None:
    with pytest.raises(MxloomError, match='"int" is no element'):
        operand("int")
    with pytest.raises(MxloomError, match='"adder" is no kind of design'):
        design_of("adder a=int8")
    with pytest.raises(MxloomError, match='"acc=f16" is no accumulator'):
        design_of("dot a=int8 lanes=8 acc=f16")


def test_points_and_sums_in_f32_of_the_lists() -> None:
    add = design_of("binary operation=add a=24.22 b=24 result=24.15")
    assert isinstance(add, Binary)
    assert (add.a, add.b, add.result) == (Point(24, 22), Point(24, 12), Point(24, 15))
    line = "a=int8 b=int8 lanes=8 segment=32 acc=f32 partials=4 result=24"
    expected = FloatSum(4, 6, Point(24, 12))
    assert unit(f"dot {line} segments=6").accumulator == expected
    whole = design_of(f"contraction {line} columns=32 size=192")
    assert isinstance(whole, Contraction) and whole.unit.accumulator == expected


def test_no_tested_design_is_fitted() -> None:
    fitted, held_out, blind = fit_designs(), held_out_designs(), blind_designs()
    assert len({*fitted, *held_out, *blind}) == len(fitted) + len(held_out) + len(blind)
    learnt, *tested = [[unit(line) for line in lines if line.startswith("dot")] for lines in (fitted, held_out, blind)]
    windowed = [[one for one in part if isinstance(one.accumulator, Window)] for part in tested]
    assert len(learnt) >= 60 and [len(part) for part in windowed] == [20, 20]
    for part in tested:
        assert not _pairs(learnt) & _pairs(part)
        assert not {one.lanes for one in learnt} & {one.lanes for one in part}
        assert _windows(part) and not _windows(learnt) & _windows(part)
    assert not _pairs(windowed[0]) & _pairs(windowed[1])


def _pairs(units: list[DotProduct]) -> set[tuple[str, str]]:
    return {(one.a.name, one.b.name) for one in units}


def _windows(units: list[DotProduct]) -> set[int]:
    return {one.accumulator.width for one in units if isinstance(one.accumulator, Window)}


def test_every_design_has_features() -> None:
    for line in [*fit_designs(), *held_out_designs(), *blind_designs()]:
        found = features(design_of(line))
        assert found["constant"] == 1 and all(value >= 0 for value in found.values())


def test_cells_by_hand() -> None:
    # Two levels: 4 bits become 5, then 7.
    assert shifter_cells(4, 3, 100) == 5 + 7
    assert shifter_cells(4, 3, 6) == 5 + 6
    assert shifter_cells(4, 0, 100) == 0
    assert tree_bits(4, 8) == 2 * 9 + 10
    assert tree_bits(3, 8) == 9 + 10
    assert tree_bits(1, 8) == 0
    assert [nonzero_digits(n) for n in (1, 7, 15, 10, 181)] == [1, 2, 2, 2, 5]  # 181 = 256 - 64 - 16 + 4 + 1
    assert Multiplier(8, 8).pairs == 64
    # Four rows of 8 bits, three adders of 11.
    assert Multiplier(8, 8).recoded == 4 * 8 + 3 * 11
    assert Multiplier.by(7, 10).added == 10


def test_features_of_an_int8_unit_by_hand() -> None:
    found = features_on(unit("dot a=int8 b=int8 lanes=8 segment=32 window=32"), "xc7")
    # Products lie in -127 x 128 .. 2^14: 16 bits; the sum of 32 of them has 21.
    assert found["multiplier"] == 8 * 64
    assert found["adder"] == 4 * 17 + 2 * 18 + 19 + 21
    assert found["register"] == 8 * 16 + 21 + 21 + 3 * 32
    # Three stages carry the exponents' sum of 9 bits; five carry three flags.
    assert found["delay"] == 3 * 9 + 5 * 3
    assert found["negation"] == 0


def test_ternary_weights_have_no_multiplier() -> None:
    assert not multipliers(unit("dot a=int8:none b=trit:none lanes=8 segment=32 window=32"))


def test_dsp_blocks() -> None:
    assert dsp_blocks((Multiplier(25, 18),), "xc7_dsp") == 1
    assert dsp_blocks((Multiplier(26, 18),), "xc7_dsp") == 2
    assert dsp_blocks((Multiplier(24, 24, 3),), "ecp5") == 12
    assert dsp_blocks((Multiplier(4, 4),), "xc7_dsp") == 0  # 8 bits of a product are too few
    assert dsp_blocks((Multiplier(25, 18),), "xc7") == 0


def test_features_of_sums_in_f32_by_hand() -> None:
    line = "dot a=int8 b=int8 lanes=8 segment=32 acc=f32 partials=4 segments=6 result=24"
    found, window = features(unit(line)), features(unit("dot a=int8 b=int8 lanes=8 segment=32 window=32"))
    # Three additions follow the partial sums; six segments of 4 beats leave time for all of them in one adder.
    assert found["float_adder"] == 2
    assert found["float_delay"] == 32 * ADD_STEPS * 3
    # Four partial sums, the result, and the exact sum of 21 bits.
    assert found["float_register"] == 4 * 32 + 24 + 21
    assert found["float_shifter"] == 5 * 21
    # Before the accumulator both units are the same; a window's registers are left out.
    assert found["adder"] == window["adder"] and found["register"] == window["register"] - 3 * 32
    assert found["window"] == 0


def test_numbers_under_no_scale_have_no_block_to_look_at() -> None:
    scaled, plain = (
        features(design_of(f"quantize given=24 to={code} lanes=16 size=64")) for code in ("int8", "int8:none")
    )
    assert plain["rounding"] == 24 + 8 and "block" not in plain and "shifter" not in plain
    assert scaled["block"] == 1 and "rounding" not in scaled and scaled["adder"] == 4 * 24 + 8


def test_sums_in_f32_leave_their_unit_in_the_result_s_format() -> None:
    line = "contraction a=int8 b=int8 lanes=8 segment=32 columns=32 size=192 copies=2 result=24 "
    assert features(design_of(f"{line} acc=f32 partials=4"))["adder"] == 0
    assert features(design_of(f"{line} window=32"))["adder"] == 2 * (32 + 24)
