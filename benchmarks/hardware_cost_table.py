"""Fits the hardware cost model to the recorded Yosys runs and writes its errors into docs/hardware_cost.md.

python benchmarks/hardware_cost_table.py          # from the recorded runs, no Yosys
python benchmarks/hardware_cost_table.py --check  # fails where the coefficients are not those of the recorded runs
"""

from __future__ import annotations

import sys
from pathlib import Path

from page import table, write_section

from mxloom.backends.dataflow.cost.calibration import fit_all
from mxloom.backends.dataflow.cost.designs import design_of, fit_designs, held_out_designs
from mxloom.backends.dataflow.cost.energy import FGMP_PAPER_SAVING, FGMP_SWITCHED, fgmp_energies, fgmp_saving
from mxloom.backends.dataflow.cost.measurements import own_measurements, read_measurements
from mxloom.backends.dataflow.cost.model import Coefficients
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
        "Errors by kind": errors(found),
        "Held-out dot-product units": held_out(found, known),
        "Mixed FP4 and FP8 (FGMP)": fgmp(known),
    }
    for heading, text in sections.items():
        write_section(PAGE, heading, text)
        print(f"## {heading}\n\n{text}\n")
    return 0


def errors(found: Coefficients) -> str:
    heads = ["target", "count", "kind", "fitted on", "mean %", "max %", "held out", "mean %", "max %"]
    rows = [
        [target, count, kind]
        + [
            text
            for e in (fit.fitted, fit.held_out)
            for text in (str(e.designs), f"{100 * e.mean:.1f}", f"{100 * e.largest:.1f}")
        ]
        for target, counts in found.fits.items()
        for count, kinds in counts.items()
        for kind, fit in kinds.items()
    ]
    return table(heads, rows)


def held_out(found: Coefficients, known: dict[tuple[str, str], dict[str, float]]) -> str:
    """Predicted, measured, and the error in per cent, by unit and target."""
    lines = [line for line in held_out_designs() if line.startswith("dot ")]
    rows: list[list[str]] = []
    for line in lines:
        row = [line.removeprefix("dot ")]
        for target, count in TARGETS:
            if (line, target) not in known:
                row.append("")
                continue
            predicted, measured = found.predict(design_of(line), target)[0][count], known[line, target][count]
            row.append(f"{predicted:.0f} / {measured:.0f} ({100 * (predicted / measured - 1):+.0f})")
        rows.append(row)
    return table(["unit", *(f"{target} {count}" for target, count in TARGETS)], rows)


def fgmp(known: dict[tuple[str, str], dict[str, float]]) -> str:
    """Energy of each mode relative to FP8 alone, the mixed unit's area overhead, the saving at 70 % of FP4 blocks."""
    names = ("FP8 x FP8", "FP4 x FP8", "FP8 x FP4", "FP4 x FP4")
    rows: list[list[str]] = []
    for structure in FGMP_SWITCHED:
        energies = fgmp_energies(structure)
        modes = [f"{energies[mode]:.2f}" for mode in ("88", "48", "84", "44")]
        rows.append([structure, *modes, f"{100 * fgmp_saving(0.7, structure):.1f} %"])
    text = table(["multipliers", *names, "saved at 70 % FP4"], rows)
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
