"""Products of operands whose blocks are of two kinds, by the circuit against the definition on exact values."""

from typing import Any

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.codes import OperandCode, operand_code
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.images import MixedBlocks, Rows, packed, rows_of, rows_of_kinds, widened
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.window import Window
from mxloom.dialects.formats import Encoded, MixedType
from mxloom.dialects.integer import Point, requantized
from mxloom.dialects.windows import windowed

from .stages import codes_of, compare, words
from .test_contraction_stage import random_operand, type_of

RESULT = Point(24, 8)
HALF = Stalls.random(0.5)
FP4, FP8, E5M2 = "f4E2M1FN", "f8E4M3FN", "f8E5M2"
MIXED = {
    "fp4/fp8": (FP4, FP8),
    "fp8/fp4": (FP8, FP4),
    "fp4/e5m2": (FP4, E5M2),
    "e3m2/e2m3": ("f6E3M2FN", "f6E2M3FN"),
    "fp4/int8": (FP4, "!mx.fixed<8, 6>"),
    "int4/int8": ("!mx.fixed<4, 2>", "!mx.fixed<8, 6>"),
    "int4/fp8": ("!mx.fixed<4, 2>", FP8),
}


def format_named(name: str, block: int) -> Any:
    if name not in MIXED:
        return type_of(name)
    low, high = (f"!mx.block<{block}x{element}>" for element in MIXED[name])
    return type_of(f"!mx.mixed<{low}, {high}>")


def operand(type: Any, shape: tuple[int, int], seed: int, scales: str) -> tuple[Encoded | MixedBlocks, torch.Tensor]:
    """(a random matrix, in both kinds where there are two, its values in f64)."""
    if not isinstance(type, MixedType):
        encoded = random_operand(type, shape, seed, scales)
        return encoded, encoded.decode(torch.float64)
    low, high = (random_operand(part, shape, seed + 7 * i, scales) for i, part in enumerate((type.low, type.high)))
    tiling = type.low_block.tiling(shape)
    is_low = torch.rand(tiling.grid, generator=torch.Generator().manual_seed(seed)) < 0.6
    values = [tiling.split(each.decode(torch.float64)) for each in (low, high)]
    return MixedBlocks(low, high, is_low), tiling.merge(torch.where(tiling.spread(is_low), *values))


def rows(given: Encoded | MixedBlocks, code: OperandCode, padded: int) -> Rows:
    return rows_of_kinds(given, code, padded) if isinstance(given, MixedBlocks) else rows_of(given, code, padded)


def stream(given: Rows, code: OperandCode, lanes: int) -> np.ndarray:
    """Rows as beats: codes, the first lowest, then the scale of their block, its kind on top."""
    sides = given.sides.repeat((code.block or given.codes.shape[1]) // lanes, axis=1)
    steps = given.codes.shape[1] // lanes
    numbers = [
        sum(int(each) << (lane * code.code_bits) for lane, each in enumerate(word))
        | int(side) << lanes * code.code_bits
        for word, side in zip(given.codes.reshape(-1, lanes), sides[:, :steps].reshape(-1), strict=True)
    ]
    return words(numbers, lanes * code.code_bits + code.side_bits)


def check(
    names: tuple[str, str],
    scales: str = "ordinary",
    *,
    blocks: tuple[int, int] = (32, 32),
    size: int = 70,
    window: tuple[int, int] = (40, -20),
    dynamic: bool = False,
) -> None:
    types = [format_named(name, block) for name, block in zip(names, blocks, strict=True)]
    one, other = (operand_code(type, size) for type in types)
    lanes = min(code.block or size for code in (one, other))
    (a, x), (b, w) = (operand(types[i], (count, size), 50 * i, scales) for i, count in enumerate((40, 6)))
    stage = Contraction(DotProduct(one, other, lanes, lanes, Window(*window)), 40, 6, size, RESULT, dynamic=dynamic)
    total = windowed(x, w.T, None, *window, lanes)
    expected = requantized((total * 2.0 ** -window[1]).long(), -window[1], RESULT)
    padded = stage.steps * lanes
    given, load = {"a": stream(rows(a, one, padded), one, lanes)}, None
    weight = rows(b, other, padded)
    if dynamic:
        given["b"] = stream(weight, other, lanes)
    else:
        parts = [packed(weight.codes.reshape(-1, lanes), other.code_bits)]
        parts.append(packed(weight.sides[:, : stage.side_words].reshape(-1, 1), other.side_bits))
        load = widened(parts, max(memory.width for memory in stage.memories))
    compare(stage, given, {"out": codes_of(expected, RESULT.width)}, load, {"none": NO_STALLS, "half": HALF})


@pytest.mark.parametrize("a", MIXED)
@pytest.mark.parametrize("b", MIXED)
def test_both_sides_mixed(a: str, b: str) -> None:
    check((a, b))


@pytest.mark.parametrize("mixed", ["fp4/fp8", "fp4/e5m2", "int4/int8"])
@pytest.mark.parametrize("plain", ["mxfp4", "mxfp8_e4m3", "mxint8"])
def test_one_side_mixed(mixed: str, plain: str) -> None:
    check((mixed, plain))
    check((plain, mixed))


@pytest.mark.parametrize("scales", ["all", "one"])
@pytest.mark.parametrize("mixed", ["fp4/fp8", "fp4/e5m2", "fp4/int8"])
def test_extreme_scales(mixed: str, scales: str) -> None:
    check((mixed, mixed), scales)


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": (16, 32)},
        {"blocks": (32, 16)},
        {"blocks": (16, 16), "dynamic": True},
        {"dynamic": True},
        {"window": (24, -12)},
        {"window": (50, -40)},
        {"size": 16, "blocks": (16, 16)},
    ],
)
def test_shapes_and_windows(options: dict[str, Any]) -> None:
    check(("fp4/fp8", "fp4/fp8"), **options)
