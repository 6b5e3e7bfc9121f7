"""Forks, queues, changes of order and arithmetic on streams."""

import pytest
import torch

from mxloom.backends.dataflow.stages.pointwise import Binary, Convert
from mxloom.backends.dataflow.stages.route import Axis, Fifo, Fork, Reorder
from mxloom.backends.dataflow.stages.select import Select
from mxloom.dialects.integer import Point

from .stages import codes_of, compare, spread

P = Point(24, 12)


def test_a_fork_gives_every_beat_to_all() -> None:
    x = codes_of(spread((3000,), 24, 5), 24)
    stage = Fork(24, 3, 1)
    compare(stage, {"in": x}, dict.fromkeys(stage.outputs, x))


@pytest.mark.parametrize("depth", [1, 2, 3, 10, 64])
def test_a_queue_keeps_the_order(depth: int) -> None:
    x = codes_of(spread((3000,), 24, 5), 24)
    compare(Fifo(24, depth, 1), {"in": x}, {"out": x})


def test_another_order_and_padding() -> None:
    x = spread((4, 2, 3, 5, 7), 24, 5)
    expected = torch.zeros(4, 3, 7, 2, 6, dtype=torch.long)
    expected[..., :5] = x.permute(0, 2, 4, 1, 3)
    stage = Reorder(24, 2 * 3 * 5 * 7, (Axis(3, 35), Axis(7, 1), Axis(2, 105), Axis(6, 7, 5)), 4)
    compare(stage, {"in": codes_of(x, 24)}, {"out": codes_of(expected, 24)})


@pytest.mark.parametrize(("first", "kept"), [(0, 1), (0, 4), (2, 3), (4, 3), (6, 1)])
@pytest.mark.parametrize("inner", [1, 5])
def test_a_part_of_a_dimension(first: int, kept: int, inner: int) -> None:
    x = spread((30, 7, inner), 24, 5)
    stage = Select(24, 30, 7, inner, first, kept)
    assert (stage.beats["in"], stage.beats["out"]) == (30 * 7 * inner, 30 * kept * inner)
    compare(stage, {"in": codes_of(x, 24)}, {"out": codes_of(x[:, first : first + kept], 24)})


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize("other", [Point(24, 15), Point(10, 2)])
def test_two_streams(operation: str, other: Point) -> None:
    """Exact in Python's integers, then rounded to even, then saturated."""
    x, y = spread((3000,), 24, 5).tolist(), spread((3000,), other.width, 6).tolist()
    fraction = 12 + other.fraction if operation == "mul" else max(12, other.fraction)
    result = Point(24, 14)

    def expected(a: int, b: int) -> int:
        a, b = (a, b) if operation == "mul" else (a << (fraction - 12), b << (fraction - other.fraction))
        exact = {"add": a + b, "sub": a - b, "mul": a * b}[operation]
        return rounded(exact, fraction - result.fraction, result.width, "rne")

    numbers = torch.tensor([expected(a, b) for a, b in zip(x, y, strict=True)])
    given = {"a": codes_of(torch.tensor(x), 24), "b": codes_of(torch.tensor(y), other.width)}
    compare(Binary(operation, P, other, result, 1), given, {"out": codes_of(numbers, 24)})


@pytest.mark.parametrize("operation", ["add", "sub", "mul"])
@pytest.mark.parametrize("kept", [1, 7, 100])
def test_a_stream_and_numbers_that_are_kept(operation: str, kept: int) -> None:
    x, held = spread((1400,), 24, 5), spread((kept,), 16, 6)
    exact = {"add": x * 8 + held.repeat(1400 // kept), "sub": x * 8 - held.repeat(1400 // kept)}
    found = exact.get(operation, x * held.repeat(1400 // kept))
    places = 27 - 14 if operation == "mul" else 15 - 14
    numbers = torch.tensor([rounded(each, places, 24, "rne") for each in found.tolist()])
    stage = Binary(operation, P, Point(16, 15), Point(24, 14), 1400, kept)
    compare(stage, {"a": codes_of(x, 24)}, {"out": codes_of(numbers, 24)}, load=codes_of(held, 16))


@pytest.mark.parametrize(("added", "fraction"), [(1, 0), (-3, 1), (0x9E3779, 20)])
@pytest.mark.parametrize("factor", [1, -1, -5])
def test_a_negative_factor_and_a_number_added(added: int, fraction: int, factor: int) -> None:
    x = spread((2000,), 24, 9).tolist()
    stage = Convert(P, Point(24, 11), 1, factor, added=added, added_fraction=fraction)
    exact = [(n * factor << 8) + (added << (20 - fraction)) for n in x]
    expected = [rounded(each, 20 - 11, 24, "rne") for each in exact]
    compare(stage, {"in": codes_of(torch.tensor(x), 24)}, {"out": codes_of(torch.tensor(expected), 24)})


FIELD = [-20, -13, -12, -11, -4, 4, 11, 12, 13, 20]
SHIFTED = {
    "rne": [-2, -2, -2, -1, 0, 0, 1, 2, 2, 2],
    "rna": [-3, -2, -2, -1, -1, 1, 1, 2, 2, 3],
    "rtz": [-2, -1, -1, -1, 0, 0, 1, 1, 1, 2],
}


@pytest.mark.parametrize("rounding", SHIFTED)
def test_a_shift_by_three_rounds_as_it_says(rounding: str) -> None:
    """Hardware that floors where software rounds to nearest: the values that both must give."""
    stage = Convert(Point(12, 3), Point(12, 0), len(FIELD), rounding=rounding)
    compare(stage, {"in": codes_of(torch.tensor(FIELD), 12)}, {"out": codes_of(torch.tensor(SHIFTED[rounding]), 12)})


def test_a_conversion_saturates() -> None:
    """8.99 and -8.5 into fixed<10, 6>: 7.984375 and -8, where wrapping gives -7.015625 and 7.5."""
    given = torch.tensor([round(8.99 * 2**12), round(-8.5 * 2**12)])
    expected = torch.tensor([round(7.984375 * 64), -8 * 64])
    compare(Convert(Point(24, 12), Point(10, 6), 2), {"in": codes_of(given, 24)}, {"out": codes_of(expected, 10)})


@pytest.mark.parametrize("factor", [1, 5, 0x5A827999])
def test_a_factor_and_a_lower_limit(factor: int) -> None:
    x = spread((2000,), 24, 9).tolist()
    stage = Convert(P, Point(24, 11), 1, factor, 31 if factor > 5 else 1, lowest=-1000)
    expected = [rounded(max(n, -1000) * factor, (31 if factor > 5 else 1) + 1, 24, "rne") for n in x]
    compare(stage, {"in": codes_of(torch.tensor(x), 24)}, {"out": codes_of(torch.tensor(expected), 24)})


def rounded(number: int, places: int, width: int, rounding: str) -> int:
    """A whole number times 2^-places, to nearest, ties to even, held within two's complement of `width` bits."""
    assert rounding == "rne"
    if places > 0:
        whole, rest = number >> places, number & ((1 << places) - 1)
        half = 1 << (places - 1)
        number = whole + (rest > half or (rest == half and whole & 1 == 1))
    else:
        number <<= -places
    top = 1 << (width - 1)
    return max(-top, min(top - 1, number))
