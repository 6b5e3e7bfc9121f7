"""Every language that the block function is written in rounds to the bits of the definitions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from xdsl.dialects import math
from xdsl.dialects.builtin import FunctionType, VectorType, f32
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Block, Region

from mxloom.backends.kernels import native
from mxloom.backends.kernels._layout import Layout, layout_of
from mxloom.backends.kernels._prepared import Prepared
from mxloom.backends.kernels.emitters import gpu
from mxloom.backends.kernels.emitters.eager import EagerRounding
from mxloom.backends.kernels.emitters.gpu import PreparedOnGPU, kernels
from mxloom.backends.kernels.emitters.text import kernel_text
from mxloom.backends.kernels.emitters.torch_source import torch_source
from mxloom.backends.kernels.emitters.triton_source import triton_source
from mxloom.backends.kernels.fake_quantization import why_not
from mxloom.compiler.command_line import main
from mxloom.dialects import formats
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import Rounding
from mxloom.dialects.instances import INSTANCES, format_of

OTHERS = ["f8E5M2", "!mx.float<5, 2>", "fixed<8,-3>", "!mx.block<4xf16>", "!mx.block<17xi5, f32>", "!mx.block<256xi8>"]
OTHERS += ["!mx.block<4xf8E5M2, f8E5M2, f32>", "!mx.block<4x8xf4E2M1FN>"]
SHAPE = (64, 96)
RULES = (None, "floor", "ceil", "even", "rceil")
ROUNDINGS = ("rne", "rna", "rtz")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

EMITTERS: dict[str, Any] = {"llvm": Prepared, "torch": EagerRounding}
if INTERPRETED:
    EMITTERS = {"triton": PreparedOnGPU}


def has_block_function(format: str) -> bool:
    """Whether a block's registers are enough to round it; the rule absmean takes a mean in f64, in one order."""
    layout = layout_of(format_of(format, rank=len(SHAPE)), Rounding(), SHAPE)
    return isinstance(layout, Layout) and layout.function.rule != "absmean"


FORMATS = [name for name in [*INSTANCES, *OTHERS] if has_block_function(name)]

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None,
    reason="Triton is not installed: pip install -r requirements/gpu.txt (190 MB), then run this test again",
)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of the numbers; any NaN as one."""
    x = torch.where(x.isnan(), torch.nan, x)
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("emitter", EMITTERS)
def test_emitters_have_the_bits_of_the_definitions(
    emitter: str, format: str, rounding: str, kinds_of_data: dict[str, torch.Tensor]
) -> None:
    if emitter == "llvm" and native.why_not() is not None:
        pytest.skip(f"{native.why_not()}; run on x86-64 or 64-bit Arm with llvmlite")
    fmt = format_of(format, rank=len(SHAPE))
    compared = 0
    for rule, clip in product(RULES, (None, 0.7)):
        how = Rounding(rule, rounding, clip)
        try:
            layout = layout_of(fmt, how, SHAPE)
        except UsageError:  # a rule or a clip that the format does not have
            continue
        assert isinstance(layout, Layout)
        rounds = EMITTERS[emitter](layout, torch.float32)
        for kind, x in kinds_of_data.items():
            expected = formats.quantize(x, fmt, how)
            assert torch.equal(bits(rounds(x, None)), bits(expected)), (kind, rule, clip)
            compared += 1
    assert compared >= len(kinds_of_data)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("emitter", EMITTERS)
def test_emitters_round_f16(emitter: str, format: str, kinds_of_data: dict[str, torch.Tensor]) -> None:
    """bf16 is left to machines with a GPU: Triton's interpreter cuts it off where devices round."""
    fmt = format_of(format, rank=len(SHAPE))
    layout = layout_of(fmt, Rounding(), SHAPE)
    assert isinstance(layout, Layout)
    rounds = EMITTERS[emitter](layout, torch.float16)
    for kind, values in kinds_of_data.items():
        x = values.to(torch.float16)
        assert torch.equal(bits(rounds(x, None)), bits(formats.quantize(x, fmt))), kind


