"""Normalizations, softmax, tables, rotary embedding: circuits against `dialects.integer`, however streams stall."""

import pytest
import torch

from mxloom.backends.dataflow.stages.normalize import Normalize
from mxloom.backends.dataflow.stages.rope import Rope
from mxloom.backends.dataflow.stages.softmax import Softmax
from mxloom.backends.dataflow.stages.table import Activation
from mxloom.dialects import integer
from mxloom.dialects.integer import CURVES, Point, Table, requantized

from .stages import codes_of, compare, spread

P = Point(24, 12)
W = Point(16, 13)
B = Point(16, 12)


@pytest.mark.parametrize(
    ("size", "fraction", "weight", "bias", "centred"),
    [
        (1, 12, W, None, False),
        (2, 12, W, None, False),
        (64, 12, W, None, False),
        (70, 20, W, None, False),
        (33, 12, None, None, False),
        (2, 12, W, B, True),
        (70, 12, W, B, True),
        (20, 3, W, None, True),
    ],
)
def test_normalizations(size: int, fraction: int, weight: Point | None, bias: Point | None, centred: bool) -> None:
    given, rows = Point(24, fraction), 60
    x, w, b = spread((rows, size), 24, 0), spread((size,), 16, 1), spread((size,), 16, 2)
    stage = Normalize(given, P, rows, size, 1e-6, weight, bias, centred)
    if centred:
        assert weight is not None
        expected = integer.layer_norm(x, w, b if bias else None, given, weight, bias, P, 1e-6)
    else:
        expected = integer.rms_norm(x, w if weight else None, given, weight, P, 1e-6)
    words = (w & 0xFFFF) + ((b & 0xFFFF) << 16 if bias else 0)
    load = codes_of(words, 32 if bias else 16) if weight else None
    run = compare(stage, {"in": codes_of(x, 24)}, {"out": codes_of(expected, 24)}, load)
    ends = run.given["out"].reshape(rows, size)[:, -1]
    assert ((ends[1:] - ends[:-1]) == stage.cycles / rows).all()


@pytest.mark.parametrize(
    ("size", "positions", "window", "scale", "fraction", "result"),
    [
        (1, 0, None, 1.0, 12, Point(24, 22)),
        (3, 0, None, 1.0, 23, Point(24, 22)),
        (50, 0, None, 0.5, 0, Point(24, 22)),
        (9, 0, None, 3.0, -4, Point(16, 15)),
        (9, 0, None, 1e-3, 12, Point(24, 22)),
        (12, 12, None, 0.17, 12, Point(24, 22)),
        (12, 12, 5, 0.17, 20, Point(18, 16)),
        (12, 12, 1, 0.17, 20, Point(18, 16)),
    ],
)
def test_softmax(size: int, positions: int, window: int | None, scale: float, fraction: int, result: Point) -> None:
    given, rows = Point(24, fraction), 60
    x, keep = spread((rows, size), 24, 3), None
    if positions:
        row, column = (torch.arange(rows) % positions)[:, None], torch.arange(size)[None]
        keep = column <= row
        keep = keep & (column > row - window) if window else keep
    stage = Softmax(given, result, rows, size, 8, scale, bool(positions), positions or 1, window)
    expected = integer.softmax(x, given, result, 8, scale, keep)
    run = compare(stage, {"in": codes_of(x, 24)}, {"out": codes_of(expected, result.width)})
    ends = run.given["out"].reshape(rows, size)[:, -1]
    assert ((ends[1:] - ends[:-1]) == stage.cycles / rows).all()


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize(
    ("given", "result"),
    [(P, P), (Point(24, 20), Point(24, 21)), (Point(16, 3), Point(20, 18)), (Point(8, -2), P)],
)
def test_tables(curve: str, given: Point, result: Point) -> None:
    table = Table(curve, given, result, 9)
    x = spread((3000,), given.width, 5)
    compare(Activation(table, 1), {"in": codes_of(x, given.width)}, {"out": codes_of(table(x), result.width)})


@pytest.mark.parametrize(("size", "positions"), [(2, 1), (8, 3), (12, 5), (32, 16)])
def test_rotary_embedding(size: int, positions: int) -> None:
    rows = positions * 4
    x, cos, sin = spread((rows, size), 24, 5), spread((positions, size), 16, 7), spread((positions, size), 16, 8)
    stage = Rope(P, Point(24, 11), Point(16, 14), rows, size, positions)
    turned = torch.cat([-x[:, size // 2 :], x[:, : size // 2]], -1)
    expected = requantized(x * cos.repeat(4, 1) + turned * sin.repeat(4, 1), 26, Point(24, 11))
    load = codes_of((cos & 0xFFFF) + ((sin & 0xFFFF) << 16), 32)
    compare(stage, {"in": codes_of(x, 24)}, {"out": codes_of(expected, 24)}, load)
