"""Products by the circuit against exact arithmetic: every pair of formats, ordinary and extreme codes and scales."""

from typing import Any

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.codes import OperandCode, operand_code
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.images import packed, rows_of, widened
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.window import Window
from mxloom.dialects.contractions import coded_tensor
from mxloom.dialects.formats import Encoded, FixedType
from mxloom.dialects.formats._scale import scale_dtype
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point, requantized
from mxloom.dialects.windows import windowed_codes

from .stages import codes_of, compare, operand_beats, spread

PAIRS = [
    *((f"mxint{n}", f"mxint{n}") for n in (4, 6, 8)),
    ("mxfp4", "mxfp4"),
    ("mxfp6_e2m3", "mxfp6_e2m3"),
    ("mxfp6_e3m2", "mxfp6_e3m2"),
    ("mxfp8_e4m3", "mxfp8_e4m3"),
    ("mxfp8_e5m2", "mxfp8_e5m2"),
    ("mxint8", "mxfp4"),
    ("mxfp4", "mxint8"),
    ("mxfp4", "mxfp8_e4m3"),
    ("mxfp6_e2m3", "mxfp6_e3m2"),
    ("mxint4", "mxint8"),
    ("nvfp4", "nvfp4"),
    ("mxint8", "ternary"),
    ("mxint8", "int8_channel"),
    ("mxint8", "int4_g128"),
    ("fixed 8 5", "fixed 8 4"),
    ("fixed 12 5", "mxint8"),
    ("mxint8", "fixed 8 3"),
]
SCALES = {"ordinary": (118, 136), "all": (0, 255), "one": (127, 128)}


def type_of(name: str) -> Any:
    if name.startswith("fixed"):
        return FixedType(*map(int, name.split()[1:]))  # pyright: ignore[reportArgumentType]
    return format_of(name, rank=2)


