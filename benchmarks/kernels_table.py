"""Kernels against torch's copy_, textbook code and torchao, on the machine at hand (run: kernels_table.py [MARKDOWN]).

One process, one thread, all contestants of a row in turn, medians of CPU time; then two threads against one. With a
file name the page is written there (docs/performance.md); sections under headings of their own stay.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from page import machine, write_head

import mxloom
from mxloom.backends.kernels._error_definition import errors_by_torch
from mxloom.backends.kernels._layout import block_numbers
from mxloom.backends.kernels.clip_errors import candidate_errors, stored_scales
from mxloom.backends.kernels.codes import prepare_codes
from mxloom.backends.kernels.error_function import Candidates
from mxloom.backends.kernels.fake_quantization import prepare
from mxloom.backends.kernels.measurement import LARGE, SMALL, Measured, copy_bandwidth, measure
from mxloom.backends.kernels.statistics import block_statistics, by_torch
from mxloom.dialects import formats
from mxloom.dialects.formats import BlockType, Rounding, encode_tensor
from mxloom.dialects.instances import format_of

TEXTBOOK = {"mxfp4": (2, 1, 6.0), "mxfp6_e2m3": (2, 3, 7.5), "mxfp8_e4m3": (4, 3, 448.0), "mxfp8_e5m2": (5, 2, 57344.0)}
"""Exponent bits, mantissa bits, largest value of the element."""

TORCHAO = {"mxfp4": "float4_e2m1fn_x2", "mxfp8_e4m3": "float8_e4m3fn", "mxfp8_e5m2": "float8_e5m2"}

PAGE = """# How fast the kernels are

`make bench` (or `python benchmarks/kernels_table.py docs/performance.md`) writes this page up to its first section;
`mxloom bench` prints the first table on any machine.

{machine}

Fake quantization of f32 in preallocated memory, one thread, medians of CPU time with all contestants of a row in
turn. *of copy*: speed as a share of torch's `copy_` (1 is the speed of memory; a format with a scale of the whole
tensor must read it twice, which bounds it at 0.67). *x definition*: how many times faster than the same numerics in
torch's operations (`dialects/formats`); *x textbook*: than log2, floor and round in eager torch as papers print them
(power-of-two scale from the largest magnitude, no special values); *x torchao*: than
`MXTensor.to_mx(...).dequantize()` of torchao {torchao}. *first use*: CPU milliseconds until a format has rounded its
first tensor, with nothing kept, and with the kernel on disk.

{table}

{threads}

Other kernels on f32 of the given shape, in memory of their own; *x definition*: than the same bits from torch's
operations (`encode_tensor` for codes, which it also packs into the format's own; a loop over values for statistics and
errors). *of copy* is none for errors: they are given in nanoseconds for each value and candidate.

{others}

The kernel is timed alone; `mxloom.fake_quantize` takes {call:.0f} microseconds around it, to look its arguments up.

