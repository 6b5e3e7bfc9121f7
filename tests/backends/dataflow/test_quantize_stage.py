"""Blocks made by the circuit are those that `encode_tensor` makes: every format, scale rule and rounding."""

import pytest

from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.stages.quantize import Quantize
from mxloom.dialects.formats import FixedType, Rounding, encode_tensor
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point

from .stages import codes_of, compare, operand_beats, spread

FORMATS = ("mxint8", "mxint6", "mxint4", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2")


def check(format: object, rule: str | None, rounding: str, size: int, lanes: int, fraction: int, width: int) -> None:
    x = spread((80, size), width, 3)
    encoded = encode_tensor(x.double() * 2.0**-fraction, format, Rounding(scale_rule=rule, rounding=rounding))  # pyright: ignore[reportArgumentType]
    code = operand_code(format, size)  # pyright: ignore[reportArgumentType]
    stage = Quantize(Point(width, fraction), code, lanes, 80, size, rule or "floor", rounding)
    run = compare(stage, {"in": codes_of(x, width)}, {"out": operand_beats(encoded, code, lanes, lanes)})
    ends = run.given["out"].reshape(80, -1)[:, -1]
    # Steady state: the first rows fill two banks.
    assert abs((ends[-1] - ends[19]) - stage.cycles / 80 * 60) <= 1


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", ["floor", "even", "ceil", "rceil"])
def test_scale_rules(format: str, rule: str) -> None:
    check(format_of(format, rank=1), rule, "rne", 70, 32, 12, 24)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("rounding", "size", "lanes", "fraction", "width"),
    [("rna", 64, 8, 20, 24), ("rtz", 64, 8, 20, 16), ("rne", 5, 1, 3, 6), ("rne", 37, 4, 12, 24)],
)
def test_roundings_and_sizes(format: str, rounding: str, size: int, lanes: int, fraction: int, width: int) -> None:
    check(format_of(format, rank=1), "floor", rounding, size, lanes, fraction, width)


@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz"])
def test_fixed_point_needs_no_scale(rounding: str) -> None:
    check(FixedType(8, 4), None, rounding, 60, 8, 12, 24)  # pyright: ignore[reportArgumentType]
