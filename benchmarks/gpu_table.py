"""How fast the kernels for GPUs are, as Markdown: `python benchmarks/gpu_table.py [FILE]`.

With a FILE the page is written there (docs/performance_gpu.md). Needs a CUDA device and Triton.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

import mxloom
from mxloom.backends.kernels.fake_quantization import reference_only, why_not
from mxloom.dialects import formats
from mxloom.dialects.formats import Rounding
from mxloom.dialects.instances import format_of

FORMATS = ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "nvfp4"]
FORMATS += ["int8_channel", "int8_tensor", "fp8_e4m3_tensor", "fixed<8,6>"]
TEXTBOOK = {"mxfp4": (2, 1, 6.0), "mxfp6_e2m3": (2, 3, 7.5), "mxfp8_e4m3": (4, 3, 448.0), "mxfp8_e5m2": (5, 2, 57344.0)}
"""Exponent bits, mantissa bits, largest value of the element."""

SIZES = (4096, 16384)
DTYPES = (torch.float32, torch.bfloat16)

PAGE = """# How fast the kernels for GPUs are

`python benchmarks/gpu_table.py docs/performance_gpu.md` writes this page on a machine with an NVIDIA GPU and Triton.

Measured on {card}, {versions}.

Fake quantization of square matrices into preallocated memory: GB/s read and written, and in brackets the share of
torch's `copy_` between the same tensors. Each figure is the median of {rounds} CUDA graphs of {repeats} calls, those of
all contestants in turn, timed with CUDA events: the time of the device alone. *x definition*: how many times faster
than the same numerics in torch's operations (`dialects/formats`) on the same card, 4096 x 4096 f32; *x textbook*: than
log2, floor and round in eager torch as papers print them (power-of-two scale from the largest magnitude, no special
values).

{table}

What limits it: in f32 the card's memory. A share above 1 is no mistake: `copy_` between large matrices is a copy by the
driver, which moves fewer bytes a second than the kernels. A format with a scale of the whole tensor reads it twice
(nvfp4, int8_tensor, fp8_e4m3_tensor), which bounds it at 0.67 of what the others reach. In bf16, half the bytes, it is
instructions: about 40 for each value, and 20 more where elements are divided.
On the processor a call costs {call:.0f} microseconds until the kernel is launched; the first use of a format compiles
its kernel ({first:.1f} s).
"""


def main() -> None:
    heads = ["format", *(f"{size} {_short(dtype)}" for size in SIZES for dtype in DTYPES)]
    heads += ["x definition", "x textbook"]
    first = _first_use()
    rows = [[name, *_figures(name), *_others(name)] for name in ["copy_", *FORMATS]]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---", *["---:"] * (len(heads) - 1)], *rows])
    versions = f"torch {torch.__version__}, Triton {version('triton')}, CUDA {torch.version.cuda}"
    card = torch.cuda.get_device_name()
    page = PAGE.format(
        card=card, versions=versions, table=table, rounds=ROUNDS, repeats=REPEATS, call=_call(), first=first
    )
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(page, encoding="utf-8")
    print(page)


ROUNDS, REPEATS = 15, 10


def _figures(name: str) -> list[str]:
    """One figure to each size and dtype."""
    return [_figure(name, size, dtype) for size in SIZES for dtype in DTYPES]


def _figure(name: str, size: int, dtype: torch.dtype) -> str:
    x = torch.randn(size, size, device="cuda").to(dtype)
    out = torch.empty_like(x)
    copy, ours = _seconds([_contestant("copy_", x, out), _contestant(name, x, out)])
    share = "" if name == "copy_" else f" ({copy / ours:.2f})"
    return f"{2 * x.nbytes / ours / 1e9:.0f}{share}"


def _contestant(name: str, x: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    if name == "copy_":
        return lambda: out.copy_(x)
    reason = why_not(format_of(name, rank=2), Rounding(), x.dtype, tuple(x.shape), "cuda")
    assert reason is None, reason
    return lambda: mxloom.fake_quantize(x, name, out=out)


def _others(name: str) -> list[str]:
    """How many times slower the definition and textbook code are, 4096 x 4096 f32."""
    if name == "copy_":
        return ["", ""]
    x = torch.randn(SIZES[0], SIZES[0], device="cuda")
    out = torch.empty_like(x)
    (ours,) = _seconds([_contestant(name, x, out)])
    fmt = format_of(name, rank=2)
    with reference_only():
        definition = _eager_seconds(lambda: formats.quantize(x, fmt))
    textbook = _eager_seconds(lambda: _textbook(x, *TEXTBOOK[name])) if name in TEXTBOOK else 0.0
    return [f"{definition / ours:.0f}", f"{textbook / ours:.0f}" if textbook else ""]


def _seconds(runs: list[Callable[[], object]]) -> list[float]:
    """The median time of a call of each on the device."""
    graphs = [_graph(run) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for graph, found in zip(graphs, times, strict=True):
            found.append(_between(graph.replay) / REPEATS)
    return [statistics.median(found) for found in times]


def _graph(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Several calls as one graph, so that launching them takes no time between."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()
    graph.replay()
    return graph


def _eager_seconds(run: Callable[[], object]) -> float:
    """The median time of what allocates memory and waits for the device, five calls behind a first."""
    run()
    return statistics.median(_between(run) for _ in range(5))


def _between(run: Callable[[], object]) -> float:
    """Seconds between an event before and one behind."""
    before, behind = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    run()
    behind.record()
    torch.cuda.synchronize()
    return before.elapsed_time(behind) / 1e3


def _textbook(x: torch.Tensor, exponent_bits: int, mantissa_bits: int, largest: float) -> torch.Tensor:
    """OCP MX 1.0 section 6.3 with floor scales, as one writes it in eager torch."""
    blocks = x.reshape(-1, 32)
    top = torch.floor(torch.log2(torch.tensor(largest)))
    scale = 2 ** (torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - top)
    values = blocks / scale
    lowest = 2 - 2 ** (exponent_bits - 1)
    exponent = torch.floor(torch.log2(values.abs() + (values == 0))).clamp(min=lowest)
    step = 2 ** (exponent - mantissa_bits)
    return ((values / step).round() * step).clamp(-largest, largest).mul(scale).reshape(x.shape)


def _first_use() -> float:
    """Seconds until a format has rounded its first tensor."""
    x = torch.ones(64, 64, device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    mxloom.fake_quantize(x, "!mx.block<8xf4E2M1FN>")
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _call() -> float:
    """Microseconds of a call on the processor."""
    x = torch.ones(64, 64, device="cuda")
    out = torch.empty_like(x)
    mxloom.fake_quantize(x, "mxfp4", out=out)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(200):
            mxloom.fake_quantize(x, "mxfp4", out=out)
        times.append((time.perf_counter() - begin) / 200)
    return 1e6 * statistics.median(times)


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


if __name__ == "__main__":
    main()
