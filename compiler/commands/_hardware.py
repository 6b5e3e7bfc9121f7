"""What the commands on hardware share: which model, which part of it, how wide."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..hardware import Hardware
    from ..reuse import Reused


def add_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and the options that say what becomes hardware."""
    parser.add_argument("model", metavar="MODEL", help="a folder that mxloom compile wrote with legalize-hardware")
    parser.add_argument("--part", metavar="MODULE", help="the module of the model to build, as model.layers.0")
    parser.add_argument(
        "--reuse", metavar="LIST", help="one layer's hardware for all layers of a list, loaded in turn: model.layers"
    )
    parser.add_argument("--sequence", metavar="N", type=int, default=16, help="positions of a sequence (default 16)")
    parser.add_argument("--cycles", metavar="N", type=int, help="cycles from one input to the next, at most")
    parser.add_argument("--luts", metavar="N", type=float, help="LUTs (Xilinx 7 series, with DSP blocks), at most")
    parser.add_argument("--area", metavar="UM2", type=float, help="area in square micrometres (ASAP7), at most")
    parser.add_argument(
        "--memory", metavar="BYTES", type=int, help="weights on chip, at most; the largest come from outside instead"
    )
    parser.add_argument("--name", metavar="NAME", help="the name of the top module (default: from the part)")


def built(args: argparse.Namespace) -> Hardware | Reused:
    """The design that the options ask for."""
    from ...backends.dataflow.folding import Limits
    from ...dialects.arguments import whole_number
    from ...dialects.errors import UsageError
    from ..hardware import hardware
    from ..reuse import reused
    from ._models import opened

    if args.cycles is not None:
        whole_number("cycles", args.cycles, 1, 2**40)
    for name in ("luts", "area"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            raise UsageError(f"--{name} is a number above 0, got {getattr(args, name)}")
    options = {"name": args.name, "positions": args.sequence, "limits": Limits(args.cycles, args.luts, args.area)}
    if args.reuse is None:
        return hardware(opened(args.model), args.part, memory=args.memory, **options)
    for name, why in (
        ("part", "both say what becomes hardware"),
        ("memory", "one layer's hardware keeps the whole layer's weights"),
    ):
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} and --reuse: {why}; give one of them")
    return reused(opened(args.model), args.reuse, **options)


def told_streamed(design: Hardware | Reused) -> list[str]:
    """A line on each weight that comes from outside."""
    streamed = design.graph.streamed
    return [
        f"{each.site}: its weight comes from outside, {each.bits / 8:,.0f} bytes for each input" for each in streamed
    ]
