"""Measure how fast this machine rounds tensors into number formats, next to a plain copy.

Columns: speed of the kernel as a share of torch's copy_ on 4096 x 4096 f32 (from memory) and 128 x 1024 (in cache), how
many times faster than the same numerics in torch's operations, CPU milliseconds of a format's first use and of its
first use when its kernel is on disk. One thread; a format without a kernel says why.

With --contractions: linear layers whose sums are exact in every block. TOP/s of the kernel on codes, its share of the
same instruction in a loop of registers and (one row) of reading from memory, and how many times faster it is than
torch's f32, oneDNN's f32 and torch's int8 products; "call" has the rounding of the f32 input in it.

  mxloom bench
  mxloom bench mxfp4 nvfp4
  mxloom bench --contractions
"""

import argparse
from dataclasses import asdict

from . import _json

summary = "measure the kernels on this machine"

OTHERS = ("torch f32", "oneDNN f32", "torch._int_mm")

CONTRACTION_COLUMNS = (
    "weights x activations",
    "rows",
    "kernel ms",
    "call ms",
    "TOP/s",
    "of peak",
    "of memory",
    *OTHERS,
)

COLUMNS = ("format", "of copy, memory", "of copy, cache", "x eager", "first ms", "from disk ms")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="the formats (default: all that have a name)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of the median (default 7)")
    parser.add_argument("--contractions", action="store_true", help="measure linear layers on codes instead")
    parser.add_argument(
        "--width", type=int, metavar="N", help="of those layers, twice as wide for one row (default 2048)"
    )
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
    from ...backends.kernels.fake_quantization import switched_off
    from ...dialects.errors import UsageError

    if (reason := switched_off()) is not None:
        raise UsageError(f"{reason}: there are no kernels to measure; unset it")
    if args.contractions:
        return _contractions(args)
    if args.width is not None:
        raise UsageError("--width is that of linear layers: give --contractions too")
    from ...backends.kernels.measurement import LARGE, SMALL, copy_bandwidth, measure
    from ...dialects.arguments import whole_number
    from ...dialects.instances import format_of
    from ...dialects.numbers import formats

    names = args.formats or [name for name in formats() if name not in ("bf16", "f16", "f32")]
    for name in names:
        format_of(name, rank=2)
    rounds = whole_number("rounds", args.rounds, 1, 1000)
    copies = [copy_bandwidth(shape, rounds) for shape in (LARGE, SMALL)]
    if args.json:
        _json.write({"copy_bytes_per_second": copies, "formats": [asdict(measure(name, rounds)) for name in names]})
        return 0
    print(f"copy_: {copies[0] / 1e9:.1f} GB/s from memory, {copies[1] / 1e9:.1f} GB/s in cache (read and written)")
    print("".join(column.rjust(17) if place else column.ljust(20) for place, column in enumerate(COLUMNS)))
    for name in names:
        m = measure(name, rounds)
        figures = (m.from_memory, m.in_cache, m.over_eager, 1e3 * m.first_use, 1e3 * m.from_disk)
        text = m.why_not or "".join(f"{figure:17.2f}" for figure in figures)
        print(f"{name:20}{text}", flush=True)
    return 0


def _contractions(args: argparse.Namespace) -> int:
    from ...backends.kernels.contraction.measurement import GEMMS, GEMVS, ROWS, measure_linear
    from ...dialects.arguments import whole_number
    from ...dialects.errors import UsageError

    if args.formats:
        raise UsageError("bench --contractions measures layers of its own: leave the formats out")
    rounds = whole_number("rounds", args.rounds, 1, 1000)
    width = whole_number("width", 2048 if args.width is None else args.width, 32, 8192)
    cases = [(*formats, ROWS, width) for formats in GEMMS] + [(*formats, 1, 2 * width) for formats in GEMVS]
    if args.json:
        found = [measure_linear(*case, case[-1], rounds) for case in cases]
        _json.write({"contractions": [asdict(each) for each in found]})
        return 0
    print("".join(name.rjust(14) if place else name.ljust(28) for place, name in enumerate(CONTRACTION_COLUMNS)))
    for case in cases:
        m = measure_linear(*case, case[-1], rounds)
        text = m.why_not
        if text is None:
            figures = [1e3 * m.seconds["kernel"], 1e3 * m.seconds["call"], m.operations / m.seconds["kernel"] / 1e12]
            figures += [m.of_peak, m.of_bandwidth, *(m.gain(other) for other in OTHERS)]
            text = "".join(f"{figure:14.2f}" if figure else " " * 14 for figure in figures)
        print(f"{m.weights + ' x ' + m.activations:28}{m.rows:14}{text}", flush=True)
    return 0
