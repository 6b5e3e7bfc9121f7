"""`make demo-hardware`: one layer of the embedded model as hardware in four formats, simulated, compared and costed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mxloom
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator, verilator
from mxloom.backends.dataflow.verification import Outcome, Simulator, compare
from mxloom.compiler.hardware import Hardware, hardware
from mxloom.dialects.errors import MxloomError

HERE = Path(__file__).parent
MODEL = HERE / "models" / "kjv-2m"
PART, POSITIONS, SEQUENCES = "model.layers.0", 8, 2

MIXED = "mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>"
RULES: dict[str, list[Mapping[str, Any]]] = {
    "mxint8": [{"weights": "mxint8", "activations": "mxint8"}],
    "mxfp8_e4m3": [{"weights": "mxfp8_e4m3", "activations": "mxfp8_e4m3"}],
    "mxfp4 x mxint8": [{"weights": "mxfp4", "activations": "mxint8"}],
    # Thresholds that leave about seven blocks of ten in FP4, of the weights and of what the layer computes.
    "mxfp4 or mxfp8, by block": [
        {"match": "*lm_head", "weights": "mxint8", "activations": "mxint8"},
        {
            "kind": "linear",
            "weights": MIXED,
            "activations": MIXED,
            "weight_threshold": 0.0073,
            "activation_threshold": 0.93,
        },
    ],
}

HEADER = ("weights x activations", "beats", "arc", "Verilator", "interval", "formula", "latency", "predicted",
          "um2", "LUT", "DSP", "BRAM", "bytes", "uJ")  # fmt: skip
EXPLAINED = """\
arc, Verilator      beats that differ from the reference, in each of the two simulators
interval, formula   cycles from one sequence to the next, simulated, and what the sizes of the slowest stage say
latency, predicted  cycles from the first number in to the first number out, simulated, and before it was built
um2                 area in ASAP7 without memories; LUT, DSP, BRAM: a Xilinx 7 series
bytes, uJ           memory on chip, and energy for one sequence (by the cost model)"""


def main() -> int:
    """Print one line for each format; returns 1 where a beat differs."""
    told = None
    try:
        verilator()
    except MxloomError as error:
        told = error
    print(f"{PART} of {MODEL.name}, {SEQUENCES} sequences of {POSITIONS} positions", flush=True)
    rows = list(_rows(told is None))
    print(f"\n{_aligned([HEADER, *(cells for cells, _ in rows)])}\n\n{EXPLAINED}")
    if told is not None:
        print(f"Verilator is left out: {told}")
    return int(not all(good for _, good in rows))


def _rows(both: bool) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Build and simulate the layer in each format: the cells of its line, and whether every beat is right."""
    source = None
    for name, rules in RULES.items():
        start = time.monotonic()
        recipe = {"version": 1, "quantize": rules, "passes": ["legalize-hardware"]}
        compiled = mxloom.compile(source or MODEL, recipe)
        source = compiled.source
        design = hardware(compiled, PART, positions=POSITIONS)
        given = design.vectors(SEQUENCES)
        graph = design.graph
        made: list[Simulator] = [ArcSimulator(design.text, graph.input_streams, graph.output_streams)]
        if both:
            made.append(VerilatorSimulator(design.text, graph.input_streams, graph.output_streams))
        outcomes = [compare(each, graph, given) for each in made]
        print(f"  {name:24} {time.monotonic() - start:5.1f} s", flush=True)
        yield _cells(name, design, outcomes), all(each.is_equal for each in outcomes)


def _cells(name: str, design: Hardware, outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    arc, timing, total = outcomes[0], design.timing, design.cost["total"]
    fpga = total["fpga"]["xc7_dsp"]
    wrong = [f"{each.mismatches + each.missing + each.surplus + each.violations:,}" for each in outcomes]
    return (
        name,
        f"{arc.beats:,}",
        *([*wrong, "-"])[:2],
        f"{arc.interval:,.0f}",
        f"{design.graph.nodes[timing.slowest].stage.cycles:,}",
        f"{arc.latency:,}",
        f"{timing.latency:,}",
        f"{total['area_um2']:,.0f}",
        *(f"{fpga[kind]:,.0f}" for kind in ("LUT", "DSP", "BRAM")),
        f"{sum(total['memory_bits'].values()) / 8:,.0f}",
        f"{sum(total['energy_pj'].values()) / 1e6:.2f}",
    )


def _aligned(lines: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
