"""Models as hardware from the command line: the emitted folder, simulation against the reference, and bad input."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

import mxloom
from mxloom.backends.dataflow.graph import CONFIG
from mxloom.backends.dataflow.verification import on_grid
from mxloom.backends.reference import Interpreter
from mxloom.compiler.command_line import main
from mxloom.compiler.hardware import hardware
from mxloom.dialects.errors import MxloomError, UsageError

MODEL = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"
PART = "model.layers.1"


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = {
        "version": 1,
        "quantize": [{"weights": "mxint8", "activations": "mxint8"}],
        "passes": ["legalize-hardware"],
    }
    return mxloom.compile(MODEL, recipe).save(tmp_path_factory.mktemp("hardware") / "typed")


def test_simulating_a_part_finds_no_mismatch(typed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The part lies behind others: its inputs are those that the model itself computes."""
    assert main(["simulate", str(typed), "--part", PART, "--sequence", "3", "--vectors", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["arc"]["is_equal"] and told["arc"]["beats"] == 3 * 3 * 192


def test_a_part_rounds_what_it_reads_itself(typed: Path) -> None:
    """What comes from outside is a stream of fixed-point numbers, though the part's linear layers read blocks."""
    made = hardware(mxloom.load(typed), f"{PART}.mlp", positions=2)
    assert [(each.name, each.shape, each.point.width) for each in made.graph.inputs] == [
        ("model_layers_1_post_attention_layernorm", (1, 2, 192), 24)
    ]


def test_an_emitted_folder_is_whole_and_replaced_alone(
    typed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mlp"
    command = ["emit", str(typed), "--part", PART, "--sequence", "2", "--name", "mlp", "--out", str(out)]
    assert main(command) == 0
    assert main(command) == 0, "an emitted design is replaced"
    told, cost = (json.loads((out / name).read_text()) for name in ("interface.json", "cost.json"))
    assert (told["top"], told["part"], told["positions"]) == ("mlp", PART, 2)
    assert {stage["name"] for stage in told["stages"]} == {stage["name"] for stage in cost["stages"]}
    assert cost["slowest"]["cycles"] == max(stage["cycles"] for stage in told["stages"]) == cost["interval_cycles"]
    assert (out / "rtl" / "mlp.sv").is_file() and (out / "vectors" / f"{CONFIG}.mem").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["mlp"]
    capsys.readouterr()
    (out / "notes.txt").write_text("mine")
    assert main(command) != 0, "what is not the design's is not removed"
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert main(["simulate", str(out), "--sequence", "2"]) != 0
    assert "is an emitted design, whose vectors `make sim` runs in it" in capsys.readouterr().err
    for tool in ("lint", "synth", "sim"):
        made = subprocess.run(
            ["make", tool, "VERILATOR=", "IVERILOG=", "YOSYS="], cwd=out, capture_output=True, text=True, check=False
        )
        assert made.returncode != 0 and "install" in made.stderr, tool
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.tex").write_text("mine")
    assert main([*command[:-1], str(tmp_path / "own")]) != 0
    assert "holds files that are no emitted design; nothing was overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["thesis.tex"]


def test_positions_of_a_causal_layer_do_not_see_what_fills_up_a_sequence(typed: Path) -> None:
    made = hardware(mxloom.load(typed), PART, positions=5)
    interpreter = Interpreter(made.module, made.model.weights)
    x = on_grid(torch.randn(1, 5, 192, generator=torch.Generator().manual_seed(0)), made.graph.inputs[0].point)
    (whole,), (filled,) = interpreter(x), interpreter(torch.cat([x[:, :3], torch.zeros(1, 2, 192)], 1))
    assert torch.equal(whole[:, :3], filled[:, :3]) and not torch.equal(whole, filled)


def test_what_a_part_costs_is_told_site_by_site(typed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["cost", str(typed), "--part", f"{PART}.mlp", "--sequence", "2", "--clock", "200"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # gate and up: 2 x 512 outputs of 192 / 32 beats, down: 192 outputs of 512 / 32 beats
    assert told["total"]["macs"] == 2 * 3 * 192 * 512 and told["interval_cycles"] == 2 * 512 * 192 / 32
    assert told["inputs_per_second"] == pytest.approx(200e6 / told["interval_cycles"])
    for key in ("area_nand2", "area_um2"):
        assert told["total"][key] == pytest.approx(sum(stage[key] for stage in told["stages"]), rel=1e-4)
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    sites = {stage["site"] for stage in told["stages"]}
    rows = {row[0]: row for row in (line.replace(" *", "").split() for line in lines) if row[0] in {*sites, "total"}}
    assert rows.keys() == {*sites, "total"}
    numbers = [[float(cell.replace(",", "")) for cell in row[1:]] for site, row in rows.items() if site != "total"]
    assert sum(row[2] for row in numbers) == float(rows["total"][3].replace(",", "")) == told["total"]["macs"]
    assert main([*command, "--top", "2"]) == 0
    assert f"note: {len(sites) - 2} more sites are in the total" in capsys.readouterr().out
    for option in (["--clock", "0"], ["--top", "0"]):
        assert main([*command, *option]) == 2


@pytest.mark.parametrize(
    "name", ["module", "bench", "clk", "load", "x_valid", "../up", "a/b", 'a"b', "a\nb", "$x", "1st", "", "ä"]
)
def test_names_that_verilog_does_not_take_are_refused(typed: Path, name: str) -> None:
    with pytest.raises(UsageError, match="name"):
        hardware(mxloom.load(typed), PART, name=name, positions=2)


def test_a_saved_plain_module_is_simulated_on_random_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    recipe = {"quantize": [{"weights": "mxint8", "activations": "mxint8"}], "passes": ["legalize-hardware"]}
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    mxloom.compile(model, recipe, example={"input": torch.randn(2, 32)}).save(tmp_path / "mlp")
    assert main(["simulate", str(tmp_path / "mlp"), "--sequence", "1", "--vectors", "4"]) == 0
    told = capsys.readouterr().out
    assert "0 mismatches in 16 beats" in told and "vectors are random numbers" in told
    assert main(["emit", str(tmp_path / "mlp"), "--sequence", "1", "--out", str(tmp_path / "design")]) == 0
    with pytest.raises(UsageError, match='"input_stream" is a stream or a stage of the design itself'):
        hardware(mxloom.load(tmp_path / "mlp"), positions=1, name="input_stream")


def test_what_cannot_be_built_is_said(typed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=r"no operation belongs to 'model.layers.7'"):
        hardware(mxloom.load(typed), "model.layers.7", positions=2)
    with pytest.raises(MxloomError, match=r"(?s)\"input_ids\" is tensor<1x2xi64>: streams carry.*--part"):
        hardware(mxloom.load(typed), positions=2)
    wide = mxloom.compile(MODEL, weights="mxint8", activations="mxint8")
    with pytest.raises(MxloomError, match="compile the model with the pass legalize-hardware"):
        hardware(wide, PART, positions=2)
    common = ["simulate", str(typed), "--part", PART, "--sequence", "2"]
    assert main([*common, "--cycles", "3"]) != 0
    assert "no folding gives an input every 3 cycles" in capsys.readouterr().err
    assert main([*common, "--luts", "10"]) != 0
    assert "the narrowest design takes" in capsys.readouterr().err
