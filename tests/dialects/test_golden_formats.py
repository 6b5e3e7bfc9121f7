"""Golden values of the formats, computed with ml_dtypes, torchao, gfloat and numpy; see `golden_formats.json`."""

import json
from pathlib import Path

import pytest
import torch

import mxloom
from mxloom.dialects.formats import Encoded, MixedType, Rounding, block_impact, encode_tensor, quantize
from mxloom.dialects.instances import format_of

GOLDEN = json.loads((Path(__file__).parent / "golden_formats.json").read_text())
FGMP = "!mx.mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, !mx.block<?x?xf8E4M3FN, f32>>"


def block_of(name: str) -> torch.Tensor:
    first = GOLDEN["mx_inputs_first8_rest_zero_block32"][name]
    return torch.tensor([*first, *[0.0] * (32 - len(first))])


@pytest.mark.parametrize("case", GOLDEN["mx"])
def test_mx_block(case: str) -> None:
    name, format, *rule = case.split("/")
    golden = GOLDEN["mx"][case]
    x = block_of(name)
    encoded = mxloom.encode(x, format, scale_rule=rule[0] if rule else None)
    assert encoded.scales is not None
    assert encoded.scales.view(torch.uint8).tolist() == [golden["scale_exp"] + 127]
    assert encoded.codes[:8].tolist() == golden["codes"]
    assert not encoded.codes[8:].any()
    decoded = encoded.decode()
    assert decoded[:8].tolist() == golden["deq"]
    if "sse" in golden:
        assert float((decoded - x).double().square().sum()) == pytest.approx(golden["sse"], rel=1e-6)


def test_mxfp4_bytes() -> None:
    assert mxloom.encode(block_of("A"), "mxfp4", scale_rule="floor").packed()[:4].tolist() == [0xD7, 0x11, 0xE0, 0x44]


# amax, then the exponents of floor, ceil, even, rceil (algorithms B.2: torchao, AMD Quark, NVIDIA cvt.rp)
EXPONENTS = [
    ("mxfp4", 1.0, (-2, -2, -2, -2)),
    ("mxfp4", 5.0, (0, 1, 0, 0)),
    ("mxfp4", 6.0, (0, 1, 0, 0)),
    ("mxfp4", 6.01, (0, 1, 0, 1)),
    ("mxfp4", 7.0, (0, 1, 1, 1)),
    ("mxfp4", 7.2, (0, 1, 1, 1)),
    ("mxfp4", 7.999, (0, 1, 1, 1)),
    ("mxfp4", 1023.99994, (7, 8, 8, 8)),
    ("mxfp4", 448.0, (6, 7, 7, 7)),
    ("mxfp8_e4m3", 5.0, (-6, -5, -6, -6)),
    ("mxfp8_e4m3", 7.0, (-6, -5, -6, -6)),
    ("mxfp8_e4m3", 7.2, (-6, -5, -6, -5)),
    ("mxfp8_e4m3", 7.999, (-6, -5, -5, -5)),
    ("mxfp8_e4m3", 448.0, (0, 1, 0, 0)),
    ("mxfp8_e4m3", 449.0, (0, 1, 0, 1)),
    ("mxfp6_e2m3", 7.2, (0, 1, 0, 0)),
    ("mxfp6_e2m3", 7.999, (0, 1, 1, 1)),
    ("mxfp6_e3m2", 7.2, (-2, -1, -2, -1)),
    ("mxfp8_e5m2", 7.2, (-13, -12, -13, -12)),
]