def random_codes(code: OperandCode, shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Every code but NaN and infinity; a fifth of the rows hold the largest alone."""
    (element,) = code.elements
    codes = torch.randint(0, 1 << element.bits, shape, generator=generator)
    if element.largest == 1:
        codes, largest = torch.randint(-1, 2, shape, generator=generator), 1
    elif element.is_fixed:
        codes, largest = codes - (1 << (element.bits - 1)), (1 << (element.bits - 1)) - 1
    else:
        largest = element.largest_code
        magnitude = codes & ((1 << (element.bits - 1)) - 1)
        codes = torch.where(magnitude > largest, (codes - magnitude) | largest, codes)
    rows = torch.rand(shape[0], 1, generator=generator) < 0.2
    return torch.where(rows, torch.full_like(codes, largest), codes)


def random_operand(type: Any, shape: tuple[int, int], seed: int, scales: str | tuple[int, int]) -> Encoded:
    """Random codes; `scales` is the range of the scales' bytes, or its name, where they are powers of two."""
    generator = torch.Generator().manual_seed(seed)
    code = operand_code(type, shape[1])
    codes = random_codes(code, shape, generator)
    element = code.elements[0]
    dtype = torch.uint8 if not element.is_fixed else torch.int8 if element.bits <= 8 else torch.int16
    if code.scale is None:
        return Encoded(type, shape, codes.to(dtype))
    grid = (shape[0], -(-shape[1] // (code.block or shape[1])))
    grid = (1, 1) if len(type.dims) == 2 and type.dims[0] < 0 else grid
    if code.scale.mantissa_bits == 0:
        found = (
            torch.randint(*(SCALES[scales] if isinstance(scales, str) else scales), grid, generator=generator)
            .to(torch.uint8)
            .view(torch.float8_e8m0fnu)
        )
    elif code.scale.bits == 8:
        found = torch.randint(0, 127, grid, generator=generator).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        powers = 2.0 ** torch.randint(-8, 4, grid, generator=generator)
        found = (torch.rand(grid, generator=generator) * powers).to(scale_dtype(type.scale))
    return Encoded(type, shape, codes.to(dtype), found, torch.tensor(1.0) if code.tensor_scale else None)


def check(
    a: str,
    b: str,
    scales: str = "ordinary",
    *,
    rows: int = 40,
    columns: int = 6,
    size: int = 70,
    lanes: int | None = None,
    window: tuple[int, int] = (40, -20),
    bias: Point | None = None,
    copies: int = 1,
    dynamic: bool = False,
    runs: int = 1,
) -> None:
    types = type_of(a), type_of(b)
    one, other = (operand_code(type, size) for type in types)
    blocks = [code.block for code in (one, other) if code.block is not None]
    lanes = lanes or (min(blocks) if blocks else 10)
    segment = min(blocks) if blocks else -(-size // lanes) * lanes
    result = Point(24, 8)
    lefts = [random_operand(types[0], (rows, size), seed, scales) for seed in range(runs)]
    rights = [random_operand(types[1], (columns, size), seed + 100, scales) for seed in range(runs if dynamic else 1)]
    biases = spread((columns,), bias.width, 9) if bias else None
    unit = DotProduct(one, other, lanes, segment, Window(*window), bias)
    stage = Contraction(unit, rows, columns, size, result, copies, dynamic, runs)
    expected: list[torch.Tensor] = []
    for index, left in enumerate(lefts):
        start = biases.double() * 2.0**-bias.fraction if bias and biases is not None else None
        total = windowed_codes(coded_tensor(left), coded_tensor(rights[index % len(rights)]), start, *window)
        expected.append(requantized((total * 2.0 ** -window[1]).long(), -window[1], result))
    beats = np.concatenate([operand_beats(left, one, lanes, lanes) for left in lefts])
    out = codes_of(torch.stack(expected), result.width)
    if dynamic:
        words = np.concatenate([operand_beats(right, other, lanes, lanes) for right in rights])
        run = compare(stage, {"a": beats, "b": words}, {"out": out})
    else:
        run = compare(stage, {"a": beats}, {"out": out}, load(stage, rights[0], biases))
    ends = run.given["out"].reshape(runs * rows, columns)[:, -1]
    # Steady state: the first rows fill the pipeline.
    measured = ends[-1] - ends[rows // 2]
    assert abs(measured - stage.cycles / (runs * rows) * (runs * rows - 1 - rows // 2)) <= 2


def load(stage: Contraction, weight: Encoded, biases: torch.Tensor | None) -> np.ndarray:
    """The words of a contraction's memories."""
    code = stage.unit.b
    rows = rows_of(weight, code, stage.steps * stage.unit.lanes)
    missing = stage.groups * stage.copies - stage.columns
    parts: list[np.ndarray] = []
    for copy in range(stage.copies):
        own = np.pad(rows.codes, ((0, missing), (0, 0)))[copy :: stage.copies]
        parts.append(packed(own.reshape(-1, stage.unit.lanes), code.code_bits))
        if code.side_bits:
            sides = np.pad(rows.sides, ((0, missing), (0, 0)))[copy :: stage.copies, : stage.side_words]
            parts.append(packed(sides.reshape(-1, 1), code.side_bits))
        if stage.unit.bias and biases is not None:
            width = stage.unit.bias.width
            own = np.pad(biases.numpy() & ((1 << width) - 1), (0, missing))[copy :: stage.copies]
            parts.append(packed(own.reshape(-1, 1), width))
    return widened(parts, max(memory.width for memory in stage.memories))


@pytest.mark.parametrize(("a", "b"), PAIRS)
@pytest.mark.parametrize("scales", SCALES)
def test_every_pair_of_formats(a: str, b: str, scales: str) -> None:
    check(a, b, scales)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": Point(24, 10)},
        {"bias": Point(24, 10), "size": 33, "copies": 3, "lanes": 8, "columns": 7},
        {"copies": 4, "lanes": 8},
        {"dynamic": True, "runs": 3},
        {"dynamic": True, "lanes": 8},
        {"dynamic": True, "copies": 3, "runs": 2},
        {"lanes": 1},
        {"size": 1, "lanes": 1},
        {"size": 5, "lanes": 2},
        {"size": 32},
        {"window": (24, -12)},
        {"window": (50, -40)},
        {"window": (20, 4)},
    ],
)
@pytest.mark.parametrize(("a", "b"), [("mxint8", "mxfp4"), ("fixed 8 5", "fixed 8 4"), ("mxfp8_e4m3", "mxfp4")])
def test_shapes_and_windows(a: str, b: str, options: dict[str, Any]) -> None:
    check(a, b, **options)


def test_a_window_narrower_than_a_sum_saturates() -> None:
    check("mxfp8_e5m2", "mxfp8_e5m2", "one", window=(20, -10))
