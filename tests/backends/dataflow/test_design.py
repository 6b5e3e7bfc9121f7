"""A whole design: a normalized, gated MLP with mixed formats, against the reference."""

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mxloom.backends.dataflow.circt import export_verilog
from mxloom.backends.dataflow.emission import files
from mxloom.backends.dataflow.folding import Limits, fold, interval
from mxloom.backends.dataflow.graph import CONFIG, Graph
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.verilator import environment, verilator
from mxloom.backends.dataflow.verification import Vectors, compare, vectors
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.mx import parse_module

from .stages import STALLS, needs_verilator

X = "!mx.fixed<24, 12>"
INT8 = "!mx.block<32x!mx.fixed<8, 6>>"
FP4 = "!mx.block<32xf4E2M1FN>"
MLP = f"""
func.func @forward(%x: tensor<5x70x{X}>) -> tensor<5x70x{X}> attributes {{outputs = ["y"]}} {{
  %n = mx.parameter "n" : tensor<70xf32>
  %nf = mx.cast %n : tensor<70xf32> to tensor<70x!mx.fixed<16, 14>>
  %norm = mx.rms_norm %x, %nf, eps = 1.0e-6, integer = #mx.integer<8>
    : (tensor<5x70x{X}>, tensor<70x!mx.fixed<16, 14>>) -> tensor<5x70x{X}>
  %q = mx.cast %norm {{scale_rule = "floor"}} : tensor<5x70x{X}> to tensor<5x70x{INT8}>
  %g = mx.parameter "g" : tensor<100x70xf32>
  %gf = mx.cast %g {{scale_rule = "floor"}} : tensor<100x70xf32> to tensor<100x70x{INT8}>
  %u = mx.parameter "u" : tensor<100x70xf32>
  %uf = mx.cast %u {{scale_rule = "even"}} : tensor<100x70xf32> to tensor<100x70x{FP4}>
  %d = mx.parameter "d" : tensor<70x100xf32>
  %df = mx.cast %d {{scale_rule = "floor"}} : tensor<70x100xf32> to tensor<70x100x{INT8}>
  %gate = mx.linear %q, %gf, window = #mx.window<36, -20>
    : (tensor<5x70x{INT8}>, tensor<100x70x{INT8}>) -> tensor<5x100x{X}>
  %up = mx.linear %q, %uf, window = #mx.window<36, -20>
    : (tensor<5x70x{INT8}>, tensor<100x70x{FP4}>) -> tensor<5x100x{X}>
  %s = mx.silu %gate, integer = #mx.integer<9> : (tensor<5x100x{X}>) -> tensor<5x100x{X}>
  %m = mx.mul %s, %up : (tensor<5x100x{X}>, tensor<5x100x{X}>) -> tensor<5x100x{X}>
  %mq = mx.cast %m {{scale_rule = "floor"}} : tensor<5x100x{X}> to tensor<5x100x{INT8}>
  %down = mx.linear %mq, %df, window = #mx.window<36, -20>
    : (tensor<5x100x{INT8}>, tensor<70x100x{INT8}>) -> tensor<5x70x{X}>
  %y = mx.add %x, %down : (tensor<5x70x{X}>, tensor<5x70x{X}>) -> tensor<5x70x{X}>
  func.return %y : tensor<5x70x{X}>
}}"""


@cache
def weights() -> WeightStore:
    generator = torch.Generator().manual_seed(0)
    return WeightStore.from_state_dict(
        {
            "n": torch.rand(70, generator=generator) + 0.5,
            "g": torch.randn(100, 70, generator=generator) / 8,
            "u": torch.randn(100, 70, generator=generator) / 8,
            "d": torch.randn(70, 100, generator=generator) / 8,
        }
    )


def design(limits: Limits | None = None) -> Graph:
    graph = lower(parse_module(MLP), weights())
    fold(graph, limits or Limits())
    graph.add_forks()
    graph.add_queues()
    return graph


