"""Every stage and every pair of formats on many beats, random and extreme, in several sequences one after the other.

What must come is what the definitions in `dialects` say. Each change runs 10^4 beats a pair and stage on the arc
simulator, the slow tests as many under Verilator, the nightly ones 10^6 under both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.codes import OperandCode, operand_code
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.float_sum import FloatSum
from mxloom.backends.dataflow.images import MixedBlocks, Rows, rows_of, rows_of_kinds
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import Stalls
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.stages.normalize import Normalize
from mxloom.backends.dataflow.stages.patches import Patches, Sliding
from mxloom.backends.dataflow.stages.pointwise import Binary, Convert
from mxloom.backends.dataflow.stages.pool import Pool
from mxloom.backends.dataflow.stages.quantize import Quantize
from mxloom.backends.dataflow.stages.quantize_mixed import QuantizeMixed
from mxloom.backends.dataflow.stages.quantize_scaled import QuantizeScaled
from mxloom.backends.dataflow.stages.rope import Rope
from mxloom.backends.dataflow.stages.route import Axis, Fifo, Fork, Reorder
from mxloom.backends.dataflow.stages.select import Select
from mxloom.backends.dataflow.stages.softmax import Softmax
from mxloom.backends.dataflow.stages.table import Activation
from mxloom.backends.dataflow.window import Window
from mxloom.dialects import integer
from mxloom.dialects.accumulator import AccumulatorAttr
from mxloom.dialects.contractions import coded_tensor, linear
from mxloom.dialects.formats import Encoded, MixedType, Rounding, block_impact, encode_tensor
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point, Table, requantized
from mxloom.dialects.windows import windowed, windowed_codes

from .examples import Example, differences, kinds, phases, side_by_side, through
from .stages import codes_of, needs_verilator, spread
from .test_contraction_stage import random_operand, type_of
from .test_float_sum import codes_in

EVERY_CHANGE, NIGHTLY = 10_000, 1_000_000
MXINT = [f"!mx.block<32x!mx.fixed<{bits}, {bits - 2}>>" for bits in range(2, 9)]
MXFP = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"]
MIXED = "!mx.mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>"
PAIRS = [
    ("fixed 8 5", "fixed 8 4"),
    ("fixed 16 12", "fixed 6 4"),
    *((name, name) for name in (*MXINT, *MXFP, "nvfp4")),
    ("mxint8", "int8_channel"),
    ("int8_channel", "int8_channel"),
    ("mxint8", "int8_tensor"),
    ("mxint8", "int4_channel"),
    ("mxint8", "int4_g32"),
    ("mxint8", "ternary"),
    ("fixed 8 5", "ternary"),
    ("mxfp4", "mxfp8_e4m3"),
    ("mxfp8_e4m3", "mxfp4"),
    ("mxfp4", "mxfp8_e5m2"),
    ("mxint4", "mxint8"),
    ("mxint8", "mxint4"),
    ("mxint8", "mxfp4"),
    (MIXED, MIXED),
    (MIXED, "mxfp8_e4m3"),
    ("mxint8", MIXED),
]
FLOAT_PAIRS = [("mxint8", "mxint8"), ("mxfp4", "mxfp8_e4m3"), ("mxfp8_e5m2", "mxfp8_e5m2")]
RESULT, WINDOW = Point(24, 8), (40, -20)
ROWS, COLUMNS, SIZE = 40, 25, 70
KINDS = 12
"""Of the rows of an operand: four of them ordinary, the others extreme in one way each."""


def extreme(encoded: Encoded, code: OperandCode, seed: int) -> Encoded:
    """Rows that are all largest, most negative or zero, alternate, have the largest or the smallest scales."""
    (element,) = code.elements
    largest = element.largest_code if not element.is_fixed else min(element.largest, (1 << (element.bits - 1)) - 1)
    lowest = largest | 1 << (element.bits - 1) if not element.is_fixed else -max(1, element.largest)
    codes, kind = encoded.codes.clone(), (torch.arange(encoded.shape[0]) + seed) % KINDS
    codes[(kind == 4) | (kind == 7)] = largest
    codes[kind == 5] = lowest
    codes[kind == 6] = 0
    codes[(kind == 8) | (kind == 9)] = largest
    codes[kind == 8, ::2] = lowest
    if encoded.scales is None:
        return replace(encoded, codes=codes)
    scales = encoded.scales.clone()
    if scales.shape[0] == len(kind):
        if scales.element_size() == 1:
            whole = scales.view(torch.uint8)
            top = 254 if code.scale is not None and code.scale.mantissa_bits == 0 else 126
            whole[(kind == 7) | (kind == 10)], whole[kind == 11] = top, 1
        else:
            info = torch.finfo(scales.dtype)
            scales[(kind == 7) | (kind == 10)], scales[kind == 11] = info.max, info.tiny
    return replace(encoded, codes=codes, scales=scales)


def operand(type: Any, shape: tuple[int, int], seed: int) -> tuple[Encoded | MixedBlocks, Any]:
    """(a matrix, what the definition of sums reads of it)."""
    if not isinstance(type, MixedType):
        code = operand_code(type, shape[1])
        # Ordinary numbers are at most about 2^9 in every format, so that most sums stay within the window.
        middle = 127 - (code.elements[0].largest.bit_length() - 1 + code.elements[0].unit)
        made = extreme(random_operand(type, shape, seed, (middle - 9, middle + 9)), code, seed)
        return made, coded_tensor(made)
    low, high = (operand(part, shape, seed + 7 * i)[0] for i, part in enumerate((type.low, type.high)))
    assert isinstance(low, Encoded) and isinstance(high, Encoded)
    tiling = type.low_block.tiling(shape)
    is_low = torch.rand(tiling.grid, generator=torch.Generator().manual_seed(seed)) < 0.6
    parts = [tiling.split(each.decode(torch.float64)) for each in (low, high)]
    return MixedBlocks(low, high, is_low), tiling.merge(torch.where(tiling.spread(is_low), *parts))


def values(side: Encoded | MixedBlocks, meant: Any) -> torch.Tensor:
    return side.decode(torch.float64) if isinstance(side, Encoded) else meant


def bits_of(numbers: np.ndarray, width: int) -> np.ndarray:
    """Each number's bits, the lowest first, side by side along the last dimension."""
    found = (numbers[..., None].astype(np.uint64) >> np.arange(width, dtype=np.uint64)) & np.uint64(1)
    return found.astype(np.uint8).reshape(*numbers.shape[:-1], -1)


