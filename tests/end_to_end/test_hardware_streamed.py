"""Weights that do not fit come from outside: equal to the reference, cycles as predicted, every byte counted."""

import json
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow.folding import Limits
from mxloom.backends.dataflow.placement import loaded_bytes
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.simulation.verilator import environment, is_available, verilator
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.verification import Outcome, compare
from mxloom.compiler.command_line import main
from mxloom.compiler.hardware import Hardware, hardware
from mxloom.dialects.errors import UsageError

MODEL = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"
POSITIONS, WIDTH, HIDDEN, OUT = 6, 70, 100, 33
RUNS = 4


class Mlp(nn.Module):
    """A gated MLP with biases; sizes are no multiples of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


MIXED = "mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>"
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "mxint8": ({"weights": "mxint8", "activations": "mxint8"}, ""),
    "mxfp4": ({"weights": "mxfp4", "activations": "mxint8"}, ""),
    "nvfp4": ({"weights": "nvfp4", "activations": "nvfp4"}, ""),
    "f32": ({"weights": "mxint8", "activations": "mxint8"}, "{accumulator=f32 partials=4}"),
    "mixed": ({"weights": MIXED, "activations": MIXED, "weight_threshold": 0.0005, "activation_threshold": 0.1}, ""),
}


@cache
def typed(format: str = "mxint8") -> mxloom.Compiled:
    torch.manual_seed(0)
    rule, option = FORMATS[format]
    rule = {"kind": "linear", **rule} if format == "mixed" else rule
    recipe = {"version": 1, "quantize": [rule], "passes": [f"legalize-hardware{option}"]}
    example = torch.randn((2, POSITIONS, WIDTH), generator=torch.Generator().manual_seed(0))
    return mxloom.compile(Mlp().eval(), recipe, example={"x": example})


def outcomes(design: Hardware, *stalls: Stalls) -> list[Outcome]:
    given = design.vectors(RUNS)
    simulator = ArcSimulator(design.text, design.graph.input_streams, design.graph.output_streams)
    return [compare(simulator, design.graph, given, each) for each in stalls]


def check(design: Hardware) -> None:
    plain, stalled = outcomes(design, NO_STALLS, Stalls.random(0.2))
    assert plain.is_equal, plain
    assert stalled.is_equal, stalled
    assert plain.latency == design.timing.latency
    assert plain.interval == pytest.approx(design.timing.interval, abs=0.5)


def names(design: Hardware) -> list[str]:
    return [each.site.removesuffix(".scaled") for each in design.graph.streamed]  # NVFP4 names what its factor follows


def smallest(format: str) -> int:
    """Bytes that stay on chip with every weight outside: biases and the norm."""
    with pytest.raises(UsageError, match=r"the nearest is --memory \d+") as found:
        hardware(typed(format), memory=0)
    return int(str(found.value).rpartition(" ")[2])


@pytest.mark.parametrize(
    "format", ["mxfp4", *(pytest.param(each, marks=pytest.mark.slow) for each in FORMATS if each != "mxfp4")]
)
def test_a_design_without_weights_equals_the_reference(format: str) -> None:
    design = hardware(typed(format), memory=smallest(format))
    assert names(design) == ["gate", "up", "down"]
    linears = [node.stage for node in design.graph.nodes.values() if isinstance(node.stage, Contraction)]
    assert [(stage.rows, stage.columns) for stage in linears] == [(n, POSITIONS) for n in (HIDDEN, HIDDEN, OUT)]
    check(design)


def test_units_share_the_positions() -> None:
    """Two units take three positions each, and a weight passes in half the cycles."""
    design = hardware(typed(), memory=smallest("mxint8"), limits=Limits(cycles=1200))
    linears = [node.stage for node in design.graph.nodes.values() if isinstance(node.stage, Contraction)]
    assert [stage.copies for stage in linears] == [2, 2, 1]
    steps = -(-WIDTH // 32)
    assert [stage.cycles for stage in linears[:2]] == [HIDDEN * POSITIONS * steps // 2] * 2
    check(design)


def test_the_largest_weights_go_out_first() -> None:
    whole = hardware(typed())
    held = loaded_bytes(whole.graph)
    row = -(-WIDTH // 32) * 33  # a row of `gate` or `up`: beats of 32 numbers of 8 bits and a scale of 8
    assert names(hardware(typed(), memory=int(held))) == []
    design = hardware(typed(), memory=int(held) - 1)
    assert names(design) == ["gate"]
    assert [each.bits for each in design.graph.streamed] == [HIDDEN * row * 8]
    assert loaded_bytes(design.graph) == held - HIDDEN * row
    assert names(hardware(typed(), memory=int(held) - HIDDEN * row - 1)) == ["gate", "up"]


def test_a_corrupted_weight_on_its_way_is_noticed() -> None:
    design = hardware(typed(), memory=smallest("mxint8"))
    given = design.vectors(1)
    simulator = ArcSimulator(design.text, design.graph.input_streams, design.graph.output_streams)
    own = design.graph.streamed
    assert compare(simulator, design.graph, given).is_equal
    words = own[2].words.copy()
    words[5, 0] ^= 0x40
    own[2] = replace(own[2], words=words)
    assert compare(simulator, design.graph, given).mismatches


def emitted(folder: Path) -> Hardware:
    design = hardware(typed("mxfp4"), name="mlp", memory=smallest("mxfp4"))
    design.save(folder, design.vectors(2))
    return design


def test_what_comes_from_outside_is_told_and_counted(tmp_path: Path) -> None:
    design = emitted(tmp_path / "mlp")
    told, cost = (json.loads((tmp_path / "mlp" / name).read_text()) for name in ("interface.json", "cost.json"))
    beats = [n * -(-k // 32) for n, k in ((HIDDEN, WIDTH), (HIDDEN, WIDTH), (OUT, HIDDEN))]
    assert [(each["site"], each["beats"], each["bits"]) for each in told["weights"]] == [
        (site, count, 32 * 4 + 8) for site, count in zip(("gate", "up", "down"), beats, strict=True)
    ]
    for each, count in zip(told["weights"], beats, strict=True):
        assert (tmp_path / "mlp" / each["file"]).read_text().count("\n") == count
    total = sum(beats) * 17
    assert cost["streamed"]["total"]["bytes"] == total
    assert cost["streamed"]["total"]["dram_pj"] == [total * 8 * pj / 64 for pj in (1300, 2600)]
    assert cost["streamed"]["bytes_per_cycle"] == round(total / design.timing.interval, 3)


def test_the_commands_name_each_weight_and_what_it_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(typed().save(tmp_path / "typed"))
    assert main(["cost", folder, "--memory", str(smallest("mxint8"))]) == 0
    told = capsys.readouterr().out
    row, rows = 33, 3 * HIDDEN + 3 * HIDDEN + 4 * OUT
    assert f"note: gate: its weight comes from outside, {3 * HIDDEN * row:,} bytes for each input" in told
    assert f"note: weights, for every input: {rows * row:,} bytes from outside" in told
    for wrong in ("-1", "0"):
        assert main(["cost", folder, "--memory", wrong]) != 0
        assert "memory" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Verilator, make and a C++ compiler")
def test_the_emitted_folder_sends_the_weights_for_every_input(tmp_path: Path) -> None:
    emitted(tmp_path / "mlp")
    command = ["make", "sim", "lint", f"VERILATOR={verilator()}"]
    done = subprocess.run(command, cwd=tmp_path / "mlp", capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{2 * POSITIONS * OUT} beats, 0 mismatches, 0 violations" in done.stdout


def test_a_stream_carries_what_memories_held() -> None:
    """Codes and scales of a row are those of the loaded weight, beat by beat."""
    loaded, streamed = hardware(typed()), hardware(typed(), memory=smallest("mxint8"))
    for each in streamed.graph.streamed:
        node = next(n for n in loaded.graph.nodes.values() if n.site == each.site and isinstance(n.stage, Contraction))
        codes, scales, _ = node.fills
        assert (each.words == np.concatenate([codes, scales], 1)).all()


@pytest.mark.slow
def test_a_decoder_layer_with_its_weights_outside(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = {"version": 1, "quantize": [FORMATS["mxint8"][0]], "passes": ["legalize-hardware"]}
    folder = mxloom.compile(MODEL, recipe).save(tmp_path / "typed")
    command = ["simulate", str(folder), "--part", "model.layers.0", "--sequence", "4", "--memory", "60000"]
    assert main([*command, "--stalls", "0.1"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("arc: 0 mismatches in 1,536 beats")
    row = 192 // 32 * 33
    assert (
        f"note: model.layers.0.mlp.gate_proj: its weight comes from outside, {512 * row:,} bytes for each input" in told
    )
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arc"]["latency"] == found["predicted"]["latency"]
    assert found["arc"]["interval"] == pytest.approx(found["predicted"]["interval"], abs=0.5)
    assert main([*command[:-2], "--memory", "-1"]) != 0
    assert "memory" in capsys.readouterr().err
