"""Measures what units switch, in each pair of formats and each mode of a unit for FP4 and FP8, and writes it down.

python benchmarks/hardware_energy.py          # runs Yosys (10 units, minutes): backends/dataflow/cost/switching.json
python benchmarks/hardware_energy.py --check  # fails where the file is not what a new measurement gives
"""

from __future__ import annotations

import json
import sys

from hardware_cost_table import PAGE, fgmp
from page import write_section

from mxloom.backends.dataflow.cost import energy
from mxloom.backends.dataflow.cost.measurements import own_measurements, read_measurements
from mxloom.backends.dataflow.cost.switching import switched


def main() -> int:
    found = switched(lambda text: print(text, file=sys.stderr, flush=True))
    text = json.dumps(found, indent=1) + "\n"
    if "--check" in sys.argv:
        return int(energy.SWITCHING.read_text(encoding="utf-8") != text)
    energy.SWITCHING.write_text(text, encoding="utf-8")
    energy.switching.cache_clear()
    section = fgmp(read_measurements(own_measurements()))
    write_section(PAGE, "Mixed FP4 and FP8 (FGMP)", section)
    print(section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