def beats_of(rows: Rows, code: OperandCode, lanes: int) -> np.ndarray:
    """Rows as beats: `lanes` codes, the first lowest, and what stands beside their block on top."""
    steps = rows.codes.shape[1] // lanes
    parts = [bits_of(rows.codes.reshape(-1, lanes), code.code_bits)]
    if code.side_bits:
        per_block = (code.block or rows.codes.shape[1]) // lanes
        sides = rows.sides.repeat(per_block, axis=1)[:, :steps]
        parts.append(bits_of(sides.reshape(-1, 1), code.side_bits))
    return np.packbits(np.concatenate(parts, axis=1), axis=1, bitorder="little")


def products(a: str, b: str, beats: int, accumulator: str = "window") -> Example:
    """Matrices one after the other, both of them streams that change; `beats` results at least."""
    types = type_of(a), type_of(b)
    one, other = (operand_code(type, SIZE) for type in types)
    blocks = [code.block for code in (one, other) if code.block is not None]
    segment = min(blocks) if blocks else -(-SIZE // 8) * 8
    # A mixed operand's beat is a whole block.
    lanes = segment if one.is_mixed or other.is_mixed else 8
    runs = -(-beats // (ROWS * COLUMNS))
    how = Window(*WINDOW) if accumulator == "window" else FloatSum(2, -(-SIZE // segment), RESULT)
    unit = DotProduct(one, other, lanes, segment, how)
    stage = Contraction(unit, ROWS, COLUMNS, SIZE, RESULT, dynamic=True, runs=runs)
    given: dict[str, list[np.ndarray]] = {"a": [], "b": []}
    expected: list[torch.Tensor] = []
    for run in range(runs):
        (x, left), (w, right) = (
            operand(type, (count, SIZE), 2 * run + side)
            for side, (type, count) in enumerate(zip(types, (ROWS, COLUMNS), strict=True))
        )
        for stream, made, code in (("a", x, one), ("b", w, other)):
            padded = stage.steps * lanes
            rows = rows_of(made, code, padded) if isinstance(made, Encoded) else rows_of_kinds(made, code, padded)
            given[stream].append(beats_of(rows, code, lanes))
        if accumulator != "window":
            expected.append(codes_in(linear(left, right, None, AccumulatorAttr.of("f32", "rne", 2)), RESULT))
            continue
        if one.is_mixed or other.is_mixed:
            total = windowed(values(x, left), values(w, right).T, None, *WINDOW, segment)
        else:
            total = windowed_codes(left, right, None, *WINDOW)
        expected.append(requantized((total * 2.0 ** -WINDOW[1]).long(), -WINDOW[1], RESULT))
    found = torch.stack(expected)
    plain = (found != 0) & (found.abs() < (1 << (RESULT.width - 1)) - 1)
    assert plain.double().mean() > 0.2, "results that are zero or saturate show little"
    out = codes_of(found, RESULT.width)
    return Example(stage, {stream: np.concatenate(parts) for stream, parts in given.items()}, {"out": out})


def numbers(shape: tuple[int, ...], width: int, seed: int) -> torch.Tensor:
    """Rows of all magnitudes; every tenth is all lowest, all highest, zero, or alternates between both ends."""
    found = spread(shape, width, seed).reshape(-1, shape[-1])
    top = 1 << (width - 1)
    ends = [torch.full((shape[-1],), end) for end in (-top, top - 1, 0)]
    ends.append(torch.where(torch.arange(shape[-1]) % 2 == 0, -top, top - 1))
    for row in range(0, len(found), 10):
        found[row] = ends[row // 10 % len(ends)]
    return found.reshape(shape)


def blocks(format: str, beats: int) -> Example:
    """Rows quantized one after the other; a mixed format's threshold lies in the middle of the impacts."""
    type = format_of(format, rank=1) if not format.startswith("fixed") else type_of(format)
    code, point, size = operand_code(type, SIZE), Point(24, 12), SIZE  # pyright: ignore[reportArgumentType]
    whole = code.is_mixed or (code.scale is not None and code.scale.mantissa_bits > 0)
    lanes = code.block if whole and code.block else 4
    rows = -(-beats // -(-size // lanes))
    x = numbers((rows, size), 24, 3)
    real = x.double() * 2.0**-12
    if isinstance(type, MixedType):
        how = Rounding(exact=True)
        impacts = block_impact(real, type, None, how)
        threshold = float(impacts.flatten().median())
        low, high = (encode_tensor(real, part, Rounding()) for part in (type.low, type.high))
        made = rows_of_kinds(MixedBlocks(low, high, impacts <= threshold), code, -(-size // lanes) * lanes)
        stage = QuantizeMixed(point, code, lanes, rows, size, threshold)
    else:
        rule = None if code.scale is None or whole else "even"
        encoded = encode_tensor(real if not whole else real.float(), type, Rounding(scale_rule=rule))  # pyright: ignore[reportArgumentType]
        made = rows_of(encoded, code, -(-size // lanes) * lanes)
        scaled = QuantizeScaled(point, code, lanes, rows, size)
        stage = scaled if whole else Quantize(point, code, lanes, rows, size, rule or "floor")
    return Example(stage, {"in": codes_of(x, 24)}, {"out": beats_of(made, code, lanes)})


P, W = Point(24, 12), Point(16, 13)
HALF = Point(24, 11)


def normalized(beats: int, centred: bool) -> Example:
    rows = -(-beats // 20)
    x, w, b = numbers((rows, 20), 24, 0), spread((20,), 16, 1), spread((20,), 16, 2)
    if not centred:
        return through(Normalize(P, P, rows, 20, 1e-6, W), x, integer.rms_norm(x, w, P, W, P, 1e-6), w)
    stage = Normalize(P, P, rows, 20, 1e-6, W, W, centred=True)
    return through(stage, x, integer.layer_norm(x, w, b, P, W, W, P, 1e-6), (w & 0xFFFF) + ((b & 0xFFFF) << 16))


def probabilities(beats: int, causal: bool) -> Example:
    rows = -(-beats // 96) * 8
    x, result, keep = numbers((rows, 12), 24, 3), Point(24, 22), None
    if causal:
        keep = torch.arange(12)[None] <= (torch.arange(rows) % 12)[:, None]
    stage = Softmax(P, result, rows, 12, 8, 0.17, causal=causal, positions=12 if causal else 1)
    return through(stage, x, integer.softmax(x, P, result, 8, 0.17, keep))


def turned(beats: int) -> Example:
    rows = -(-beats // 24) * 3
    x, cos, sin = numbers((rows, 8), 24, 5), spread((3, 8), 16, 7), spread((3, 8), 16, 8)
    halves, times = torch.cat([-x[:, 4:], x[:, :4]], -1), rows // 3
    y = requantized(x * cos.repeat(times, 1) + halves * sin.repeat(times, 1), 26, HALF)
    return through(Rope(P, HALF, Point(16, 14), rows, 8, 3), x, y, (cos & 0xFFFF) + ((sin & 0xFFFF) << 16))


def pairs_of(beats: int, operation: str) -> Example:
    x, y = numbers((beats // 10, 10), 24, 5), numbers((beats // 10, 10), 24, 6)
    exact = {"add": x + y, "sub": x - y, "mul": x * y}[operation]
    stage = Binary(operation, P, P, HALF, x.numel())
    given = {"a": codes_of(x, 24), "b": codes_of(y, 24)}
    return Example(stage, given, {"out": codes_of(requantized(exact, 24 if operation == "mul" else 12, HALF), 24)})


def beside_kept(beats: int) -> Example:
    x, kept = numbers((beats // 10, 10), 24, 5), spread((10,), 16, 6)
    return through(Binary("mul", P, W, HALF, x.numel(), 10), x, requantized(x * kept, 25, HALF), kept)


def converted(beats: int, rounding: str) -> Example:
    x = numbers((beats // 10, 10), 24, 9)
    y = requantized((x.clamp(min=-(1 << 22)) * -5 << 1) + (3 << 12), 13, Point(16, 7), rounding)
    return through(Convert(P, Point(16, 7), x.numel(), -5, 0, rounding, -(1 << 22), 3, 1), x, y)


def curved(beats: int, curve: str) -> Example:
    table, x = Table(curve, P, Point(20, 10), 7), numbers((beats // 10, 10), 24, 5)
    return through(Activation(table, x.numel()), x, table(x))


def windows(beats: int, by_channel: bool) -> Example:
    lines, columns = Sliding(5, 3, 2, 1), Sliding(4, 2, 1, 1)
    runs = -(-beats // (3 * 5 * 18))
    x = numbers((runs, 3, 5, 4), 24, 5)
    rows = torch.nn.functional.unfold(x.double(), (3, 2), padding=1, stride=(2, 1)).long()
    rows = rows.unflatten(1, (3, -1)).permute((0, 3, 1, 2) if by_channel else (0, 3, 2, 1))
    return through(Patches(24, 3, lines, columns, runs, by_channel), x.permute(0, 2, 3, 1), rows)


def pooled(beats: int, operation: str) -> Example:
    runs, result = -(-beats // 3), Point(20, 9)
    x = numbers((runs, 7, 3), 24, 3)
    y = requantized(x.amax(1), 12, result) if operation == "max" else integer.mean(x.sum(1), 7, P, result)
    return through(Pool(operation, P, result, runs, 7, 3), x, y)


def forked(beats: int) -> Example:
    x = codes_of(numbers((beats // 10, 10), 24, 5), 24)
    return Example(Fork(24, 3, beats), {"in": x}, dict.fromkeys(("out0", "out1", "out2"), x))


def reordered(beats: int) -> Example:
    runs = -(-beats // 24)
    x, y = numbers((runs, 4, 5), 24, 5), torch.zeros(runs, 6, 4, dtype=torch.long)
    y[:, :5] = x.transpose(1, 2)
    return through(Reorder(24, 20, (Axis(6, 1, 5), Axis(4, 5)), runs), x, y)


def queued(beats: int) -> Example:
    x = numbers((beats // 10, 10), 24, 5)
    return through(Fifo(24, 3, x.numel()), x, x)


def selected(beats: int) -> Example:
    x = numbers((-(-beats // 6), 5, 2), 24, 5)
    return through(Select(24, len(x), 5, 2, 1, 3), x, x[:, 1:4])


STAGES: dict[str, Callable[[int], Example]] = {
    "rms_norm": lambda beats: normalized(beats, centred=False),
    "layer_norm": lambda beats: normalized(beats, centred=True),
    "softmax": lambda beats: probabilities(beats, causal=False),
    "causal_softmax": lambda beats: probabilities(beats, causal=True),
    "rope": turned,
    **{name: lambda beats, name=name: pairs_of(beats, name) for name in ("add", "sub", "mul")},
    "kept": beside_kept,
    **{name: lambda beats, name=name: converted(beats, name) for name in ("rne", "rna", "rtz")},
    **{name: lambda beats, name=name: curved(beats, name) for name in ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid")},
    "patches": lambda beats: windows(beats, by_channel=False),
    "patches_by_channel": lambda beats: windows(beats, by_channel=True),
    "max_pool": lambda beats: pooled(beats, "max"),
    "mean_pool": lambda beats: pooled(beats, "mean"),
    "fork": forked,
    "queue": queued,
    "reorder": reordered,
    "select": selected,
}
QUANTIZED = ["fixed 8 4", *MXINT, *MXFP, "!mx.block<16xf4E2M1FN, f8E4M3FN>", MIXED]


def test_every_stage_is_swept() -> None:
    swept = {type(make(100).stage) for make in STAGES.values()} | {type(blocks(name, 20).stage) for name in QUANTIZED}
    assert swept | {Contraction} == kinds()


GROUPS: dict[str, dict[str, Callable[[int], Example]]] = {
    "products": {f"{a} x {b}": lambda beats, a=a, b=b: products(a, b, beats) for a, b in PAIRS},
    "products in f32": {f"{a} x {b}": lambda beats, a=a, b=b: products(a, b, beats, "f32") for a, b in FLOAT_PAIRS},
    "blocks": {name: lambda beats, name=name: blocks(name, beats) for name in QUANTIZED},
    "stages": STAGES,
}
EVERY = [(group, name) for group, members in GROUPS.items() for name in members]


def check(examples: dict[str, Example], beats: int, *, compiled: bool = False) -> None:
    """All examples, in one design, under random stalls: no beat differs."""
    graph = side_by_side(examples)
    given = circuit_text(graph.module("sweep")), graph.input_streams, graph.output_streams
    device = VerilatorSimulator(*given, optimize=True) if compiled else ArcSimulator(*given)
    run = device.run(phases(graph, examples), Stalls.random(0.2), limit=2_000_000_000)
    assert list(differences(run, examples)) == []
    assert all(count >= beats for each in examples.values() for count in each.counts.values())


@pytest.mark.parametrize(("group", "name"), EVERY)
def test_ten_thousand_beats(group: str, name: str) -> None:
    check({"swept": GROUPS[group][name](EVERY_CHANGE)}, EVERY_CHANGE)


@pytest.mark.nightly
@pytest.mark.parametrize(("group", "name"), EVERY)
def test_a_million_beats(group: str, name: str) -> None:
    check({"swept": GROUPS[group][name](NIGHTLY)}, NIGHTLY)


@needs_verilator
@pytest.mark.parametrize(
    "beats", [pytest.param(EVERY_CHANGE, marks=pytest.mark.slow), pytest.param(NIGHTLY, marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("group", GROUPS)
def test_under_verilator(group: str, beats: int) -> None:
    """All of a group side by side, so that the C++ compiler runs four times only."""
    check({f"e{index}": make(beats) for index, make in enumerate(GROUPS[group].values())}, beats, compiled=True)
