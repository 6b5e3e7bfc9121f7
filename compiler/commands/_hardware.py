"""What the commands on hardware share: which model, which part of it, how wide."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from ..hardware import hardware, is_emitted
    from ..reuse import reused
    from ._models import opened

    if is_emitted(Path(args.model)):
        raise UsageError(
            f"{args.model} is an emitted design, whose vectors `make sim` runs in it: "
            "give the folder that mxloom compile wrote"
        )
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


def told_outside(cost: dict[str, Any]) -> list[str]:
    """What a cost report says of layers that are loaded in turn, and of bytes that come from outside and their energy.

    The energy of memory off the chip stands apart from the design's own.
    """
    found: list[str] = []
    if "reuse" in cost:
        layers, whole = cost["reuse"]["layers"], cost["reuse"]["total"]
        found.append(
            f"figures are of one layer; {layers} are loaded in turn: {whole['loading_cycles']:,} cycles of loading, "
            f"{whole['cycles_of_one_input']:,} with one input, {whole['cycles_of_each_further_input']:,.0f} more for "
            f"each further one, {whole['on_chip_pj_of_one_input'] / 1e3:,.1f} nJ on chip for an input"
        )
        found.append(f"every loading of all layers: {_off_chip(whole['weights'])}")
        found.append(f"every input, in and out of each layer: {_off_chip(whole['values_of_one_input'])}")
    if "streamed" in cost:
        streamed = cost["streamed"]
        found.append(
            f"weights, for every input: {_off_chip(streamed['total'])}; {streamed['bytes_per_cycle']:,} bytes a cycle"
        )
    return found


def _off_chip(traffic: dict[str, Any]) -> str:
    least, most = (each / 1e3 for each in traffic["dram_pj"])
    return f"{traffic['bytes']:,.0f} bytes from outside, {least:,.0f} to {most:,.0f} nJ in DRAM ({traffic['source']})"
