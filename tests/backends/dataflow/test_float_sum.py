"""Sums in f32 by the circuit against `dialects.contractions.linear`, and that against exact fractions."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.float_sum import FloatSum
from mxloom.backends.dataflow.floats import ADD_STEPS, added, unpacked
from mxloom.backends.dataflow.rtl import Module, circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Phase, Run, Stalls
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator
from mxloom.backends.dataflow.stages._schedule import Schedule
from mxloom.backends.dataflow.stages._stream import Pipe, Stage
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.dialects.accumulator import AccumulatorAttr
from mxloom.dialects.contractions import coded_tensor, linear
from mxloom.dialects.integer import Point

from .stages import STALLS, codes_of, compare, needs_verilator, operand_beats, simulator, spread
from .test_contraction_stage import load, random_operand, type_of

FORMATS = ["mxint4", "mxint6", "mxint8", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"]
Device = Callable[[Stage], ArcSimulator | VerilatorSimulator]
PAIRS = [*((name, name) for name in FORMATS), *zip(FORMATS, FORMATS[3:] + FORMATS[:3], strict=True)]
SINGLE = [("fixed 8 5", "fixed 8 4"), ("fixed 12 5", "mxint8"), ("mxfp8_e5m2", "fixed 8 3"), ("fixed 16 14", "mxfp4")]


def codes_in(total: torch.Tensor, into: Point) -> torch.Tensor:
    """f32 as codes of a fixed-point format, rounded once; what is no number is 0."""
    top = 1 << (into.width - 1)
    return (total.double() * 2.0**into.fraction).round().nan_to_num(0.0, top, -top).clamp(-top, top - 1).long()


def build(
    types: tuple[Any, Any],
    size: int,
    partials: int,
    result: Point,
    *,
    rows: int,
    columns: int,
    lanes: int | None = None,
    bias: Point | None = None,
    copies: int = 1,
    dynamic: bool = False,
) -> Contraction:
    one, other = (operand_code(type, size) for type in types)
    blocks = [code.block for code in (one, other) if code.block is not None]
    lanes = lanes or (min(blocks) if blocks else 10)
    segment = min(blocks) if blocks else -(-size // lanes) * lanes
    unit = DotProduct(one, other, lanes, segment, FloatSum(partials, -(-size // segment), result), bias)
    return Contraction(unit, rows, columns, size, result, copies, dynamic)


def check(
    a: str,
    b: str,
    scales: str | tuple[int, int] = "ordinary",
    partials: int = 1,
    *,
    size: int = 150,
    rows: int = 30,
    columns: int = 6,
    result: Point | None = None,
    stalls: dict[str, Stalls] | None = None,
    device: Device = simulator,
    **options: Any,
) -> tuple[Contraction, Run, torch.Tensor]:
    """Every beat of a product equals its meaning; (the stage, its run, the sums in f32)."""
    types, result = (type_of(a), type_of(b)), result or Point(24, 8)
    stage = build(types, size, partials, result, rows=rows, columns=columns, **options)
    left, right = (
        random_operand(types[0], (rows, size), 0, scales),
        random_operand(types[1], (columns, size), 1, scales),
    )
    bias = stage.unit.bias
    biases = spread((columns,), bias.width, 9) if bias else None
    start = biases.float() * 2.0**-bias.fraction if bias and biases is not None else None
    total = linear(coded_tensor(left), coded_tensor(right), start, AccumulatorAttr.of("f32", "rne", partials))
    out = codes_of(codes_in(total, result), result.width)
    beats = operand_beats(left, stage.unit.a, stage.unit.lanes, stage.unit.lanes)
    if stage.dynamic:
        words = operand_beats(right, stage.unit.b, stage.unit.lanes, stage.unit.lanes)
        run = compare(stage, {"a": beats, "b": words}, {"out": out}, None, stalls, device(stage))
    else:
        run = compare(stage, {"a": beats}, {"out": out}, load(stage, right, biases), stalls, device(stage))
    return stage, run, total


def rounded(number: Fraction, lowest: int) -> Fraction:
    """A number rounded to 24 bits, ties to even, or to a multiple of 2^lowest where that is coarser."""
    if number == 0:
        return number
    exponent = abs(number.numerator).bit_length() - number.denominator.bit_length()
    exponent -= abs(number) < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - 23, lowest)
    return round(number / step) * step


@pytest.mark.parametrize(("a", "b", "scales"), [("mxint8", "mxfp8_e5m2", (110, 140)), ("mxfp4", "mxint8", (50, 62))])
@pytest.mark.parametrize("partials", [1, 2, 4])
def test_the_meaning_is_that_of_exact_fractions(a: str, b: str, scales: tuple[int, int], partials: int) -> None:
    """`contractions.linear` against fractions: segments, then partial sums, then the bias, each rounded once."""
    x, w = (random_operand(type_of(name), (6, 230), seed, scales) for seed, name in enumerate((a, b)))
    bias = torch.randn(6, generator=torch.Generator().manual_seed(0)) * float(w.decode().abs().mean())
    found = linear(coded_tensor(x), coded_tensor(w), bias, AccumulatorAttr.of("f32", "rne", partials))
    left, right = ([[Fraction(v) for v in row] for row in each.decode().double().tolist()] for each in (x, w))
    for row, column in product(range(6), range(6)):
        sums = [Fraction(0)] * partials
        for index, start in enumerate(range(0, 230, 32)):
            pairs = zip(left[row][start : start + 32], right[column][start : start + 32], strict=True)
            term = rounded(sum((p * q for p, q in pairs), Fraction(0)), -1000)
            sums[index % partials] = rounded(sums[index % partials] + term, -149)
        for each in (*sums[1:], Fraction(float(bias[column]))):
            sums[0] = rounded(sums[0] + each, -149)
        assert Fraction(float(found[row, column])) == sums[0]


FEW = {"none": NO_STALLS, "random 0.5": STALLS["random 0.5"]}


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("scales", [pytest.param("ordinary", marks=pytest.mark.slow), "all"])
def test_every_pair_of_formats(a: str, b: str, scales: str) -> None:
    check(a, b, scales, stalls=FEW)


@pytest.mark.parametrize(
    ("a", "b", "scales", "result"),
    [
        ("mxfp8_e5m2", "mxfp8_e5m2", (0, 66), Point(24, 149)),
        ("mxint8", "mxfp4", (40, 70), Point(24, 149)),
        ("mxfp8_e5m2", "mxfp8_e5m2", (16, 70), Point(24, 149)),
        ("mxfp8_e4m3", "mxfp8_e5m2", (165, 200), Point(24, -105)),
        ("mxint8", "mxint8", (187, 196), Point(20, -112)),
        ("mxfp6_e3m2", "mxfp4", (160, 254), Point(16, -115)),
    ],
)
def test_sums_at_the_ends_of_f32(a: str, b: str, scales: tuple[int, int], result: Point) -> None:
    """Subnormals, products of scales that are 0 or infinite, sums that are infinite or no number."""
    _, _, total = check(a, b, scales, 2, result=result, rows=60, columns=12, stalls=FEW)
    magnitudes = total.abs()
    if result.fraction > 0:
        assert ((magnitudes > 0) & (magnitudes < 2.0**-126)).float().mean() > 0.005
    else:
        assert magnitudes.isinf().float().mean() > 0.005 and (magnitudes > 2.0**120).float().mean() < 0.9


def test_terms_that_cancel() -> None:
    """The second half of each row is the first with other signs, but for one number: nearly all is lost."""
    types = type_of("mxint8"), type_of("mxint8")
    left, right = (random_operand(type, (20, 256), seed, "ordinary") for seed, type in enumerate(types))
    for encoded in (left, right):
        assert encoded.scales is not None
        encoded.codes[:, 128:] = encoded.codes[:, :128]
        encoded.scales[:, 4:] = encoded.scales[:, :4]
    left.codes[:, :128] = -left.codes[:, :128].clamp(min=-127)
    left.codes[::2, 5] = 1
    for partials in (1, 2, 4):
        stage = build(types, 256, partials, Point(24, 12), rows=20, columns=20)
        total = linear(coded_tensor(left), coded_tensor(right), None, AccumulatorAttr.of("f32", "rne", partials))
        assert (total[1::2] == 0).float().mean() > 0.3
        out = codes_of(codes_in(total, Point(24, 12)), 24)
        compare(stage, {"a": operand_beats(left, stage.unit.a, 32, 32)}, {"out": out}, load(stage, right, None), FEW)


@pytest.mark.parametrize("partials", [1, 4, *(pytest.param(each, marks=pytest.mark.slow) for each in (2, 8))])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 300, "bias": Point(24, 10)},
        {"size": 70, "bias": Point(24, 10), "columns": 7, "copies": 3},
        {"size": 600, "lanes": 8, "copies": 2, "bias": Point(24, 20)},
        {"size": 130, "lanes": 16, "dynamic": True, "copies": 3},
        {"size": 32, "bias": Point(24, -3)},
        {"size": 20, "lanes": 4},
    ],
)
def test_partial_sums_and_shapes(partials: int, options: dict[str, Any]) -> None:
    stage, run, _ = check("mxint8", "mxfp4", "ordinary", partials, **options)
    rows, columns = stage.rows, stage.columns
    ends = run.given["out"].reshape(rows, columns)[:, -1]
    measured = ends[-1] - ends[rows // 2]
    assert abs(measured - stage.cycles / rows * (rows - 1 - rows // 2)) <= 2


def verilated(stage: Stage) -> VerilatorSimulator:
    loads = {"load": max(memory.width for memory in stage.memories)}
    return VerilatorSimulator(circuit_text(stage.module("dut")), {**stage.inputs, **loads}, stage.outputs)


@needs_verilator
@pytest.mark.slow
def test_verilator_agrees() -> None:
    check("mxfp8_e4m3", "mxint8", partials=2, size=200, bias=Point(24, 10), copies=2, device=verilated)


@pytest.mark.parametrize(("a", "b"), SINGLE)
def test_operands_without_scales(a: str, b: str) -> None:
    check(a, b, bias=Point(24, 12), stalls=FEW)
    check(a, b, lanes=2, size=33, stalls=FEW)


@dataclass(frozen=True)
class Adder(Stage):
    """Two f32 in, their sum out."""

    count: int

    @property
    def inputs(self) -> dict[str, int]:
        return {"in": 64}

    @property
    def outputs(self) -> dict[str, int]:
        return {"out": 32}

    @property
    def beats(self) -> dict[str, int]:
        return {"in": self.count, "out": self.count}

    @property
    def cycles(self) -> int:
        return self.count

    @property
    def schedule(self) -> Schedule:
        return Schedule(ADD_STEPS)

    def module(self, name: str) -> Module:
        module = self.start(name)
        pipe = Pipe(module, "out")
        x, y = (unpacked(module["in"].bits(low, 32)) for low in (0, 32))
        found = added(pipe.step, x, y)
        valid = module.valid("in")
        for _ in range(ADD_STEPS - 1):
            valid = pipe.flag(valid)
        return module.close({"in": pipe.enable}, {"out": pipe.end(valid, found)})


def test_the_adder_is_that_of_ieee_754() -> None:
    """Random bits, numbers of nearby exponents, subnormals, infinities: as torch adds, but for the sign of zero."""
    generator = np.random.default_rng(0)
    count = 100_000
    bits = generator.integers(0, 1 << 32, (count, 2), dtype=np.uint64).astype(np.uint32)
    kind = generator.integers(0, 8, count)
    exponents = (bits[:, 0] >> 23 & 255).astype(np.int64)
    near = np.clip(exponents + generator.integers(-26, 27, count), 0, 255).astype(np.uint32)
    bits[:, 1] = np.where(kind < 5, bits[:, 1] & 0x807FFFFF | near << 23, bits[:, 1])
    bits[:, 1] = np.where(
        kind == 0, bits[:, 0] ^ 0x80000000 ^ generator.integers(0, 4, count, dtype=np.uint32), bits[:, 1]
    )
    bits = np.where((kind == 5)[:, None], bits & 0x81FFFFFF, bits)
    bits = np.where((kind == 6)[:, None], bits | 0x7E800000, bits)
    bits = np.where((kind == 7)[:, None] & (bits >> 20 & 7 < 3), bits & 0x80000000 | 0x7F800000, bits).astype(np.uint32)
    a, b = (torch.from_numpy(bits[:, side].copy().view(np.float32)) for side in (0, 1))
    found = a + b
    run = simulator(Adder(count)).run([Phase({"in": bits.view(np.uint8)}, {"out": count})], NO_STALLS)
    given = torch.from_numpy(run.outputs["out"].view(np.float32)[:, 0])
    assert ((given == found) | (given.isnan() & found.isnan())).all()
    # Subnormal, infinite and cancelled sums were among them.
    subnormal = (found != 0) & (found.abs() < 2.0**-126)
    counts = [int(each.sum()) for each in (subnormal, found.isinf(), found.isnan(), found == 0)]
    assert min(counts) > 100, counts
