"""The line buffer and pooling against torch on whole numbers, however streams stall; their cycles and their memory."""

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator
from mxloom.backends.dataflow.stages.normalize import Normalize
from mxloom.backends.dataflow.stages.patches import Patches, Sliding
from mxloom.backends.dataflow.timing import predicted
from mxloom.dialects.integer import Point

from .stages import codes_of, compare, needs_verilator, spread
from .test_timing import chain, simulated

P = Point(24, 12)

STALLS = {"none": NO_STALLS} | {f"random {p}": Stalls.random(p) for p in (0.3, 0.7)}
IMAGES = 4

WINDOWS = {
    "one tap": (1, Sliding(3, 1), Sliding(5, 1)),
    "3 x 3": (3, Sliding(7, 3), Sliding(6, 3)),
    "3 x 3, same size": (3, Sliding(7, 3, 1, 1), Sliding(9, 3, 1, 1)),
    "2 x 5, strides": (2, Sliding(9, 2, 3, 0), Sliding(11, 5, 2, 2)),
    "4 x 1": (5, Sliding(10, 4, 2, 1), Sliding(3, 1, 1, 0)),
    "5 x 2, dilated": (2, Sliding(11, 5, 1, 2, 2), Sliding(7, 2, 1, 1, 3)),
    "lines that no window sees": (1, Sliding(11, 2, 3), Sliding(5, 1, 3)),
    "the whole picture": (3, Sliding(5, 5), Sliding(3, 3)),
    "smaller than its window": (2, Sliding(1, 5, 1, 2), Sliding(2, 3, 1, 1)),
    "padding alone": (2, Sliding(3, 1, 1, 2), Sliding(3, 2, 3, 2)),
    "one line": (4, Sliding(1, 1), Sliding(13, 3, 2, 1)),
    "a line too many": (1, Sliding(8, 3, 3), Sliding(8, 3, 3)),
}


def unfolded(x: torch.Tensor, lines: Sliding, columns: Sliding) -> torch.Tensor:
    """torch's im2col: [B, C, H, W] -> [B, positions, C, taps], exact in f64."""
    sizes = [(getattr(lines, n), getattr(columns, n)) for n in ("kernel", "dilation", "padding", "stride")]
    rows = torch.nn.functional.unfold(x.double(), *sizes).to(torch.int64)
    return rows.unflatten(1, (x.shape[1], -1)).permute(0, 3, 1, 2)


def pictures(channels: int, lines: Sliding, columns: Sliding) -> torch.Tensor:
    return spread((IMAGES, channels, lines.size, columns.size), 24, 5)


def given(x: torch.Tensor) -> dict[str, np.ndarray]:
    return {"in": codes_of(x.permute(0, 2, 3, 1), 24)}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("by_channel", [False, True])
def test_windows_see_what_unfold_says(name: str, by_channel: bool) -> None:
    channels, lines, columns = WINDOWS[name]
    x = pictures(channels, lines, columns)
    rows = unfolded(x, lines, columns)
    rows = rows if by_channel else rows.transpose(2, 3)
    stage = Patches(24, channels, lines, columns, IMAGES // 2, by_channel)
    assert stage.beats == {"in": x.numel() // 2, "out": rows.numel() // 2}
    compare(stage, given(x), {"out": codes_of(rows, 24)}, stalls=STALLS)


def test_what_stands_beside_the_picture_can_be_chosen() -> None:
    channels, lines, columns = WINDOWS["2 x 5, strides"]
    x = pictures(channels, lines, columns)
    inside = unfolded(torch.ones_like(x), lines, columns)
    rows = torch.where(inside == 1, unfolded(x, lines, columns), -(1 << 23)).transpose(2, 3)
    compare(
        Patches(24, channels, lines, columns, fill=-(1 << 23)), given(x), {"out": codes_of(rows, 24)}, stalls=STALLS
    )


@pytest.mark.parametrize("name", WINDOWS)
def test_cycles_are_those_of_the_formula_and_of_the_prediction(name: str) -> None:
    channels, lines, columns = WINDOWS[name]
    stage = Patches(24, channels, lines, columns)
    graph = chain([stage])
    assert predicted(graph, 3).beats == simulated(graph, 3)
    assert predicted(graph, 9).interval == pytest.approx(stage.cycles, abs=0.5)


def test_windows_that_stall_and_are_stalled() -> None:
    """A slow stage behind a line buffer holds it up, and one in front makes it wait."""
    before, after = (Normalize(P, P, rows, 6, 1e-5, None) for rows in (7 * 6 * 3 // 6, 5 * 4 * 27 // 6))
    graph = chain([before, Patches(24, 3, Sliding(7, 3), Sliding(6, 3)), after])
    assert predicted(graph, 3).beats == simulated(graph, 3)


@pytest.mark.parametrize(
    ("lines", "kept"), [(Sliding(112, 3, 1, 1), 4), (Sliding(112, 7, 2, 3), 9), (Sliding(8, 8), 16)]
)
def test_a_ring_holds_what_a_window_sees_and_what_comes_meanwhile(lines: Sliding, kept: int) -> None:
    """The span of the window and the lines of a stride, not the picture; and it never waits for lines at 3 x 3."""
    stage = Patches(24, 4, lines, Sliding(20, lines.kernel, lines.stride, lines.padding))
    assert stage.kept == kept
    assert stage.cycles == stage.beats["out"]


@needs_verilator
@pytest.mark.slow
def test_the_text_that_is_emitted_gives_the_same() -> None:
    channels, lines, columns = WINDOWS["2 x 5, strides"]
    x = pictures(channels, lines, columns)
    stage = Patches(24, channels, lines, columns)
    device = VerilatorSimulator(circuit_text(stage.module("dut")), stage.inputs, stage.outputs)
    rows = unfolded(x, lines, columns).transpose(2, 3)
    compare(stage, given(x), {"out": codes_of(rows, 24)}, stalls=STALLS, device=device)
