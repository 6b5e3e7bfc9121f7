"""Scale rules that try several scales: the golden of four-over-six, brute force, and what they refuse."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false

import json
from pathlib import Path

import pytest
import torch

from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import Rounding, encode_tensor, quantize
from mxloom.dialects.instances import format_of

GOLDEN = json.loads((Path(__file__).parents[1] / "passes" / "golden_passes.json").read_text())["nvfp4"]
NVFP4 = format_of("nvfp4")


def _error(x, fmt, rule, **given):
    off = (encode_tensor(x, fmt, Rounding(rule), **given).decode().double() - x.double()).square()
    return fmt.tiling(x.shape).split(off).sum(fmt.tiling(x.shape).axes)


def test_four_over_six_golden():
    x = torch.tensor(GOLDEN["x"]).reshape(1, 32)
    golden = GOLDEN["four_over_six"]
    found = encode_tensor(x, NVFP4, Rounding("four-over-six"))
    assert found.global_scale.item() == pytest.approx(golden["gs"], rel=1e-6)
    assert found.scales.float().tolist() == [[golden["s4"][0], golden["s6"][1]]]  # pick4 = [true, false]
    errors = _error(x, NVFP4, "four-over-six")[0].tolist()
    assert errors == pytest.approx([golden["sse4"][0], golden["sse6"][1]], abs=1e-6)


def test_outlier_aware_by_hand():
    """arXiv 2603.08713: RCEIL, then the exponent less one where the largest magnitude is below 3.5 scales."""
    fmt = format_of("mxfp4")
    for largest, exponent in ((6.0, 0), (3.4, -1), (3.6, 0), (6.5, 0 + 1 - 1), (7.2, 1), (1.0, -2)):
        x = torch.zeros(1, 32)
        x[0, 0] = largest
        found = encode_tensor(x, fmt, Rounding("outlier-aware"))
        assert found.scales.view(torch.uint8).item() - 127 == exponent, largest


@pytest.mark.parametrize(
    ("name", "rule", "beside"),
    [
        ("nvfp4", "sweep", "absmax"),
        ("nvint4", "sweep", "absmax"),
        ("mxfp4", "sweep", "even"),
        ("mxint4", "sweep", "floor"),
        ("mxfp8_e4m3", "sweep", "even"),
        ("int4_g128", "sweep", "absmax"),
        ("int4_channel", "sweep", "absmax"),
        ("int8_tensor", "sweep", "absmax"),
    ],
)
def test_sweeps_are_never_worse_than_the_rule_they_start_from(name, rule, beside):
    torch.manual_seed(0)
    x = torch.randn(8, 256) * torch.randn(8, 256).exp()
    fmt = format_of(name)
    swept, plain = _error(x, fmt, rule), _error(x, fmt, beside)
    assert (swept <= plain * (1 + 1e-6)).all()
    assert quantize(x, fmt, Rounding(rule)).equal(encode_tensor(x, fmt, Rounding(rule)).decode())


def test_n_over_six_contains_four_over_six():
    torch.manual_seed(0)
    x = torch.randn(8, 256)
    nine, two = _error(x, NVFP4, "n-over-six"), _error(x, NVFP4, "four-over-six")
    assert (nine <= two * (1 + 1e-6)).all()
    assert (nine < two).any()


def test_sweep_of_nvfp4_by_brute_force():
    """Over every E4M3 code that lets the largest magnitude become 3 to 15: those around are in the sweep."""
    torch.manual_seed(2)
    x = torch.randn(1, 64)
    found = encode_tensor(x, NVFP4, Rounding("sweep"))
    over = found.global_scale
    own = encode_tensor(x, NVFP4).scales.view(torch.uint8).int()
    least = torch.full((1, 4), float("inf"), dtype=torch.float64)
    for offset in range(-11, 9):
        scales = (own + offset).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn)
        off = encode_tensor(x, NVFP4, scales=scales, global_scale=over).decode().double() - x.double()
        least = torch.minimum(least, off.square().reshape(1, 4, 16).sum(-1))
    assert _error(x, NVFP4, "sweep").flatten().tolist() == pytest.approx(least.flatten().tolist(), rel=1e-6)


def test_refused():
    x = torch.randn(2, 32)
    with pytest.raises(UsageError, match="leave clip out"):
        quantize(x, NVFP4, Rounding("sweep", clip=0.9))
    with pytest.raises(UsageError, match="stochastic"):
        quantize(x, NVFP4, Rounding("sweep", "stochastic"))
    with pytest.raises(UsageError, match="four-over-six' does not fit"):
        quantize(x, format_of("mxfp4"), Rounding("four-over-six"))
    with pytest.raises(UsageError, match="sweep' does not fit"):
        quantize(x, format_of("int8_affine"), Rounding("sweep"))


def test_zeros_and_not_a_number():
    for name, rule in (("nvfp4", "four-over-six"), ("nvfp4", "sweep"), ("mxfp4", "outlier-aware"), ("mxint4", "sweep")):
        x = torch.zeros(1, 64)
        assert quantize(x, format_of(name), Rounding(rule)).equal(x)
        x[0, 3] = float("nan")
        assert quantize(x, format_of(name), Rounding(rule)).isnan().any()
