"""The search of scales: goldens, brute force, and that no block is ever worse than under its rule's scale."""

# pyright: reportOptionalMemberAccess=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalSubscript=false, reportOptionalOperand=false

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from mxloom.dialects.errors import UsageError
from mxloom.dialects.formats import Rounding, encode_tensor, quantize
from mxloom.dialects.instances import format_of
from mxloom.passes._block_errors import BlockError
from mxloom.passes._scale_search import search_scales

GOLDEN = json.loads((Path(__file__).parent / "golden_passes.json").read_text())
NVFP4 = format_of("nvfp4")


def _search(x, fmt, weights=None, hessian=None, columns=None):
    return search_scales(x, fmt, Rounding(), BlockError(fmt, weights, hessian, columns))


@pytest.mark.parametrize(
    ("case", "weights"),
    [
        ("uniform", {}),
        ("g2_1_except_idx4_0.01", {4: 0.01}),
        ("g2_idx1_100", {1: 100.0}),
    ],
)
def test_nvfp4_golden(case: str, weights: dict[int, float]):
    golden = GOLDEN["nvfp4"]
    x = torch.tensor(golden["x"]).reshape(1, 32)
    factors = torch.ones(1, 32)
    for place, value in weights.items():
        factors[0, 16 + place] = value
    found = _search(x, NVFP4, factors if weights else None)
    absmax, best = golden["e4m3_sweep_block2"][case]["absmax"], golden["e4m3_sweep_block2"][case]["best"]
    assert found.encoded.global_scale.item() == pytest.approx(golden["gs"])
    assert found.unclipped[0, 1].item() == pytest.approx(absmax[1], rel=1e-5)
    assert found.errors[0, 1].item() == pytest.approx(best[1], rel=1e-4)
    assert found.encoded.scales[0, 1].float().item() == best[0]


def test_fgmp_golden_of_sensitivity_weighted_clipping():
    golden = GOLDEN["fgmp"]
    x, g = torch.tensor(golden["w"]).reshape(1, 64), torch.tensor(golden["g"]).reshape(1, 64)
    found = _search(x, NVFP4, g.square())
    assert found.encoded.scales.float().tolist() == [[*golden["s4"][:3], golden["swc"]["block3"]["best"][0]]]
    assert found.errors[0, 3].item() == pytest.approx(golden["swc"]["block3"]["best"][1], rel=1e-5)
    assert found.unclipped[0, 3].item() == pytest.approx(golden["swc"]["block3"]["absmax"][1], rel=1e-5)


FORMATS = [
    *("nvfp4", "nvint4", "mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint4", "mxint8"),
    *("int4_g128", "int4_g32_affine", "int4_channel", "int8_tensor", "int2_g64", "fp8_e4m3_tensor"),
    "block<2x32xf4E2M1FN>",
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("metric", ["plain", "weighted", "hessian"])
def test_no_block_is_worse_than_under_its_rule(name: str, metric: str):
    """The error is measured here, from the decoded values, in f64."""
    torch.manual_seed(0)
    fmt = format_of(name)
    x = torch.randn(6, 140) * torch.randn(6, 140).exp()
    weights = torch.rand(6, 140) ** 4 if metric == "weighted" else None
    root = torch.randn(200, 140)
    hessian = root.T @ root if metric == "hessian" else None
    columns = torch.arange(140).expand(6, 140)
    found = _search(x, fmt, weights, hessian, columns)
    tiling = fmt.tiling(x.shape)

    def errors(rounded: torch.Tensor) -> torch.Tensor:
        off = rounded.double() - x.double()
        if hessian is None:
            return tiling.split(off.square() * (1 if weights is None else weights)).sum(tiling.axes).flatten()
        numbers = tiling.merge(
            tiling.split(torch.ones(6, 140)) * tiling.spread(torch.arange(found.errors.numel()).reshape(tiling.grid))
        )
        blocks = [torch.where(numbers == b, off, 0.0) for b in range(found.errors.numel())]
        return torch.stack([torch.einsum("ni,ij,nj->", b, hessian.double(), b) for b in blocks])

    new, old = errors(found.encoded.decode()), errors(quantize(x, fmt))
    assert torch.allclose(new, found.errors.flatten(), rtol=1e-9)
    assert (new <= old * (1 + 1e-12)).all()
    assert (new < old).any() or name in ("mxint8", "mxfp8_e4m3", "int8_tensor", "fp8_e4m3_tensor")


def test_every_scale_of_nvfp4_was_tried():
    """Brute force over the 126 positive finite codes of E4M3, with formulas of this test."""
    torch.manual_seed(1)
    x, g = torch.randn(3, 32), torch.rand(3, 32) ** 6
    found = _search(x, NVFP4, g)
    over = (x.abs().max() / (6 * 448)).item()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
    codes = [(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e, m in product(range(16), range(8))]
    scales = sorted({c for c in codes if 0 < c <= 448})
    assert len(scales) == 126
    for row, block in product(range(3), range(2)):
        part = slice(16 * block, 16 * block + 16)
        own, weight = x[row, part].double(), g[row, part].double()
        least = min(
            float((weight * ((own.abs() / (s * over))[:, None] - values).abs().min(-1).values.square()
                   * (s * over) ** 2).sum())
            for s in scales
        )  # fmt: skip
        assert found.errors[row, block].item() == pytest.approx(least, rel=1e-4)


def test_octav_is_near_the_best_clip_of_a_gaussian():
    """arXiv 2206.06501: for b = 4 bits the best clip of N(0, 1) lies at 2.58 standard deviations or so."""
    torch.manual_seed(0)
    x = torch.randn(1, 1 << 16)
    fmt = format_of("int4_channel")
    found = _search(x, fmt)
    clip = found.encoded.scales.item() * 7
    grid = torch.arange(2.0, 4.5, 0.01)
    errors = [((x / (c / 7)).round().clamp(-7, 7) * (c / 7) - x).square().sum().item() for c in grid]
    assert found.errors.item() <= min(errors) * 1.001
    assert clip == pytest.approx(grid[min(range(len(errors)), key=errors.__getitem__)].item(), rel=0.05)


def test_integers_keep_their_symmetric_range():
    x = torch.tensor([[-8.0, 7.0, 1.0, 0.4]])
    assert _search(x, format_of("int4_channel")).encoded.codes.min() >= -7


def test_zero_blocks_and_ragged_rows():
    x = torch.zeros(2, 20)
    for name in ("nvfp4", "mxfp4", "int4_g128", "int4_g128_affine"):
        found = _search(x, format_of(name))
        assert found.encoded.decode().equal(x)
        assert found.encoded.scales.float().isfinite().all()


def test_a_shared_scale_of_the_tensor():
    """Field case P1: gs of the largest of three projections, 2 / 2688, for all."""
    torch.manual_seed(0)
    for largest in (1.0, 2.0, 0.5):
        x = torch.rand(4, 32) * 0.9 * largest
        x[0, 0] = largest
        shared = torch.tensor(2 / 2688)
        found = search_scales(x, NVFP4, Rounding(), BlockError(NVFP4), shared)
        assert found.encoded.global_scale.item() == pytest.approx(7.440476e-4)
        plain = encode_tensor(x, NVFP4, global_scale=shared)
        assert plain.global_scale.item() == shared.item()
        assert (plain.decode() - x).abs().max() < largest / 4


def test_nothing_to_choose():
    with pytest.raises(UsageError, match="nothing to clip"):
        _search(torch.randn(4, 8), format_of("ternary"))
