"""What a compiled model, or a part of it, costs as hardware: nothing is emitted, simulated or synthesized.

Area, resources, memory and energy for every site, and cycles, from formats and folding alone; `*` marks sites whose
area lies outside what the cost model was fitted on.

mxloom cost ./typed --part model.layers.0 --cycles 4096
"""

from __future__ import annotations

import argparse
from typing import Any

from . import _hardware, _json

summary = "say what the hardware costs, site by site, before it is made"

HEADS = ("site", "stages", "cycles", "MACs", "NAND2", "um2", "LUT", "FF", "DSP", "BRAM", "bytes", "nJ")


def arguments(parser: argparse.ArgumentParser) -> None:
    _hardware.add_options(parser)
    parser.add_argument("--top", metavar="N", type=int, help="only the N sites with the largest area")
    parser.add_argument(
        "--clock", metavar="MHZ", type=float, default=100.0, help="for the throughput; not checked (default 100)"
    )
    _json.add_option(parser)


def run(args: argparse.Namespace) -> int:
    from ...dialects.arguments import whole_number
    from ...dialects.errors import UsageError
    from ..progress import Progress

    if args.top is not None:
        whole_number("top", args.top, 1, 2**31)
    if not 0 < args.clock < float("inf"):
        raise UsageError(f"--clock is a number of megahertz above 0, got {args.clock}")
    with Progress().working(f"costing {args.model}"):
        design = _hardware.built(args)
        cost = design.cost
    throughput = args.clock * 1e6 / cost["interval_cycles"]
    if args.json:
        _json.write({"top": design.name, "assumed": design.assumed, "inputs_per_second": throughput, **cost})
        return 0
    sites = by_site(cost["stages"])
    shown = sorted(sites, key=lambda site: -sites[site]["area_nand2"])[: args.top] if args.top else list(sites)
    lines = [_cells(site, sites[site]) for site in shown]
    lines.append(_cells("total", cost["total"] | {"stages": len(cost["stages"])}))
    _print_table([HEADS, *lines])
    print(
        f"NAND2, um2: {cost['library']}, without memories; LUT, FF, DSP, BRAM: xc7 with DSP blocks; bytes on chip; "
        "nJ for an input"
    )
    print(
        f"an input every {cost['interval_cycles']:,.0f} cycles ({throughput:,.0f} a second at {args.clock:g} MHz), the "
        f"first beat out after {cost['latency_cycles']:,}; the slowest stage, {cost['slowest']['name']}, takes "
        f"{cost['slowest']['cycles']:,}"
    )
    if args.top and args.top < len(sites):
        print(f"note: {len(sites) - args.top} more sites are in the total")
    if any(site["outside"] for site in sites.values()):
        print("note: * lies outside what the cost model was fitted on: its area is extrapolated")
    for each in [*_hardware.told_streamed(design), *_hardware.told_outside(cost), *design.assumed]:
        print(f"note: {each}")
    return 0


def by_site(stages: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The stages of a report added up by the place in the model that they come from; cycles are the most of one."""
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        own = found.setdefault(stage["site"], {"stages": 0, "cycles": 0, "outside": []})
        own["stages"] += 1
        own["cycles"] = max(own["cycles"], stage["cycles"])
        own["outside"] += stage["outside"]
        for name in ("macs", "area_nand2", "area_um2"):
            own[name] = own.get(name, 0) + stage[name]
        for name in ("memory_bits", "energy_pj"):
            own[name] = _sum(own.get(name, {}), stage[name])
        fpga = own.setdefault("fpga", {})
        for target, counts in stage["fpga"].items():
            fpga[target] = _sum(fpga.get(target, {}), counts)
    return found


def _sum(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _cells(name: str, cost: dict[str, Any]) -> tuple[str, ...]:
    fpga = cost["fpga"]["xc7_dsp"]
    numbers = [cost["stages"], cost["cycles"], cost["macs"], cost["area_nand2"], cost["area_um2"]]
    numbers += [*(fpga[kind] for kind in ("LUT", "FF", "DSP", "BRAM")), sum(cost["memory_bits"].values()) / 8]
    energy = sum(cost["energy_pj"].values()) / 1e3
    return (f"{name}{' *' if cost['outside'] else ''}", *(f"{number:,.0f}" for number in numbers), f"{energy:,.2f}")


def _print_table(lines: list[tuple[str, ...]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    for line in lines:
        cells = [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells))
