"""What cannot be built is told with its place and with what could be; hostile names break no text, leave no folder."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow import circt, packages
from mxloom.backends.dataflow.circt import arc_model, export_verilog
from mxloom.backends.dataflow.cost.design import resources
from mxloom.backends.dataflow.folding import Limits
from mxloom.backends.dataflow.graph import CONFIG, Graph
from mxloom.backends.dataflow.keywords import RESERVED, port_name
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.verilator import environment, verilator
from mxloom.backends.dataflow.sizing import fit
from mxloom.backends.dataflow.stages.route import Fifo
from mxloom.backends.weight_store import WeightStore
from mxloom.compiler.command_line import main
from mxloom.compiler.hardware import hardware
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.mx import parse_module

from .stages import needs_verilator
from .test_design import MLP, X, weights

TEXT = circuit_text(Fifo(8, 2, 10).module("queue"))


def function(arguments: str, result: str, lines: str, value: str, output: str = "y") -> str:
    """A function of these lines that gives a value back."""
    return (
        f'func.func @f({arguments}) -> {result} attributes {{outputs = ["{output}"]}} {{\n'
        f"{lines}\nfunc.return %{value} : {result}\n}}"
    )


def design() -> Graph:
    graph = lower(parse_module(MLP), weights())
    graph.add_forks()
    graph.add_queues()
    return graph


# Limits that no folding meets.


def refused(limits: Limits) -> str:
    with pytest.raises(UsageError) as told:
        fit(design(), limits, resources)
    return str(told.value)


def test_too_few_cycles_name_the_nearest_which_can_be_had() -> None:
    message = refused(Limits(cycles=100))
    found = re.fullmatch(
        r"no folding gives an input every 100 cycles: (\w+) takes (\d+), however wide; the nearest is cycles=(\d+)",
        message,
    )
    assert found is not None, message
    nearest = int(found[3])
    assert int(found[2]) <= nearest
    assert fit(design(), Limits(cycles=nearest), resources).interval <= nearest
    assert f"the nearest is cycles={nearest}" in refused(Limits(cycles=nearest - 1))


def test_too_few_luts_name_what_the_narrowest_design_takes() -> None:
    message = refused(Limits(luts=2_000))
    found = re.fullmatch(r"the narrowest design takes ([\d,]+) LUTs and [\d,]+ um2, more than 2,000 LUTs", message)
    assert found is not None, message
    needed = int(found[1].replace(",", ""))
    assert needed > 2_000
    graph = design()
    fit(graph, Limits(luts=2 * needed), resources)
    assert 0.5 * needed < (resources(graph).luts or 0) <= 2 * needed


def test_too_little_area_is_told_in_its_unit() -> None:
    assert re.fullmatch(
        r"the narrowest design takes [\d,]+ LUTs and [\d,]+ um2, more than 1 um2", refused(Limits(area_um2=1))
    )


def test_cycles_that_take_more_than_the_luts_name_the_nearest_within() -> None:
    graph = design()
    fit(graph, Limits(), resources)
    narrowest = ceil(resources(graph).luts or 0)
    limits = Limits(cycles=800, luts=narrowest + 500)
    message = refused(limits)
    found = re.fullmatch(
        r"no folding gives an input every 800 cycles: a faster one takes more than .*; the nearest is cycles=(\d+)",
        message,
    )
    assert found is not None, message
    nearest = int(found[1])
    assert nearest > 800 and fit(graph, replace(limits, cycles=nearest), resources).interval <= nearest


# Names.

HOSTILE = ["module", "a/b", "../../up", "$finish", 'quote"', "line\nbreak", "`define x", "\\slash", "1st", "endmodule"]


class Hostile(nn.Module):
    """Layers under names that Verilog, shells or file systems read otherwise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in HOSTILE if "." not in name})

    def forward(self, input: Tensor, wire: Tensor, wire_stream: Tensor) -> tuple[Tensor, Tensor]:
        x = input
        for layer in self.layers.values():
            x = torch.relu(layer(x))
        return x + wire, x - wire_stream


RECIPE = {
    "version": 1,
    "quantize": [{"weights": "mxint8", "activations": "mxint8"}],
    "passes": ["legalize-hardware"],
}


@pytest.fixture(scope="module")
def hostile() -> mxloom.Compiled:
    generator = torch.Generator().manual_seed(0)
    example = {name: torch.randn(2, 8, generator=generator) for name in ("input", "wire", "wire_stream")}
    return mxloom.compile(Hostile().eval(), RECIPE, example=example)


