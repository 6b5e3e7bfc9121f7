"""Field cases H2 and H3 on every stage: signed and unsigned numbers in all tools, and beats that wait."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import mxloom
from mxloom.backends.dataflow import verification
from mxloom.backends.dataflow.circt import export_verilog
from mxloom.backends.dataflow.cost.synthesis import yosys
from mxloom.backends.dataflow.graph import Graph
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation import verilator as module_of_verilator
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Phase, Stalls, words
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator
from mxloom.backends.dataflow.stages._stream import StreamModule
from mxloom.compiler.hardware import hardware

from .examples import EXAMPLES, Example, differences, example, kinds, phases, side_by_side
from .stages import STALLS, needs_verilator, simulator
from .test_simulation import multiplier

MODEL = Path(__file__).parents[3] / "examples" / "models" / "kjv-2m"


def test_every_stage_has_an_example() -> None:
    """Whoever adds a stage adds an example: the tests here and the faults then hold for it, too."""
    assert {type(example(name).stage) for name in EXAMPLES} == kinds()


@cache
def panel() -> tuple[Graph, dict[str, Example], str]:
    """All examples in one design, and its circuit."""
    examples = {name: example(name) for name in EXAMPLES}
    graph = side_by_side(examples)
    return graph, examples, circuit_text(graph.module("panel"))


@cache
def arc() -> ArcSimulator:
    graph, _, text = panel()
    return ArcSimulator(text, graph.input_streams, graph.output_streams)


# H2: signed and unsigned numbers, in the printed text and in what Yosys makes of it.


def through_yosys(text: str, top: str, folder: Path) -> str:
    """Exported SystemVerilog as Yosys understands it, under the header that it had."""
    (folder / "design.sv").write_text(text)
    script = f"read_verilog -sv design.sv; prep -top {top}; rename {top} {top}_read; write_verilog -noattr read.v"
    done = subprocess.run([*yosys(), "-q", "-p", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    header = re.search(rf"^module {top}\(.*?\);", text, re.M | re.S)
    assert header is not None
    return f"{(folder / 'read.v').read_text()}\n{header[0]}\n  {top}_read dut(.*);\nendmodule\n"


@pytest.mark.slow
@needs_verilator
def test_every_stage_starts_from_random_bits() -> None:
    """What registers and memories hold before the reset changes nothing; the printed text means the same numbers."""
    graph, examples, text = panel()
    device = VerilatorSimulator(text, graph.input_streams, graph.output_streams)
    for device.start in (0, 1, 2, 3):
        for stall in (NO_STALLS, Stalls.random(0.5, seed=12345 + device.start)):
            run = device.run(phases(graph, examples), stall)
            assert list(differences(run, examples)) == [], device.start


@pytest.mark.slow
@needs_verilator
@pytest.mark.parametrize("what", ["every stage", "products"])
def test_yosys_reads_the_same_numbers(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module_of_verilator,
        "export_verilog",
        lambda text: through_yosys(export_verilog(text), "panel" if what == "every stage" else "multiply", tmp_path),
    )
    if what == "products":
        case = multiplier()
        found = VerilatorSimulator(case.text, case.inputs, case.outputs).run([Phase(case.given, {"out": 256})])
        np.testing.assert_array_equal(found.outputs["out"], case.expected["out"])
        return
    graph, examples, text = panel()
    device = VerilatorSimulator(text, graph.input_streams, graph.output_streams)
    for device.start in (0, 5):
        assert list(differences(device.run(phases(graph, examples)), examples)) == []


@needs_verilator
@pytest.mark.slow
def test_random_starts_reach_registers_and_memories() -> None:
    """A register that is never set, and a memory that is never written, show their first bits."""
    module = StreamModule("start", {"in": 8}, {"out": 128})
    register = module.register(64, "kept", initial=None)
    register.set(register.q)
    word = module.memory(
        4, read=module["in"].low(2), write=module["in"].low(2), data=register.q, enable=module["in"].bit(7)
    )
    data = register.q.unsigned(128) + (word.unsigned(128) * module.constant(1 << 64, 128))
    text = circuit_text(module.close({"in": module.ready("out")}, {"out": (module.valid("in"), data)}))
    device, found = VerilatorSimulator(text, {"in": 8}, {"out": 128}), list[int]()
    for device.start in (0, 1, 2):
        found += device.run([Phase({"in": words([1], 8)}, {"out": 1})]).numbers("out")
    assert found[0] == 0
    assert len({number & ((1 << 64) - 1) for number in found}) == len({number >> 64 for number in found}) == 3


# H3: what is valid stays.


@pytest.mark.parametrize("stall", STALLS)
def test_beats_that_wait_stay_in_every_stage(stall: str) -> None:
    graph, examples, _ = panel()
    assert list(differences(arc().run(phases(graph, examples), STALLS[stall]), examples)) == []


def test_every_stages_first_beats_wait() -> None:
    """Ready is low for five cycles from each stage's first beat on, and from its fourth, whenever these come."""
    graph, examples, _ = panel()
    free = arc().run(phases(graph, examples))
    for name, each in examples.items():
        for stream in each.expected:
            cycles = free.given[f"{name}_{stream}"]
            for start in (int(cycles[0]), int(cycles[min(3, len(cycles) - 1)])):
                run = arc().run(phases(graph, examples), Stalls(window=(start, start + 5)))
                assert list(differences(run, examples)) == [], f"{name} from cycle {start}"
                assert int(run.given[f"{name}_{stream}"][-1]) >= start + 5


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_stage_alone_keeps_its_beats(name: str) -> None:
    """Each stage as a design of its own, its memories filled before: all ways of stalling from the first cycle on."""
    each = example(name)
    device = simulator(each.stage)
    if each.load is not None:
        device.run([Phase({"load": each.load})])
    for stall in STALLS.values():
        run = device.run([Phase(each.given, each.counts)], stall)
        assert (run.violations, run.surplus) == (0, 0)
        for stream, beats in each.expected.items():
            np.testing.assert_array_equal(run.outputs[stream], beats)


@pytest.mark.slow
def test_beats_that_wait_stay_in_a_whole_layer() -> None:
    """A decoder layer of the embedded model with its real weights: as many beats, in their order, with their bits."""
    recipe = {
        "version": 1,
        "quantize": [{"weights": "mxfp4", "activations": "mxint8"}],
        "passes": ["legalize-hardware"],
    }
    made = hardware(mxloom.compile(MODEL, recipe), "model.layers.0", positions=3)
    device = ArcSimulator(made.text, made.graph.input_streams, made.graph.output_streams)
    given = made.vectors(2)
    free = device.run(verification.phases(made.graph, given))
    (cycles,) = free.given.values()
    assert len(cycles) == 2 * 3 * 192
    first = Stalls(window=(int(cycles[0]), int(cycles[0]) + 5))
    for stall in (*STALLS.values(), first):
        assert verification.compare(device, made.graph, given, stall).is_equal, stall