@pytest.mark.parametrize(("format", "amax", "exponents"), EXPONENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_exponent(format: str, amax: float, exponents: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.zeros(32, dtype=torch.float32)
    x[3] = -amax
    for rule, exponent in zip(("floor", "ceil", "even", "rceil"), exponents, strict=True):
        scales = mxloom.encode(x.to(dtype), format, scale_rule=rule).scales
        assert scales is not None
        assert int(scales.view(torch.uint8)) - 127 == exponent, rule


@pytest.mark.parametrize("format", ["nvfp4", "!mx.block<16xf4E2M1FN, f8E4M3FN>"])
def test_nvfp4(format: str) -> None:
    golden = GOLDEN["nvfp4"]
    encoded = mxloom.encode(torch.tensor(golden["x"]).float(), format)
    assert encoded.scales is not None
    two_levels = format == "nvfp4"
    assert encoded.scales.float().tolist() == golden["scales" if two_levels else "single_level_scales"]
    assert [f"{byte:02x}" for byte in encoded.packed().tolist()] == golden["packed_lo_nibble_first"]
    if not two_levels:
        return
    assert encoded.global_scale is not None
    assert float(encoded.global_scale) == golden["gs"]
    decoded = encoded.decode()
    assert decoded[:4].tolist() == pytest.approx([10, 20, 26.6667, 40], rel=1e-5)
    expected = [0.357143, -1.071429, 2.142857, -2.857143, 4.285714, -0.357143, 0.714286, 1.071429]
    assert decoded[16:24].tolist() == pytest.approx(expected, rel=1e-5)
    assert str(float(decoded[31])) == "-0.0"


def test_fgmp_policy() -> None:
    golden = GOLDEN["fgmp"]
    w, g = torch.tensor(golden["w"]).reshape(1, 64), torch.tensor(golden["g"]).reshape(1, 64)
    mixed = format_of(FGMP)
    assert isinstance(mixed, MixedType)
    nvfp4 = mxloom.encode(w, "nvfp4")
    fp8 = mxloom.encode(w, "fp8_e4m3_tensor")
    assert nvfp4.scales is not None and nvfp4.global_scale is not None and fp8.scales is not None
    assert float(nvfp4.global_scale) == golden["gs4"]
    assert float(fp8.scales) == golden["gs8"]
    assert nvfp4.scales.float().flatten().tolist() == golden["s4"]
    impact = block_impact(w, mixed, g.square())
    assert impact.flatten().tolist() == pytest.approx(golden["impact"], rel=1e-5)
    plain = (nvfp4.decode() - w).double().square().reshape(4, 16).sum(-1)
    assert plain.tolist() == pytest.approx(golden["plain_sse_fp4"], rel=1e-6)
    threshold = float(torch.quantile(impact, 0.75))
    assert threshold == pytest.approx(golden["thr_p75"], rel=1e-5)
    assert (impact > threshold).flatten().int().tolist() == golden["fp8_mask_p75"]
    result = mixed.quantize(w, Rounding(threshold=threshold), sensitivity=g.square()).reshape(4, 16)
    assert torch.equal(result[1], fp8.decode().reshape(4, 16)[1])
    assert torch.equal(result[[0, 2, 3]], nvfp4.decode().reshape(4, 16)[[0, 2, 3]])
    lower = float(torch.quantile(impact, 0.5))
    assert (impact > lower).flatten().int().tolist() == [0, 1, 1, 0]


def test_fgmp_memory() -> None:
    mixed = format_of(FGMP)
    assert isinstance(mixed, MixedType)
    offsets = 32 / (1024 * 16)  # bits an element, which the paper's formula has not
    for share, saving in GOLDEN["fgmp"]["saving_vs_fp8"].items():
        assert 1 - (mixed.bits_at(float(share)) - offsets) / 8 == pytest.approx(saving)


def test_bitnet_weights() -> None:
    golden = GOLDEN["bitnet"]
    w = torch.tensor(golden["W"])
    encoded = mxloom.encode(w, "ternary")
    assert encoded.scales is not None
    assert float(encoded.scales) == pytest.approx(golden["gamma"], rel=1e-6)
    assert encoded.codes.tolist() == golden["T"]
    assert torch.equal(encoded.decode(), torch.tensor(golden["T"]) * encoded.scales)


def test_bitnet_activations_and_product() -> None:
    golden = GOLDEN["bitnet"]
    x = torch.tensor([golden["x"]])
    encoded = encode_tensor(x, format_of("int8_channel"), scales=torch.tensor([[1 / golden["s_x"]]]))
    assert encoded.codes.tolist() == [golden["q"]]
    y_int = encoded.codes.int() @ torch.tensor(golden["T"]).int().T
    assert y_int.tolist() == [golden["y_int"]]
    weight = mxloom.encode(torch.tensor(golden["W"]), "ternary").decode()
    assert (encoded.decode() @ weight.T)[0].tolist() == pytest.approx(golden["y"], rel=1e-6)


def test_ternary_bytes() -> None:
    trits = torch.tensor([1.0, 0, -1, 1, -1])
    encoded = mxloom.encode(trits, "!mx.ternary")
    assert encoded.packed().tolist() == [GOLDEN["bitnet"]["base3x5"]["1,0,-1,1,-1"]] == [195]


DLAI = {
    "asym": ("int8_affine", -1),
    "sym": ("int8_tensor", -1),
    "row": ("int8_channel", -1),
    "col": ("int8_channel", 0),
}


@pytest.mark.parametrize("scheme", DLAI)
def test_linear_quantization(scheme: str) -> None:
    golden = GOLDEN["dlai"][scheme]
    t = torch.tensor(GOLDEN["dlai"]["t"])
    format, dim = DLAI[scheme]
    encoded = mxloom.encode(t, format, dim=dim)
    assert encoded.scales is not None
    scales = golden["s"] if isinstance(golden["s"], list) else [golden["s"]]
    assert encoded.scales.flatten().tolist() == pytest.approx(scales, rel=1e-6)
    assert encoded.codes.tolist() == golden["q"]
    if scheme == "asym":
        assert encoded.zero_points is not None
        assert int(encoded.zero_points) == golden["z"]
    assert float((encoded.decode() - t).square().mean()) == pytest.approx(golden["mse"], rel=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
def test_packing_of_bits(bits: int) -> None:
    for unsigned, packed in GOLDEN["dlai"][f"pack{bits}"].items():
        codes = [int(code) for code in unsigned.split(",")]
        signed = [code - (1 << bits) if code >> (bits - 1) else code for code in codes]
        format = format_of(f"!mx.fixed<{bits}, 0>")
        encoded = mxloom.encode(torch.tensor(signed).float(), format)
        assert encoded.packed().tolist() == packed
        back = Encoded.from_tensors(format, (len(codes),), encoded.tensors())
        assert back.codes.tolist() == signed


def test_quantize_equals_decode_on_the_goldens() -> None:
    for name in "ABC":
        x = block_of(name)
        for format in ("mxfp4", "mxint8", "nvfp4"):
            assert torch.equal(quantize(x, format_of(format, rank=1)), mxloom.encode(x, format).decode())