def test_hostile_names_become_legal_ones_in_every_file(hostile: mxloom.Compiled, tmp_path: Path) -> None:
    made = hardware(hostile)
    folder = made.save(tmp_path / "inside" / "out", made.vectors(1))
    names = [each.name for each in (*made.graph.inputs, *made.graph.outputs)]
    assert len(set(names)) == 5 and not set(names) & RESERVED
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert [path.name for path in (tmp_path / "inside").iterdir()] == ["out"]
    for path in folder.rglob("*"):
        assert re.fullmatch(r"[\w.]+", path.name, re.A), path
    for path in folder.glob("rtl/*.sv"):
        text = path.read_text()
        declared = re.findall(r"^module (\S+)\(", text, re.M)
        assert declared == [path.stem], "one module a file, and the file's name is its own"
        named = re.findall(r"^\s*(?:input|output|wire|reg|logic)\s+(?:\[\S+\]\s*)?(\S+?)[,;\s=\[]", text, re.M)
        wrong = [each for each in named if not re.fullmatch(r"[A-Za-z_]\w*", each, re.A) or each in RESERVED]
        assert wrong == [], path.name
        assert not re.search(r'[`\\"]|\$(?!signed|unsigned)', text), path.name


@pytest.mark.slow
@needs_verilator
def test_hostile_names_are_simulated_and_clean(hostile: mxloom.Compiled, tmp_path: Path) -> None:
    made = hardware(hostile)
    folder = made.save(tmp_path / "out", made.vectors(1))
    for target in ("lint", "sim"):
        command = ["make", target, f"VERILATOR={verilator()}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment())
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


OWN = ["clk", "rst", CONFIG, "cycle", "mismatches", "violations", "tail", "seed", "dut", "bench", "STALL", "LIMIT",
       "x_valid", "x_ready", "x_words", "x_place", "x_takes", "x_waits", "x_before", "rounds"]  # fmt: skip
"""What a design or its test bench declares itself."""


@pytest.mark.parametrize("name", [*HOSTILE, *OWN, "", "_", "ä", "a" * 300])
def test_streams_have_names_that_nothing_else_has(name: str) -> None:
    found = port_name(name)
    assert re.fullmatch(r"[A-Za-z]\w*", found, re.A)
    assert found not in RESERVED and found not in OWN


def test_inputs_whose_names_become_one_are_told_apart() -> None:
    shape = f"tensor<4x{X}>"
    names = ("wire", "wire_stream", "cycle", "x", "x_place")
    arguments = ", ".join(f"%{name}: {shape}" for name in names)
    sums, last = "", "wire"
    for index, name in enumerate(names[1:]):
        sums += f"  %s{index} = mx.add %{last}, %{name} : ({shape}, {shape}) -> {shape}\n"
        last = f"s{index}"
    text = function(arguments, shape, sums.rstrip(), last, "../y")
    graph = lower(parse_module(text), WeightStore())
    found = [each.name for each in (*graph.inputs, *graph.outputs)]
    assert len(set(found)) == 6
    assert "module top(" in export_verilog(circuit_text(graph.module("top")))


# Programs and packages that are missing or end.


def test_without_circt_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(circt, "find_spec", lambda name: None)
    for run in (export_verilog, arc_model):
        with pytest.raises(MxloomError, match=r'CIRCT, which is not installed: pip install "mxloom\[hardware\]"'):
            run(TEXT)


@pytest.mark.parametrize(
    ("package", "build"),
    [("networkx", design), ("llvmlite", lambda: ArcSimulator(TEXT, {"in": 8}, {"out": 8}))],
)
def test_packages_that_are_missing_are_named(
    package: str, build: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(name: str) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(name)
        return __import__(name)

    monkeypatch.setattr(packages, "import_module", without)
    with pytest.raises(MxloomError, match=rf'{package}, which is not installed: pip install "mxloom\[hardware\]"'):
        build()


def standing_in(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a shell script be what runs CIRCT."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(circt.sys, "executable", str(program))


def test_a_crash_of_circt_is_an_error_that_names_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel is built with assertions, which end its process: by signal 6, a line of the assertion before."""
    script = 'echo "step: arcs" >&2; echo "Foo.cpp:12: Assertion bar failed." >&2; kill -ABRT $$'
    standing_in(script, tmp_path, monkeypatch)
    with pytest.raises(MxloomError, match=r"CIRCT ended by signal 6 in step arcs: Foo.cpp:12: Assertion bar failed"):
        arc_model(TEXT)
    with pytest.raises(MxloomError, match="CIRCT ended by signal 6 in step arcs"):
        export_verilog(TEXT)


@pytest.mark.parametrize(
    ("script", "message"),
    [("exit 0", "CIRCT gave nothing"), ("kill -SEGV $$", "CIRCT ended by signal 11"), ("exit 3", "refused")],
)
def test_however_circt_ends_the_program_goes_on(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standing_in(script, tmp_path, monkeypatch)
    with pytest.raises(MxloomError, match=message):
        export_verilog(TEXT)


def test_circt_that_never_ends_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standing_in("exec sleep 60", tmp_path, monkeypatch)
    monkeypatch.setattr(circt, "SECONDS", 0.2)
    with pytest.raises(MxloomError, match=r"CIRCT took more than 0.2 s for \d+ characters of hw; stopped"):
        export_verilog(TEXT)


def test_a_real_assertion_of_circt_is_survived() -> None:
    """A loop without a register: arc's passes give up on it, in whatever way."""
    lines = "%0 = comb.and %x, %1 : i1\n%1 = comb.or %x, %0 : i1\nhw.output %0 : i1"
    loop = f"hw.module @a(in %x : i1, out y : i1) {{ {lines} }}"
    with pytest.raises(MxloomError, match="CIRCT"):
        arc_model(loop)
    assert "module queue" in export_verilog(TEXT)


# Operations, shapes and windows.

REFUSED = {
    "two shapes": (
        f"%y = mx.add %x, %b : (tensor<3x4x{X}>, tensor<4x{X}>) -> tensor<3x4x{X}>",
        f"%x: tensor<3x4x{X}>, %b: tensor<4x{X}>",
        f"tensor<3x4x{X}>",
        r"y \(mx.add\): operands of shapes \(3, 4\) and \(4,\): hardware needs one shape",
    ),
    "a quotient": (
        f"%y = mx.div %x, %b : (tensor<4x{X}>, tensor<4x{X}>) -> tensor<4x{X}>",
        f"%x: tensor<4x{X}>, %b: tensor<4x{X}>",
        f"tensor<4x{X}>",
        r"y \(mx.div\): streams are divided by no hardware",
    ),
    "an operation": (
        f"%y = mx.exp %x : (tensor<4x{X}>) -> tensor<4x{X}>",
        f"%x: tensor<4x{X}>",
        f"tensor<4x{X}>",
        r"y \(mx.exp\): the operation has no hardware",
    ),
    "a function in floats": (
        f"%y = mx.silu %x : (tensor<4x{X}>) -> tensor<4x{X}>",
        f"%x: tensor<4x{X}>",
        f"tensor<4x{X}>",
        r"y \(mx.silu\): it is not computed in integers: run the pass legalize-hardware first",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_hardware_is_named_with_its_place(name: str) -> None:
    line, arguments, result, message = REFUSED[name]
    text = function(arguments, result, line, "y")
    with pytest.raises(MxloomError, match=message):
        lower(parse_module(text), WeightStore())


def test_every_fault_is_told_at_once() -> None:
    lines = "\n".join(f"%{b} = mx.exp %{a} : (tensor<4x{X}>) -> tensor<4x{X}>" for a, b in ("xp", "pq", "qy"))
    text = function(f"%x: tensor<4x{X}>", f"tensor<4x{X}>", lines, "y")
    with pytest.raises(MxloomError) as told:
        lower(parse_module(text), WeightStore())
    assert [line.split()[0] for line in str(told.value).splitlines()[1:]] == ["p", "q", "y"]


def test_a_window_that_is_too_narrow_offers_the_width_it_needs() -> None:
    first = nn.Linear(16, 16)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        first.weight.mul_(100)
    example = {"input": torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * 10}

    def compiled(window: int) -> mxloom.Compiled:
        recipe = {**RECIPE, "passes": [f"legalize-hardware{{window={window}}}"]}
        return mxloom.compile(model.eval(), recipe, example=example)

    with pytest.raises(MxloomError) as told:
        compiled(16)
    message = str(told.value)
    found = re.search(r"  0: a window of 16 bits does not hold .* it needs (\d+) bits, window=\1", message)
    assert found is not None, message
    needed = max(int(each) for each in re.findall(r"window=(\d+)", message))
    assert hardware(compiled(needed)).graph.nodes


def test_the_command_line_writes_nothing_where_it_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(__file__).parents[3] / "examples" / "models" / "kjv-2m"
    assert main(["emit", str(model), "--out", str(tmp_path / "out"), "--name", "a/../b"]) != 0
    assert "name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert sys.exc_info() == (None, None, None)
