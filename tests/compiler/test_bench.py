"""`mxloom bench`: what it prints; how fast it finds the machine is the machine's affair."""

import json

import pytest

from mxloom.backends.kernels import native
from mxloom.compiler.command_line import main


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm")
def test_figures_of_a_format_and_the_reason_of_one_without_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "fixed<8,6>", "bf16", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(rate > 0 for rate in found["copy_bytes_per_second"])
    elementwise, wide = found["formats"]
    assert elementwise["why_not"] is None
    assert min(elementwise[key] for key in ("from_memory", "in_cache", "over_eager", "first_use", "from_disk")) > 0
    assert wide["why_not"] == "no kernel for bf16"


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm")
def test_figures_of_linear_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--contractions", "--width", "64", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["contractions"]
    shapes = [(each["rows"], each["size"], each["columns"]) for each in found]
    assert shapes == [(256, 64, 64)] * 4 + [(1, 128, 128)] * 2
    for each in found:
        if each["why_not"] is not None:
            continue
        assert min(each["seconds"].values()) > 0
        assert {"kernel", "call", "torch f32"} <= each["seconds"].keys()
        assert each["of_bandwidth" if each["rows"] == 1 else "of_peak"] > 0


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm")
def test_a_table_of_linear_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--contractions", "--width", "64", "--rounds", "1"]) == 0
    heads, *rows = capsys.readouterr().out.splitlines()
    assert heads.split()[:3] == ["weights", "x", "activations"]
    assert [" ".join(row.split()[:4]) for row in rows] == [
        "mxfp4 x mxint8 256",
        "mxint8 x mxint8 256",
        "int8_channel x int8_channel 256",
        "mxfp8_e4m3 x mxfp8_e4m3 256",
        "mxfp4 x mxint8 1",
        "ternary x int8_channel 1",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mxpf4"], "unknown format 'mxpf4' (did you mean"),
        (["--contractions", "mxfp4"], "leave the formats out"),
        (["--contractions", "--width", "8"], "width is a whole number from 32 to 8192, got 8"),
        (["--width", "64"], "--contractions"),
        (["--rounds", "0"], "rounds is a whole number from 1 to 1000, got 0"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--contractions"]])
@pytest.mark.parametrize(
    ("chosen", "message"),
    [("eager", "MXLOOM_KERNELS is eager: there are no kernels"), ("egaer", "MXLOOM_KERNELS is 'egaer'")],
)
def test_without_kernels_nothing_is_measured(
    chosen: str,
    message: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MXLOOM_KERNELS", chosen)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
