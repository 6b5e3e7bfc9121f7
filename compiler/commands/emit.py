"""Emit a compiled model, or a part of it, as SystemVerilog that equals the emulation bit for bit, with its cost.

The folder holds the design (rtl/), golden vectors and a test bench that checks itself (make sim), lint and synthesis
(make lint, make synth), interface.json and cost.json.

mxloom compile ./model --recipe recipe.yaml --out ./typed     # its passes: [legalize-hardware]
mxloom emit ./typed --part model.layers.0 --out ./layer
mxloom emit ./typed --reuse model.layers --out ./stack        # {share="model.layers"}: one layer's hardware for all
"""

import argparse

from . import _hardware, _json

summary = "emit SystemVerilog with vectors, test bench and cost"


def arguments(parser: argparse.ArgumentParser) -> None:
    _hardware.add_options(parser)
    parser.add_argument("--target", choices=("verilog",), default="verilog", help="what is emitted (default verilog)")
    parser.add_argument("--vectors", metavar="N", type=int, default=2, help="inputs of the test bench (default 2)")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to write")
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
    from .._target import check_target
    from ..hardware import is_emitted
    from ..progress import Progress
    from ..reuse import Reused

    replaced = check_target(args.out, is_emitted, "emitted design").exists()
    with Progress().working(f"emitting {args.model}"):
        design = _hardware.built(args)
        if isinstance(design, Reused):
            folder = design.save(args.out, design.rounds(args.vectors))
        else:
            folder = design.save(args.out, design.vectors(args.vectors))
    cost = design.cost
    if args.json:
        _json.write({"folder": str(folder), "top": design.name, "assumed": design.assumed, "cost": cost})
        return 0
    total, fpga = cost["total"], cost["total"]["fpga"]["xc7_dsp"]
    print(
        f"{design.name}: {len(cost['stages'])} stages, an input every {cost['interval_cycles']:,.0f} cycles, "
        f"the first beat out after {cost['latency_cycles']:,}"
    )
    print(
        f"area {total['area_nand2']:,.0f} NAND2 ({total['area_um2']:,.0f} um2 in {cost['library']}, without memories); "
        f"xc7 with DSP blocks: {', '.join(f'{count:,.0f} {name}' for name, count in fpga.items())}"
    )
    energy = sum(total["energy_pj"].values()) / 1e3
    print(f"{sum(total['memory_bits'].values()) / 8:,.0f} bytes on chip, {energy:,.1f} nJ for an input")
    outside = sum(bool(stage["outside"]) for stage in cost["stages"])
    if outside:
        print(f"note: {outside} stages lie outside what the cost model was fitted on: their area is extrapolated")
    for each in [*_hardware.told_streamed(design), *_hardware.told_outside(cost), *design.assumed]:
        print(f"note: {each}")
    print(f"{'replaced' if replaced else 'wrote'} {folder}: make sim, make lint and make synth work in it")
    return 0
