"""Field cases H1 and H4 on every stage: one rounding, in the mode of the operation, and saturation."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow import verification
from mxloom.backends.dataflow.codes import ElementCode, OperandCode, operand_code
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.emission import files
from mxloom.backends.dataflow.float_sum import FloatSum
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls, words
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator, environment, verilator
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.stages.normalize import Normalize
from mxloom.backends.dataflow.stages.patches import Patches
from mxloom.backends.dataflow.stages.pointwise import Binary, Convert
from mxloom.backends.dataflow.stages.pool import Pool
from mxloom.backends.dataflow.stages.quantize import Quantize
from mxloom.backends.dataflow.stages.quantize_mixed import QuantizeMixed
from mxloom.backends.dataflow.stages.quantize_scaled import QuantizeScaled
from mxloom.backends.dataflow.stages.rope import Rope
from mxloom.backends.dataflow.stages.route import Fifo, Fork, Reorder
from mxloom.backends.dataflow.stages.select import Select
from mxloom.backends.dataflow.stages.softmax import Softmax
from mxloom.backends.dataflow.stages.table import Activation
from mxloom.backends.dataflow.verification import vectors
from mxloom.backends.dataflow.window import Window
from mxloom.backends.emulate import build
from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point, Table
from mxloom.dialects.mx import parse_module
from mxloom.dialects.names import identifier

from .examples import Example, differences, kinds, phases, side_by_side, through
from .stages import codes_of, needs_verilator

MOVES_ONLY = {Fork, Fifo, Reorder, Select, Patches}
"""Stages that change no number."""


def run_together(examples: dict[str, Example]) -> list[str]:
    """Examples side by side in the arc simulator; what is wrong about them."""
    graph = side_by_side(examples)
    text = circuit_text(graph.module("panel"))
    device = ArcSimulator(text, graph.input_streams, graph.output_streams)
    return [line for stall in (NO_STALLS, Stalls.random(0.5))
            for line in differences(device.run(phases(graph, examples), stall), examples)]  # fmt: skip


Rule = Callable[[Fraction], int]


def half_up(number: Fraction) -> int:
    return floor(number + Fraction(1, 2))


def away(number: Fraction) -> int:
    return half_up(number) if number >= 0 else -half_up(-number)


RULES: dict[str, Rule] = {"rne": round, "rna": away, "rtz": int}
"""Python's own rounding of fractions: `round` takes ties to even, `int` cuts."""


def in_format(number: Fraction, result: Point, rule: Rule = round) -> int:
    """The code of an exact number: rounded once, held within the format."""
    top = 1 << (result.width - 1)
    return max(-top, min(top - 1, rule(number * Fraction(2) ** result.fraction)))


def plain(width: int, fraction: int) -> OperandCode:
    """Fixed-point numbers as a contraction's operand."""
    return OperandCode("fixed", (ElementCode(width, 0, 0, -fraction, 1 << (width - 1)),))