What limits it: from memory, the bandwidth that `copy_` reaches too ({memory:.1f} GB/s here, read and written;
{cache:.1f} GB/s in cache). In cache, instructions: 13 for each register of values that is rounded and 5 to 11 to
measure it, against two of a copy. Divisions are not what limits NVFP4: quotients by multiplication and two fused
corrections, which are as exact, were no faster; it reads the tensor once more for the tensor's scale. Results of
32 MiB and more are written past the caches, as `copy_` does, which made MX formats 15 % faster. A first use is half
LLVM's code generation, half xDSL's construction and printing of the code; measuring eight blocks at once made NVFP4
30 % faster in cache, for 15 ms of it.
"""


def main() -> None:
    rows = [_row(measure(name)) for name in mxloom.formats() if name not in ("bf16", "f16", "f32")]
    heads = ["format", "of copy, 4096 x 4096", "of copy, 128 x 1024", "x definition", "x textbook", "x torchao"]
    head = f"| {' | '.join([*heads, 'first use, ms', 'from disk, ms'])} |"
    table = "\n".join([head, "|---|---:|---:|---:|---:|---:|---:|---:|", *rows])
    page = PAGE.format(
        machine=machine(),
        torchao=version("torchao"),
        table=table,
        threads=_threads(),
        others=_others(),
        call=_call(),
        memory=copy_bandwidth(LARGE) / 1e9,
        cache=copy_bandwidth(SMALL) / 1e9,
    )
    if len(sys.argv) > 1:
        write_head(Path(sys.argv[1]), page)
    print(page)


def _row(measured: Measured) -> str:
    name = measured.format
    if measured.why_not is not None:
        return f"| {name} | {measured.why_not} | | | | | | |"
    ours, textbook, torchao = _against(name)
    others = [f"{time / ours:.0f}" if time else "" for time in (textbook, torchao)]
    figures = [f"{figure:.2f}" for figure in (measured.from_memory, measured.in_cache)] + [f"{measured.over_eager:.0f}"]
    uses = [f"{1e3 * seconds:.1f}" for seconds in (measured.first_use, measured.from_disk)]
    return f"| {name} | {' | '.join([*figures, *others, *uses])} |"


def _against(name: str) -> tuple[float, float, float]:
    """CPU seconds of ours, textbook code and torchao on the large tensor; 0 where there is none."""
    torch.set_num_threads(1)
    x = torch.randn(LARGE)
    out = torch.empty_like(x)
    runs: list[Callable[[], object]] = [lambda: mxloom.fake_quantize(x, name, out=out)]
    runs.append((lambda: _textbook(x, *TEXTBOOK[name])) if name in TEXTBOOK else lambda: None)
    runs.append(_torchao(x, TORCHAO[name]) if name in TORCHAO else lambda: None)
    times: list[list[float]] = [[], [], []]
    for _ in range(3):
        for run, found in zip(runs, times, strict=True):
            found.append(_cpu_time(run))
    ours, *others = (statistics.median(found) for found in times)
    textbook, torchao = (time if time > ours / 100 else 0.0 for time in others)
    return ours, textbook, torchao


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


def _torchao(x: torch.Tensor, element: str) -> Callable[[], object]:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    dtype = getattr(torch, element)
    return lambda: MXTensor.to_mx(x, dtype, 32).dequantize(torch.float32)


def _cpu_time(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def _threads() -> str:
    """Two threads against one, wall time: ours beside copy_."""
    x = torch.randn(LARGE)
    out = torch.empty_like(x)
    runs: dict[str, Callable[[], object]] = {
        "copy_": lambda: out.copy_(x),
        "mxfp4": lambda: mxloom.fake_quantize(x, "mxfp4", out=out),
        "nvfp4": lambda: mxloom.fake_quantize(x, "nvfp4", out=out),
    }
    times: dict[tuple[str, int], list[float]] = {(name, count): [] for name in runs for count in (1, 2)}
    for _ in range(7):
        for (name, count), found in times.items():
            torch.set_num_threads(count)
            begin = time.perf_counter()
            runs[name]()
            found.append(time.perf_counter() - begin)
    gains = {name: statistics.median(times[name, 1]) / statistics.median(times[name, 2]) for name in runs}
    return (
        "Two threads against one (wall time): " + ", ".join(f"{name} {gain:.2f}x" for name, gain in gains.items()) + "."
    )


def _others() -> str:
    """Codes, statistics, errors of candidates, stochastic rounding and mixed blocks against their definitions."""
    torch.set_num_threads(1)
    heads = "| kernel | shape | of copy | ns a value | x definition |\n|---|---|---:|---:|---:|"
    x, half = torch.randn(LARGE), torch.randn(1024, 1024)
    out = torch.empty_like(x)
    copy = statistics.median(_cpu_time(lambda: out.copy_(x)) for _ in range(5))
    lines = [heads]
    for name in ("mxfp4", "mxint8", "nvfp4", "int8_channel"):
        fmt = format_of(name, rank=2)
        lines.append(_line(f"codes of {name}", x, copy, _coder(name, x), lambda fmt=fmt: encode_tensor(x, fmt)))
    for size in (32, 4096):
        split = x.view(-1, size)
        ours, theirs = lambda size=size: block_statistics(x, size), lambda split=split: by_torch(split)
        lines.append(_line(f"statistics of blocks of {size}", x, copy, ours, theirs))
    mixed = format_of("!mx.mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, f8E4M3FN>", rank=2)
    for text, fmt, how in (
        ("mxfp4, stochastic", format_of("mxfp4", rank=2), Rounding(rounding="stochastic")),
        ("nvfp4 or f8E4M3FN by a threshold", mixed, Rounding(threshold=0.02)),
    ):
        kernel = prepare(fmt, how, LARGE, torch.float32)
        assert not isinstance(kernel, str)
        ours, theirs = lambda kernel=kernel: kernel(x, None), lambda fmt=fmt, how=how: formats.quantize(x, fmt, how)
        lines.append(_line(text, x, copy, ours, theirs))
    searches: list[tuple[str, torch.Tensor, Candidates]] = [
        ("nvfp4", stored_scales(_blocks("nvfp4")), "scales"),
        ("mxfp4", torch.exp2(torch.arange(-2.0, 3.0)), "multiples"),
        ("int8_channel", torch.linspace(0.3, 1.0, 20), "clips"),
        ("int4_g128_affine", torch.linspace(0.3, 1.0, 20), "clips"),
    ]
    lines += [_search(name, half, candidates, kind) for name, candidates, kind in searches]
    return "\n".join(lines)


def _line(name: str, x: torch.Tensor, copy: float, ours: Callable[[], object], definition: Callable[[], object]) -> str:
    ours()
    found = statistics.median(_cpu_time(ours) for _ in range(5))
    expected = min(_cpu_time(definition) for _ in range(2))
    figures = f"{copy / found:.2f} | {1e9 * found / x.numel():.2f} | {expected / found:.0f}"
    return f"| {name} | {' x '.join(map(str, x.shape))} | {figures} |"


def _coder(name: str, x: torch.Tensor) -> Callable[[], object]:
    """Codes of a format, into memory that is at hand."""
    kernel = prepare_codes(format_of(name, rank=2), Rounding(), tuple(x.shape), torch.float32)
    assert not isinstance(kernel, str)
    codes, scales, sums, *_ = kernel(x)
    return lambda: kernel(x, codes, scales, sums)


def _search(name: str, x: torch.Tensor, candidates: torch.Tensor, kind: Candidates) -> str:
    """The errors of all candidates; the definition is timed on two of them."""
    fmt, count = _blocks(name), candidates.numel()
    candidate_errors(x, fmt, candidates, kind)
    ours = statistics.median(_cpu_time(lambda: candidate_errors(x, fmt, candidates, kind)) for _ in range(5)) / count
    numbers = block_numbers(fmt, Rounding())
    assert not isinstance(numbers, str)
    rows, two = fmt.tiling(x.shape).stream(x).view(-1, fmt.tiling(x.shape).block[-1]), candidates[:2].double()
    theirs = _cpu_time(lambda: errors_by_torch(rows, numbers, two, kind, None, 1.0)) / 2
    shape = " x ".join(map(str, x.shape))
    return f"| {count} {kind} of {name} | {shape} | | {1e9 * ours / x.numel():.2f} | {theirs / ours:.0f} |"


def _blocks(name: str) -> BlockType:
    found = format_of(name, rank=2)
    assert isinstance(found, BlockType)
    return found


def _call() -> float:
    """CPU microseconds of a call on a tensor so small that the kernel's own time vanishes."""
    x = torch.ones(2, 32)
    out = torch.empty_like(x)
    mxloom.fake_quantize(x, "mxfp4", out=out)
    times = [_cpu_time(lambda: [mxloom.fake_quantize(x, "mxfp4", out=out) for _ in range(1000)]) for _ in range(5)]
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
