"""Measure how fast this machine rounds tensors into number formats, next to a plain copy.

Columns: speed of the kernel as a share of torch's copy_ on 4096 x 4096 f32 (from memory) and 128 x 1024 (in cache), how
many times faster than the same numerics in torch's operations, CPU milliseconds of a format's first use and of its
first use when its kernel is on disk. One thread; a format without a kernel says why.

  mxloom bench
  mxloom bench mxfp4 nvfp4
"""

import argparse
from dataclasses import asdict

from . import _json

summary = "measure the kernels on this machine"

COLUMNS = ("format", "of copy, memory", "of copy, cache", "x eager", "first ms", "from disk ms")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help="the formats (default: all that have a name)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds of the median (default 7)")
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
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
