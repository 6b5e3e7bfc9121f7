"""GPTQ's elimination: its golden, dead and dependent channels, and what it promises."""

import json
from pathlib import Path

import pytest
import torch

from mxloom.dialects.errors import MxloomError
from mxloom.passes._brain_surgeon import Surgeon, output_errors

GOLDEN = json.loads((Path(__file__).parent / "golden_passes.json").read_text())["gptq"]


def _grid(values: torch.Tensor, place: int) -> torch.Tensor:
    return (values / GOLDEN["grid"]).round() * GOLDEN["grid"]


def _hessian(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.T @ x / len(x)


def test_golden():
    x, w = torch.tensor(GOLDEN["X"]).float(), torch.tensor(GOLDEN["W"])
    assert _hessian(x).equal(torch.tensor(GOLDEN["H"]).float())
    found = Surgeon.of(_hessian(x), GOLDEN["damp"]).rounded(w, _grid)
    assert found.tolist() == GOLDEN["Q"]
    for q, sse in ((found, GOLDEN["sse"][0]), (_grid(w, 0), GOLDEN["sse"][1])):
        assert output_errors(q - w, _hessian(x)).sum().item() * len(x) / 2 == pytest.approx(sse)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_channels_are_rounded_plainly_and_change_nothing(damping: float):
    """Field case P3: the golden with a channel that no input reaches put in at index 1."""
    x = torch.tensor([[1, 0, 2, 0], [0, 0, 1, 1], [2, 0, 1, 1], [1, 0, 0, 2]]).float()
    w = torch.tensor([[0.40, 0.37, -0.60, 0.55], [1.15, -0.90, 0.40, -0.40]])
    for by_activation in (False, True) if damping else (False,):
        found = Surgeon.of(_hessian(x), damping, by_activation=by_activation).rounded(w, _grid)
        assert found[:, 1].tolist() == [0.25, -1.0]
    assert Surgeon.of(_hessian(x), damping).rounded(w, _grid).tolist() == [
        [0.5, 0.25, -0.75, 0.5],
        [1.25, -1, 0.25, -0.5],
    ]


def test_fewer_samples_than_channels():
    """Field case P3, second: rank 2 of 4."""
    x = torch.tensor([[1.0, 2, 0, -1], [0, 1, 3, 1]])
    w = torch.tensor([[0.4, -0.6, 0.55, 0.3], [1.15, 0.4, -0.4, -0.85]])
    found = Surgeon.of(_hessian(x), 0.01).rounded(w, _grid)
    assert found.tolist() == [[0.5, -0.75, 0.75, 0], [1.25, 0.25, -0.25, -1]]
    for q, sse in ((found, 0.0575), (_grid(w, 0), 0.1825)):
        assert ((q - w) @ x.T).square().sum().item() == pytest.approx(sse, rel=1e-4)
    with pytest.raises(MxloomError, match="too few calibration samples"):
        Surgeon.of(_hessian(x), 0.0)


def test_lazy_blocks_are_the_plain_elimination():
    """Brought up to date once per 128 columns, or after every column as the paper's algorithm 1 has it, in f64."""
    torch.manual_seed(0)
    x, w = torch.randn(500, 300), torch.randn(7, 300)
    hessian = _hessian(x)
    surgeon = Surgeon.of(hessian, 0.01)
    found = surgeon.rounded(w, _grid)
    wide = w.double()
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(300, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for i in range(300):
        q = (wide[:, i] / 0.25).round() * 0.25
        wide[:, i:] -= ((wide[:, i] - q) / factor[i, i])[:, None] * factor[i, i:]
        wide[:, i] = q
    assert (found.double() == wide).float().mean() > 0.99  # a tie may fall otherwise in f32


def test_without_correlation_it_is_rounding_to_nearest():
    torch.manual_seed(0)
    w = torch.randn(5, 40)
    for by_activation in (False, True):
        surgeon = Surgeon.of(torch.diag(torch.rand(40) + 0.1), 0.0, by_activation=by_activation)
        assert surgeon.rounded(w, _grid).equal(_grid(w, 0))


def test_not_a_number():
    hessian = torch.eye(3)
    hessian[1, 1] = float("nan")
    with pytest.raises(MxloomError, match="NaN"):
        Surgeon.of(hessian, 0.01)