@pytest.mark.skipif(INTERPRETED, reason="this is the process that the test starts")
@pytest.mark.slow
@needs_triton
def test_triton_source_in_the_interpreter() -> None:
    """The tests above for Triton, in a process of its own: its interpreter is chosen before Triton is imported."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore",
            "-k",
            "test_emitters_ and triton-",
            __file__,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(rf"\b{len(FORMATS) * (len(ROUNDINGS) + 1)} passed", run.stdout), run.stdout[-500:]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@needs_triton
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("format", [*FORMATS, "!mx.block<1x5000xi4, f16>"])
def test_triton_source_compiles_for_a_gpu_to_instructions_that_round_alike(format: str, rounding: str) -> None:
    """PTX for sm_90: subnormals are kept, no product and sum are one, quotients are rounded correctly."""
    shape = (64, 10000) if "5000" in format else SHAPE
    layout = layout_of(format_of(format, rank=2), Rounding(rounding=rounding), shape)
    assert isinstance(layout, Layout)
    module = kernels(triton_source(layout))
    for name in ("measuring", "rounding"):
        if hasattr(module.get(name), "arg_names"):
            ptx = _ptx(module[name], layout)
            assert ".ftz" not in ptx
            assert not re.search(r"\bfma\b|\bmad\.\w*\.?f32", ptx)
            quotients = re.findall(r"\bdiv\.[\w.]+", ptx)
            assert set(quotients) <= {"div.rn.f32", "div.rn.f64"}
            is_quotient = layout.function.scale is not None and "E8M0" not in str(layout.function.scale)
            assert bool(quotients) == (is_quotient and name == "rounding")


def _ptx(kernel: Any, layout: Layout) -> str:
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    width = 1 << (layout.size - 1).bit_length()
    known = {"TILE": 4096, "TOP": 0.0, "SIZE": layout.size, "WIDTH": width, "BLOCKS": max(1, 4096 // width)}
    types = {"source": "*fp32", "target": "*fp32", "seen": "*i32", "count": "i32", "length": "i32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {(place,): known[name] for place, name in enumerate(kernel.arg_names) if name in known}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False, "num_warps": 4}
    ).asm["ptx"]


def test_why_not_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, how = format_of("mxfp4", rank=2), Rounding()
    without = "triton is not installed"
    assert why_not(fmt, how, torch.float32, SHAPE, "cuda") == (without if find_spec("triton") is None else None)
    assert why_not(fmt, how, torch.float64, SHAPE, "cuda") == "no kernel for torch.float64"
    assert why_not(fmt, how, torch.float32, SHAPE, "meta") == "no kernel for the device meta"
    monkeypatch.setenv("MXLOOM_KERNELS", "eager")
    assert why_not(fmt, how, torch.float32, SHAPE, "cuda") == "MXLOOM_KERNELS is eager"


def test_a_layout_that_takes_more_than_block_functions_says_so() -> None:
    """Where a kernel for GPUs is asked for, the answer is why there is none, and the definitions do the work."""
    for format, rounding, reason in [("ternary", "rne", "scale rule absmean"), ("mxfp4", "stochastic", "stochastic")]:
        layout = layout_of(format_of(format, rank=2), Rounding(rounding=rounding), SHAPE)
        assert isinstance(layout, Layout)
        assert reason in str(gpu.prepare(layout, torch.float32))
        with pytest.raises(MxloomError, match=reason):
            EagerRounding(layout, torch.float32)


@pytest.mark.parametrize(
    ("language", "begin"),
    [("mlir", "func.func @magnitudes"), ("llvm", ";"), ("triton", "import triton"), ("torch", "import")],
)
def test_a_kernel_as_text(language: str, begin: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "--kernel", language, "nvfp4"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(begin)
    assert text.endswith("\n")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("trito", "mxfp4"), 'not "trito" .did you mean "triton"?'),
        (("torch", "bf16"), "nothing to write for bf16: no kernel for bf16"),
        (("torch", "ternary"), "no kernel in torch for the scale rule absmean"),
    ],
)
def test_a_kernel_that_cannot_be_written(asked: tuple[str, str], message: str) -> None:
    with pytest.raises(MxloomError, match=message):
        kernel_text(*asked)


@pytest.mark.parametrize("write", [torch_source, lambda function, _: triton_source_of(function)])
def test_an_operation_without_a_form_is_named(write: Any) -> None:
    kind = VectorType(f32, [8])
    block = Block(arg_types=[kind])
    block.add_op(sine := math.SinOp(block.args[0]))
    block.add_op(ReturnOp(sine.result))
    function = FuncOp("q", FunctionType.from_lists([kind], [kind]), Region(block))
    with pytest.raises(MxloomError, match=r"math\.sin of vector<8xf32>, vector<8xf32> has no form in (torch|Triton)"):
        write(function, ["values"])


def triton_source_of(function: FuncOp) -> str:
    from mxloom.backends.kernels.emitters._spelling import function_text
    from mxloom.backends.kernels.emitters.triton_source import TRITON

    return "\n".join(function_text(function, TRITON, ["values"]))
