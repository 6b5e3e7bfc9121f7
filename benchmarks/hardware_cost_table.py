"""Fits the hardware cost model to the recorded Yosys runs and writes its errors into docs/hardware_cost.md.

python benchmarks/hardware_cost_table.py          # from the recorded runs, no Yosys
python benchmarks/hardware_cost_table.py --check  # fails where the coefficients are not those of the recorded runs
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from page import table, write_section

from mxloom.backends.dataflow.cost.calibration import fit_all
from mxloom.backends.dataflow.cost.designs import blind_designs, design_of, fit_designs, held_out_designs
from mxloom.backends.dataflow.cost.energy import FGMP_PAPER_SAVING, INT8_MAC, fgmp_energies, fgmp_saving, switching
from mxloom.backends.dataflow.cost.measurements import Measurements, own_measurements, read_measurements
from mxloom.backends.dataflow.cost.model import Coefficients, Errors
from mxloom.dialects.errors import MxloomError

PAGE = Path(__file__).parents[1] / "docs" / "hardware_cost.md"
TARGETS = (("nand2", "NAND2"), ("xc7", "LUT"), ("xc7", "FF"), ("xc7_dsp", "LUT"), ("ecp5", "LUT"), ("ecp5", "FF"))
FGMP_LINE = "dot a={0} b={0} lanes=16 segment=32 window=32 lsb=-16 bias=24"


def main() -> int:
    known = read_measurements(own_measurements())
    found = fit_all(fit_designs(), held_out_designs(), known)
    file = own_measurements().with_name("coefficients.json")
    if "--check" in sys.argv:
        return int(file.read_text() != found.text())
    file.write_text(found.text(), encoding="utf-8")
    sections = {
        "Errors by kind": errors(found, known),
        "Blind dot-product units": f"{blind_errors(found, known)}\n\n{units(blind_designs(), found, known)}",
        "Held-out dot-product units": units(held_out_designs(), found, known),
        "Energy of a product, by pair of formats": energies(),
        "Mixed FP4 and FP8 (FGMP)": fgmp(known),
    }
    for heading, text in sections.items():
        write_section(PAGE, heading, text)
        print(f"## {heading}\n\n{text}\n")
    return 0


def errors(found: Coefficients, known: Measurements) -> str:
    """Errors of what was fitted and of what was held out, by target, count and kind; sums in f32 on their own."""
    heads = ["target", "count", "kind", "fitted on", "mean %", "max %", "held out", "mean %", "max %"]
    rows: list[list[str]] = []
    for target, counts in found.fits.items():
        for count, kinds in counts.items():
            for kind in kinds:
                for name, part in parts(kind).items():
                    lists = [[line for line in lines if part(line)] for lines in (fit_designs(), held_out_designs())]
                    told = [errors_on(lines, found, known, target, count).told() for lines in lists]
                    rows.append([target, count, name, *told[0], *told[1]])
    return table(heads, rows)


def parts(kind: str) -> dict[str, Callable[[str], bool]]:
    """The lines of a kind, by the name that the table gives them."""
    if kind not in ("dot", "contraction"):
        return {kind: lambda line: line.startswith(f"{kind} ")}
    return {
        kind: lambda line: line.startswith(f"{kind} ") and "acc=f32" not in line,
        f"{kind}, f32": lambda line: line.startswith(f"{kind} ") and "acc=f32" in line,
    }


def errors_on(lines: Sequence[str], found: Coefficients, known: Measurements, target: str, count: str) -> Errors:
    """Relative errors on the designs that were measured on a target."""
    each = [
        abs(found.predict(design_of(line), target)[0][count] - value) / max(1.0, value)
        for line in lines
        if (line, target) in known
        for value in (known[line, target][count],)
    ]
    return Errors(len(each), sum(each) / len(each), max(each)) if each else Errors()


def blind_errors(found: Coefficients, known: Measurements) -> str:
    rows = [
        [f"{target} {count}", *errors_on(blind_designs(), found, known, target, count).told()]
        for target, count in (*TARGETS, ("xc7_dsp", "FF"))
    ]
    return table(["count", "units", "mean %", "max %"], rows)


def units(lines: Sequence[str], found: Coefficients, known: Measurements) -> str:
    """Predicted, measured, and the error in per cent, by unit and target."""
    rows: list[list[str]] = []
    for line in lines:
        if not line.startswith("dot "):
            continue
        row = [line.removeprefix("dot ")]
        for target, count in TARGETS:
            if (line, target) not in known:
                row.append("")
                continue
            predicted, measured = found.predict(design_of(line), target)[0][count], known[line, target][count]
            row.append(f"{predicted:.0f} / {measured:.0f} ({100 * (predicted / measured - 1):+.0f})")
        rows.append(row)
    return table(["unit", *(f"{target} {count}" for target, count in TARGETS)], rows)


def energies() -> str:
    """What a unit switches for each multiply-accumulate, relative to INT8, and in picojoules."""
    pairs = switching().pairs
    rows = [
        [" x ".join(pair), f"{value / pairs['int8', 'int8']:.2f}", f"{value / pairs['int8', 'int8'] * INT8_MAC:.3f}"]
        for pair, value in pairs.items()
    ]
    return table(["elements", "relative to INT8", "pJ (45 nm)"], rows)


def fgmp(known: Measurements) -> str:
    """Energy of each mode beside FP8 alone, the saving at 70 % of FP4 blocks, the mixed unit's area overhead."""
    names = ("FP8 x FP8", "FP4 x FP8", "FP8 x FP4", "FP4 x FP4")
    energies = fgmp_energies()
    modes = [f"{energies[mode]:.2f}" for mode in ("88", "48", "84", "44")]
    heads = ["energy per product, FP8 alone 1", *names, "saved at 70 % FP4"]
    text = table(heads, [["FP4 and FP8", *modes, f"{100 * fgmp_saving(0.7):.1f} %"]])
    counts = [(target, count) for target, count in TARGETS if count != "FF"]
    areas: list[list[str]] = []
    for target, count in counts:
        pair = [known.get((FGMP_LINE.format(name), target)) for name in ("e2m1/e4m3", "e4m3")]
        if pair[0] is None or pair[1] is None:
            raise MxloomError(f"the mixed unit and the FP8 unit are not measured for {target}")
        mixed, pure = pair[0][count], pair[1][count]
        areas.append([f"{target} {count}", f"{pure:.0f}", f"{mixed:.0f}", f"{100 * (mixed / pure - 1):+.1f} %"])
    paper = f"The paper states {100 * FGMP_PAPER_SAVING:.0f} % for its accelerator, memories and all."
    return f"{text}\n\n{paper}\n\n{table(['16 lanes', 'FP8', 'FP4 and FP8', 'overhead'], areas)}"


if __name__ == "__main__":
    sys.exit(main())