def times(numbers: Sequence[int], given: Point, factor: tuple[int, Point], result: Point) -> dict[str, Example]:
    """Every stage that multiplies, with one factor in all places: rounds the exact products once."""
    code, point = factor
    x = torch.tensor(numbers)
    exact = [Fraction(n * code) * Fraction(2) ** -(given.fraction + point.fraction) for n in numbers]
    y = torch.tensor([in_format(number, result) for number in exact])
    count, other = len(numbers), torch.full((len(numbers),), code)
    beats = {"a": codes_of(x, given.width), "b": codes_of(other, point.width)}
    out = {"out": codes_of(y, result.width)}
    one, two = plain(given.width, given.fraction), plain(point.width, point.fraction)
    unit = DotProduct(one, two, 1, 1, Window(50, -result.fraction - 12))
    rope = (code & ((1 << point.width) - 1)) * torch.ones(2, dtype=torch.long)
    return {
        "convert": through(Convert(given, result, count, code, point.fraction), x, y),
        "mul": Example(Binary("mul", given, point, result, count), beats, out),
        "kept": through(Binary("mul", given, point, result, count, 1), x, y, other[:1]),
        "weights": Example(
            Contraction(unit, count, 1, 1, result), {"a": beats["a"]}, out, codes_of(other[:1], two.code_bits)
        ),
        "two_streams": Example(
            Contraction(unit, count, 1, 1, result, dynamic=True), {"a": beats["a"], "b": beats["b"][:1]}, out
        ),
        "rope": through(Rope(given, result, point, count // 2, 2, 1), x, y, rope),
    }


def passing(numbers: Sequence[int], given: Point, result: Point) -> dict[str, Example]:
    """Every stage that rounds to nearest even, such that numbers pass as they are into another format."""
    x, count = torch.tensor(numbers), len(numbers)
    exact = [Fraction(n) * Fraction(2) ** -given.fraction for n in numbers]
    y = torch.tensor([in_format(number, result) for number in exact])
    zeros, out = torch.zeros_like(x), {"out": codes_of(y, result.width)}
    both = {"a": codes_of(x, given.width), "b": codes_of(zeros, given.width)}
    one, unit = plain(given.width, given.fraction), plain(2, 0)
    floats = DotProduct(one, unit, 1, 1, FloatSum(1, 1, result))
    window = DotProduct(one, unit, 1, 1, Window(40, -result.fraction))
    word, beats = codes_of(torch.ones(1, dtype=torch.long), 2), {"a": both["a"]}
    # What lies beyond the table of a curve is the number itself; 256 is even in every unit here.
    wide, lift = Point(given.width + 12, given.fraction), 256 << given.fraction
    table = Table("silu", wide, Point(result.width + 12, result.fraction), 4)
    lifted = torch.tensor([in_format(256 + number, table.result) for number in exact])
    biased = Normalize(given, result, 1, count, 1e-6, Point(8, 4), given, centred=True)
    return {
        **times(numbers, given, (1 << 14, Point(16, 14)), result),
        "add": Example(Binary("add", given, given, result, count), both, out),
        "sub": Example(Binary("sub", given, given, result, count), both, out),
        "window": Example(Contraction(window, count, 1, 1, result), beats, out, word),
        "float_sums": Example(Contraction(floats, count, 1, 1, result), beats, out, word),
        "activation": through(Activation(table, count), x + lift, lifted),
        "layer_norm": through(biased, zeros, y, (x & ((1 << given.width) - 1)) << 8),
        "max_pool": through(Pool("max", given, result, count, 2), x.repeat_interleave(2), y),
    }


def mean_of(numbers: Sequence[int], given: Point, result: Point, count: int) -> Example:
    """Means round half up, as `dialects.integer.mean` says."""
    x = torch.tensor(numbers)
    y = [in_format(Fraction(n) * Fraction(2) ** -given.fraction, result, half_up) for n in numbers]
    return through(Pool("mean", given, result, len(numbers), count), x.repeat_interleave(count), torch.tensor(y))


FIELD = [-20, -13, -12, -11, -4, 4, 11, 12, 13, 20]
SHIFTED = {
    "rne": [-2, -2, -2, -1, 0, 0, 1, 2, 2, 2],
    "rna": [-3, -2, -2, -1, -1, 1, 1, 2, 2, 3],
    "rtz": [-2, -1, -1, -1, 0, 0, 1, 1, 1, 2],
}
NEAR = [(n << 12) + (1 << 11) + e for n in range(-4, 4) for e in (-1, 0, 1)]
"""Ties and their neighbours, 2^-12 away: rounding at any place in between would make ties of them."""


@pytest.mark.parametrize("rounding", SHIFTED)
def test_python_rounds_as_the_field_case_says(rounding: str) -> None:
    assert [RULES[rounding](Fraction(n, 8)) for n in FIELD] == SHIFTED[rounding]


def test_ties_go_to_even_in_every_stage() -> None:
    """H1: integers moved by three places."""
    examples = passing(FIELD, Point(12, 3), Point(12, 0))
    np.testing.assert_array_equal(examples["add"].expected["out"], codes_of(torch.tensor(SHIFTED["rne"]), 12))
    examples |= {f"mean_{count}": mean_of(FIELD, Point(12, 3), Point(12, 0), count) for count in (1, 3, 4)}
    assert run_together(examples) == []


def test_every_stage_saturates() -> None:
    """H1: 8.99 and -8.5 into fixed<10, 6> give 7.984375 and -8, where wrapping gives -7.015625 and 7.5."""
    given, result = Point(24, 12), Point(10, 6)
    numbers = [round(8.99 * 2**12), round(-8.5 * 2**12)]
    examples = passing(numbers, given, result)
    np.testing.assert_array_equal(examples["add"].expected["out"], codes_of(torch.tensor([511, -512]), 10))
    assert run_together(examples | {"mean": mean_of(numbers, given, result, 3)}) == []


def test_every_stage_rounds_once() -> None:
    """H4: whatever lies between the exact result and the format it goes to, one rounding is made."""
    examples = passing(NEAR, Point(24, 12), Point(12, 0))
    examples |= {f"mean_{count}": mean_of(NEAR, Point(24, 12), Point(12, 0), count) for count in (1, 3, 7, 8)}
    assert run_together(examples) == []


@pytest.mark.parametrize(
    ("numbers", "factor", "point", "expected"),
    [
        ([7984, 7984], 1583594044, Point(32, 31 + 9), [11, 11]),
        ([833, -833], 1649267442, Point(32, 31 + 8), [2, -2]),
        ([-1032852841, 1032852841], 1578349059, Point(32, 31), [-759122106, 759122106]),
    ],
)
def test_requantizing_by_a_factor_rounds_once(
    numbers: list[int], factor: int, point: Point, expected: list[int]
) -> None:
    """H4: 11.49912 is 11 (a doubled high product, then a rounding shift, gives 12), and -759122106.0966 is ...106."""
    examples = times(numbers, Point(32, 0), (factor, point), Point(32, 0))
    np.testing.assert_array_equal(examples["mul"].expected["out"], codes_of(torch.tensor(expected), 32))
    assert run_together(examples) == []


DEPTHS = {"f4E2M1FN": 3, "f6E2M3FN": 5, "f6E3M2FN": 8, "f8E4M3FN": 17, "f8E5M2": 31, "!mx.fixed<8, 6>": 6,
          "!mx.fixed<4, 2>": 2}  # fmt: skip
"""log2 of the highest bit of an element's range over its smallest step: emax and the step, as OCP MX says them."""
BITS = {"f4E2M1FN": 4, "f6E2M3FN": 6, "f6E3M2FN": 6, "f8E4M3FN": 8, "f8E5M2": 8, "!mx.fixed<8, 6>": 8,
        "!mx.fixed<4, 2>": 4}  # fmt: skip
HIGHEST = 40


def beat(numbers: Sequence[int], codes: Sequence[int], element: str, side: int, side_bits: int) -> np.ndarray:
    """A block as a beat: small codes, by sign and magnitude for floats (-0 too), and what stands beside them."""
    bits, is_fixed = BITS[element], "fixed" in element
    signed = [
        code & ((1 << bits) - 1) if is_fixed else abs(code) | (number < 0) << (bits - 1)
        for number, code in zip(numbers, codes, strict=True)
    ]
    total = sum(code << (i * bits) for i, code in enumerate(signed))
    return words([total | side << (len(codes) * bits)], len(codes) * bits + side_bits)


def largest_code(element: str) -> int:
    """The element of the block's largest number, 2^emax under the block's scale."""
    if "fixed" in element:
        return 1 << DEPTHS[element]
    mantissa = {"f4E2M1FN": 1, "f6E2M3FN": 3, "f6E3M2FN": 2, "f8E4M3FN": 3, "f8E5M2": 2}[element]
    emax = {"f4E2M1FN": 2, "f6E2M3FN": 2, "f6E3M2FN": 4, "f8E4M3FN": 8, "f8E5M2": 15}[element]
    bias = {"f4E2M1FN": 1, "f6E2M3FN": 1, "f6E3M2FN": 3, "f8E4M3FN": 7, "f8E5M2": 15}[element]
    return (emax + bias) << mantissa


def block_of(element: str, unit: int, parts: Sequence[int], rounding: str) -> tuple[list[int], list[int]]:
    """(numbers, codes): parts x 2^-unit of the element's smallest step, beside the largest, which fixes the scale."""
    step = HIGHEST - DEPTHS[element] - unit
    codes = [RULES[rounding](Fraction(part, 1 << unit)) for part in parts]
    return [1 << HIGHEST, *(part << step for part in parts)], [largest_code(element), *codes]


def in_blocks(element: str, unit: int, parts: Sequence[int], rounding: str) -> Example:
    """One block whose scale is that of 2^HIGHEST: every number is rounded to the smallest step once."""
    numbers, codes = block_of(element, unit, parts, rounding)
    given, size = Point(HIGHEST + 2, 12), len(numbers)
    emax = {"f4E2M1FN": 2, "f6E2M3FN": 2, "f6E3M2FN": 4, "f8E4M3FN": 8, "f8E5M2": 15}.get(element, 0)
    code = operand_code(format_of(f"!mx.block<{size}x{element}>", rank=1), size)
    stage = Quantize(given, code, size, 1, size, "floor", rounding)
    out = beat(numbers, codes, element, HIGHEST - 12 - emax + 127, 8)
    return Example(stage, {"in": codes_of(torch.tensor(numbers), given.width)}, {"out": out})


SMALL = [n for n in FIELD if abs(n) < 16]
"""Those that stay within the steps that an element of four bits has beneath its scale."""
TIES = [(n << 6) + 32 + e for n in range(-2, 2) for e in (-1, 0, 1)]


@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz"])
def test_blocks_round_as_their_cast_says(rounding: str) -> None:
    """H1 and H4: the mode is that of the operation; below an element's normal numbers there is one rounding, too."""
    examples = {
        f"{identifier(element)}_{unit}": in_blocks(element, unit, parts, rounding)
        for element, depth in DEPTHS.items()
        for unit, parts in ((3, SMALL), (6, TIES))
        if HIGHEST - depth >= unit
    }
    assert run_together(examples) == []


@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz"])
def test_conversions_round_as_their_cast_says(rounding: str) -> None:
    x, y = torch.tensor(FIELD), torch.tensor(SHIFTED[rounding])
    near = torch.tensor([RULES[rounding](Fraction(n, 1 << 12)) for n in NEAR])
    fixed = operand_code(format_of("fixed<12, 0>", rank=1), len(FIELD))
    beats = sum((code & 0xFFF) << (12 * i) for i, code in enumerate(SHIFTED[rounding]))
    examples = {
        "field": through(Convert(Point(12, 3), Point(12, 0), len(FIELD), rounding=rounding), x, y),
        "near": through(Convert(Point(24, 12), Point(12, 0), len(NEAR), rounding=rounding), torch.tensor(NEAR), near),
        "operand": Example(
            Quantize(Point(12, 3), fixed, len(FIELD), 1, len(FIELD), "floor", rounding),
            {"in": codes_of(x, 12)},
            {"out": words([beats], 12 * len(FIELD))},
        ),
    }
    assert run_together(examples) == []


@pytest.mark.parametrize("rounding", ["rne", "rna", "rtz"])
@pytest.mark.parametrize("high", [False, True])
def test_both_kinds_of_mixed_blocks_round_alike(rounding: str, high: bool) -> None:
    """H1 and H4 in the low kind, where the threshold lets every block be low, and in the high one, where none is."""
    element = "!mx.fixed<4, 2>"
    for unit, parts in ((3, SMALL), (6, TIES)):
        numbers, codes = block_of(element, unit, parts, rounding)
        size, given = len(numbers), Point(HIGHEST + 2, 12)
        block = f"!mx.block<{size}x{element}>"
        code = operand_code(format_of(f"!mx.mixed<{block}, {block}>", rank=1), size)
        stage = QuantizeMixed(given, code, size, 1, size, -1.0 if high else float("inf"), rounding)
        side = (HIGHEST - 12 + 127) | (not high) << 8
        given_beats = {"in": codes_of(torch.tensor(numbers), given.width)}
        one = Example(stage, given_beats, {"out": beat(numbers, codes, element, side, 9)})
        assert run_together({"mixed": one}) == []


def test_blocks_under_float_scales_round_once() -> None:
    """H1 and H4: the largest number is 6 x 256, so that the scale is 256 and the smallest step 128."""
    field = [1536, *(16 * n for n in FIELD), *(128 * n + 64 + e for n in range(-2, 2) for e in (-1, 1))]
    field = [*field, *[0] * (-len(field) % 16)]
    codes = [7 if n == 1536 else round(Fraction(n, 128)) for n in field]
    point, size = Point(24, 0), len(field)
    code = operand_code(format_of(f"!mx.block<{size}xf4E2M1FN, f8E4M3FN>", rank=1), size)
    side = (8 + 7) << 3  # 256 in E4M3
    out = beat(field, codes, "f4E2M1FN", side, 8)
    stage = QuantizeScaled(point, code, size, 1, size)
    assert run_together({"scaled": Example(stage, {"in": codes_of(torch.tensor(field), 24)}, {"out": out})}) == []


def test_probabilities_round_to_even_and_saturate() -> None:
    """H1: a half is a tie of whole numbers, and 1 is beyond fixed<8, 7>."""
    same = torch.full((3, 2), 77)
    halves = Softmax(Point(24, 12), Point(4, 0), 3, 2, 8)
    alone = Softmax(Point(24, 12), Point(8, 7), 3, 1, 8)
    examples = {
        "tie": through(halves, same, torch.zeros_like(same)),
        "one": through(alone, same[:, :1], torch.full((3, 1), 127)),
    }
    assert run_together(examples) == []


def test_no_stage_that_rounds_is_left_out() -> None:
    """Those above, and those that change no number, are all there are; of norms both kinds end in one place."""
    seen = {type(each.stage) for each in passing(FIELD, Point(12, 3), Point(12, 0)).values()}
    assert seen | {Quantize, QuantizeMixed, QuantizeScaled, Softmax} == kinds() - MOVES_ONLY


CASTS = "\n".join(
    f'  %{name} = mx.cast %x {{rounding = "{name}"}} : tensor<10x!mx.fixed<12, 3>> to tensor<10x!mx.fixed<12, 0>>'
    for name in SHIFTED
)
MODULE = f"""
func.func @f(%x: tensor<10x!mx.fixed<12, 3>>, %y: tensor<2x!mx.fixed<24, 12>>)
    -> (tensor<10x!mx.fixed<12, 0>>, tensor<10x!mx.fixed<12, 0>>, tensor<10x!mx.fixed<12, 0>>,
        tensor<2x!mx.fixed<10, 6>>) attributes {{outputs = ["a", "b", "c", "d"]}} {{
{CASTS}
  %narrow = mx.cast %y : tensor<2x!mx.fixed<24, 12>> to tensor<2x!mx.fixed<10, 6>>
  func.return %rne, %rna, %rtz, %narrow : tensor<10x!mx.fixed<12, 0>>, tensor<10x!mx.fixed<12, 0>>,
    tensor<10x!mx.fixed<12, 0>>, tensor<2x!mx.fixed<10, 6>>
}}"""


def test_interpreter_kernel_and_hardware_agree() -> None:
    """H1: the mode stands in the operation, and all that run it read it there."""
    module, store = parse_module(MODULE), WeightStore()
    given = (torch.tensor(FIELD) / 8.0, torch.tensor([round(8.99 * 2**12), round(-8.5 * 2**12)]) * 2.0**-12)
    right = [torch.tensor(SHIFTED[name]).double() for name in SHIFTED]
    right.append(torch.tensor([7.984375, -8.0]).double())
    for run in (Interpreter(module, store), build(module, store)):
        for found, expected in zip(run(*given), right, strict=True):
            assert torch.equal(found.double(), expected)
    graph = lower(module, store)
    graph.add_forks()
    made = vectors(module, store, graph, [given])
    for name, expected in zip(graph.outputs, right, strict=True):
        codes = codes_of((expected * 2.0**name.point.fraction).long(), name.point.width)
        np.testing.assert_array_equal(made.outputs[name.name], codes)
    text = circuit_text(graph.module("casts"))
    assert verification.compare(ArcSimulator(text, graph.input_streams, graph.output_streams), graph, made).is_equal


@pytest.mark.slow
@needs_verilator
def test_the_emitted_test_bench_agrees(tmp_path: Path) -> None:
    module, store = parse_module(MODULE), WeightStore()
    graph = lower(module, store)
    graph.add_forks()
    given = (torch.tensor(FIELD) / 8.0, torch.tensor([round(8.99 * 2**12), round(-8.5 * 2**12)]) * 2.0**-12)
    made = vectors(module, store, graph, [given])
    text = circuit_text(graph.module("casts"))
    device = VerilatorSimulator(text, graph.input_streams, graph.output_streams)
    assert verification.compare(device, graph, made).is_equal
    for name, content in files(graph, "casts", made, {}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    command = ["make", "sim", f"VERILATOR={verilator()}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0 and "32 beats, 0 mismatches" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
