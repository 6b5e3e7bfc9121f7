"""Kernels of linear layers on any number of rows and panels, and the loops that they are measured against."""

import pytest
import torch

from mxloom.backends.kernels import native
from mxloom.backends.kernels.contraction.datapath import BYTES, DOUBLES
from mxloom.backends.kernels.contraction.exact_linear import ExactLinear
from mxloom.backends.kernels.contraction.limits import STREAM, peak, read
from mxloom.backends.kernels.contraction.native_linear import _rows
from mxloom.dialects import contractions
from mxloom.dialects.accumulator import AccumulatorAttr
from mxloom.dialects.contractions import coded
from mxloom.dialects.formats import Rounding
from mxloom.dialects.instances import format_of

pytestmark = pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm")


@pytest.mark.parametrize(
    ("input", "weight"), [("mxint8", "mxfp4"), ("int8_channel", "ternary"), ("mxfp8_e4m3", "mxfp8_e4m3")]
)
def test_any_number_of_rows_gives_the_bits_of_the_definition(input: str, weight: str) -> None:
    """Few rows, tiles of several heights, the last panels of a layer: each has code of its own."""
    draw = torch.Generator().manual_seed(0)
    acc, fmt = AccumulatorAttr.of("e8m13", "rtz", 2), format_of(input, rank=2)
    w = coded(torch.randn(130, 160, generator=draw), format_of(weight, rank=2), Rounding())
    layer = ExactLinear(w, None, acc, fmt)
    for rows in (1, 2, 7, 8, 9, 16, 17, 33, 38):
        x = coded(torch.randn(rows, 160, generator=draw), fmt, Rounding())
        assert torch.equal(layer(x), contractions.linear(x, w, None, acc)), rows


@pytest.mark.parametrize("tall", [1, 3, 4, 5, 8])
def test_rows_are_cut_into_the_fewest_tiles_as_even_as_can_be(tall: int) -> None:
    for count in range(1, 70):
        parts = _rows(count, tall)
        covered = [
            row for first, own, height in parts for row in range(first, first + own, height) for _ in range(height)
        ]
        assert len(covered) == count == sum(own for _, own, _ in parts)
        heights = {height for *_, height in parts}
        assert max(heights) <= tall
        assert max(heights) - min(heights) <= 1
        assert sum(own // height for _, own, height in parts) == -(-count // tall)


def test_the_reader_sees_every_byte() -> None:
    memory = torch.zeros(4 * STREAM * 16, dtype=torch.int32)
    for place in (0, 17, len(memory) - 1):
        memory[place] = 1 << (place % 30)
    assert read()(memory) == (1 << 0) | (1 << 17) | (1 << ((len(memory) - 1) % 30))


def test_the_loop_of_a_datapath_forms_every_product() -> None:
    """Weights and codes of one: every sum counts the rounds, `depth` products each."""
    for path in (*BYTES, *DOUBLES):
        if not native.features() >= path.needs:
            continue
        loop = peak(path)
        loop.memory.zero_()
        loop.memory[:128] = torch.ones(16, dtype=torch.float64).view(torch.uint8) if path.codes == "f64" else 1
        loop(1000)
        sums = loop.memory[128:].view(torch.float64 if path.codes == "f64" else torch.int32)
        assert sums.count_nonzero() == loop.operations(1) // (2 * path.depth)
        assert sums.max() == 1000 * path.depth