@cache
def built() -> tuple[Graph, str, ArcSimulator, Vectors]:
    graph = design()
    text = circuit_text(graph.module("mlp"))
    generator = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(5, 70, generator=generator) * 2,) for _ in range(8)]
    found = vectors(parse_module(MLP), weights(), graph, inputs)
    return graph, text, ArcSimulator(text, graph.input_streams, graph.output_streams), found


@pytest.mark.parametrize("stall", STALLS)
def test_eight_inputs_in_a_row_equal_the_reference(stall: str) -> None:
    graph, _, simulator, given = built()
    outcome = compare(simulator, graph, given, STALLS[stall])
    assert outcome.is_equal, outcome
    assert outcome.beats == 8 * 5 * 70


def test_the_interval_is_near_that_of_the_slowest_stage() -> None:
    """Each stage alone takes what its formula says; together they wait for one another a little."""
    graph, _, simulator, given = built()
    assert interval(graph) <= compare(simulator, graph, given).interval <= 1.1 * interval(graph)


def test_folding_meets_a_limit_of_cycles_and_says_the_nearest() -> None:
    graph = design(Limits(cycles=800))
    assert interval(graph) <= 800
    simulator = ArcSimulator(circuit_text(graph.module("mlp")), graph.input_streams, graph.output_streams)
    outcome = compare(simulator, graph, built()[3])
    assert outcome.is_equal
    assert interval(graph) <= outcome.interval <= 1.2 * interval(graph)
    with pytest.raises(UsageError, match=r"no folding gives an input every 10 cycles: .* the nearest is cycles=\d+"):
        design(Limits(cycles=10))


def test_what_has_no_hardware_is_named() -> None:
    text = MLP.replace("mx.silu %gate, integer = #mx.integer<9>", "mx.exp %gate")
    with pytest.raises(MxloomError, match=r"s \(mx.exp\): the operation has no hardware"):
        lower(parse_module(text), weights())
    with pytest.raises(MxloomError, match=r"up \(mx.linear\): it states no window"):
        lower(parse_module(MLP.replace(", window = #mx.window<36, -20>", "")), weights())


@cache
def emitted() -> dict[str, str]:
    graph, _, _, given = built()
    return files(graph, "mlp", given, {})


def write(folder: Path, **changes: Any) -> None:
    for name, text in {**emitted(), **changes}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def make(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    command = ["make", target, f"VERILATOR={verilator()}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment())


@needs_verilator
def test_the_emitted_folder_checks_itself_under_verilator(tmp_path: Path) -> None:
    write(tmp_path)
    done = make(tmp_path, "sim")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{8 * 5 * 70} beats, 0 mismatches, 0 violations" in done.stdout
    wrong = (tmp_path / "vectors/y.mem").read_text().splitlines()
    wrong[5] = f"{int(wrong[5], 16) ^ 1:06x}"
    (tmp_path / "vectors/y.mem").write_text("\n".join(wrong) + "\n")
    assert make(tmp_path, "sim").returncode != 0


@needs_verilator
def test_the_emitted_text_is_clean_under_verilators_lint(tmp_path: Path) -> None:
    write(tmp_path)
    done = make(tmp_path, "lint")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_interface_says_what_stands_at_the_ports() -> None:
    told = json.loads(emitted()["interface.json"])
    assert [each["stream"] for each in told["inputs"] + told["outputs"]] == ["x", "y"]
    assert told["inputs"][0]["format"] == "fixed<24, 12>"
    assert told["configuration"]["stream"] == CONFIG
    assert sum(m["depth"] for s in told["configuration"]["stages"] for m in s["memories"]) == len(
        built()[0].configuration()
    )


def test_circt_refuses_without_taking_the_program_down() -> None:
    with pytest.raises(MxloomError, match="CIRCT refused the design in step parse"):
        export_verilog("hw.module @a(in %x : i1, out y : i2) { hw.output %x : i1 }")
