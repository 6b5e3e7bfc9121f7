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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mxpf4"], "unknown format 'mxpf4' (did you mean"),
        (["--rounds", "0"], "rounds is a whole number from 1 to 1000, got 0"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
