"""The comparison that finds no mismatch finds every fault: in memories, in scales, in the text of the circuit.

Each fault is one whose meaning is known: the reference with the same fault gives the same beats as the faulty design,
so that what is found, and where, is what must be found.
"""

from __future__ import annotations

import random
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.emission import files, memory_text
from mxloom.backends.dataflow.graph import CONFIG, Graph
from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls, words_to_numbers
from mxloom.backends.dataflow.simulation.verilator import environment, verilator
from mxloom.backends.dataflow.verification import Outcome, Vectors, compare, vectors
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import Rounding, quantize
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Table
from mxloom.dialects.mx import parse_module

from .examples import EXAMPLES, differences, example, phases, side_by_side
from .stages import needs_verilator
from .test_design import MLP
from .test_design import weights as drawn

FORMATS = {"g": ("mxint8", "floor"), "u": ("mxfp4", "even"), "d": ("mxint8", "floor")}
Tensors = dict[str, torch.Tensor]


@cache
def parameters() -> Tensors:
    """The layer's parameters, on the grids of their formats already: rounding them again changes nothing."""
    found = {name: drawn().wide(name) for name in "ngud"}
    for name, (format, rule) in FORMATS.items():
        found[name] = quantize(found[name], format_of(format, rank=2), Rounding(scale_rule=rule)).float()
    found["n"] = (found["n"] * 2.0**14).round() * 2.0**-14
    return found


def store(changed: Tensors | None = None) -> WeightStore:
    return WeightStore.from_state_dict({**parameters(), **(changed or {})})


def design(changed: Tensors | None = None, text: str = MLP) -> Graph:
    graph = lower(parse_module(text), store(changed))
    graph.add_forks()
    graph.add_queues()
    return graph


def expected(graph: Graph, changed: Tensors | None = None, text: str = MLP) -> Vectors:
    generator = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(5, 70, generator=generator) * 2,) for _ in range(2)]
    return vectors(parse_module(text), store(changed), graph, inputs)


@cache
def right() -> tuple[Graph, str, ArcSimulator, Vectors]:
    graph = design()
    text = circuit_text(graph.module("mlp"))
    device = ArcSimulator(text, graph.input_streams, graph.output_streams)
    given = expected(graph)
    assert compare(device, graph, given).is_equal
    return graph, text, device, given


def check(outcome: Outcome, meant: Vectors) -> None:
    """What was found is what a reference with the fault says: so many beats, and the first of them by its place."""
    found, correct = meant.outputs["y"], right()[3].outputs["y"]
    wrong = (found != correct).any(-1)
    assert wrong.any(), "a fault that changes no beat shows nothing"
    assert (outcome.mismatches, outcome.missing) == (int(wrong.sum()), 0)
    place = int(wrong.argmax())
    numbers = [words_to_numbers(each[place : place + 1])[0] for each in (found, correct)]
    assert outcome.first_difference == f"beat {place} of y: {numbers[0]:#x}, the reference says {numbers[1]:#x}"


def one_number(name: str) -> Tensors:
    """One number of a parameter becomes another one of its format; no block's largest, so that no scale moves."""
    tensor = parameters()[name].clone()
    if name == "n":
        tensor[11] = -tensor[11]
        return {name: tensor}
    row = tensor[3, :32]
    place = int((row.abs() + (row == 0) * 9 + (row == row.abs().max()) * 9).argmin())
    tensor[3, place] = -tensor[3, place]
    return {name: tensor}


def swapped_scales(name: str) -> Tensors:
    """Two blocks of one row keep their codes and change their scales."""
    tensor = parameters()[name].clone()
    exponents = [tensor[:, start : start + 32].abs().amax(1).log2().floor() for start in (0, 32)]
    row = int((exponents[0] != exponents[1]).nonzero()[0])
    by = 2.0 ** float(exponents[1][row] - exponents[0][row])
    tensor[row, :32] *= by
    tensor[row, 32:64] /= by
    return {name: tensor}


FAULTS: dict[str, tuple[Callable[[str], Tensors], str]] = {
    **{f"a weight of {name}": (one_number, name) for name in ("g", "u", "d")},
    "a gain": (one_number, "n"),
    **{f"scales of {name}": (swapped_scales, name) for name in ("g", "d")},
}


def faulty_words(fault: str) -> tuple[Tensors, np.ndarray]:
    """(the changed parameters, the configuration that holds them): one word, or two that change their places."""
    graph = right()[0]
    make, name = FAULTS[fault]
    changed = make(name)
    words, before = design(changed).configuration(), graph.configuration()
    places = np.flatnonzero((words != before).any(-1))
    if make is one_number:
        assert len(places) == 1
    else:
        first, second = places
        np.testing.assert_array_equal(words[[first, second]], before[[second, first]])
    return changed, words


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_memory_is_found_where_it_shows(fault: str) -> None:
    graph, _, device, given = right()
    changed, words = faulty_words(fault)
    meant = expected(graph, changed)
    check(compare(device, graph, given, configuration=words), meant)
    # The same memory is right where the reference holds the same weights.
    assert compare(device, graph, meant, configuration=words).is_equal


def with_another_operator(text: str) -> str:
    """The residual sum becomes a difference: x plus what the layer gives, less it."""
    graph = right()[0]
    kind = next(each for each in graph.nodes.values() if each.name == "y_add")
    start = text.index(f"hw.module private @{module_of(graph, kind.name)}(")
    place = text.index("comb.add", start)
    assert text.count("comb.add", start, text.index("hw.output", start)) == 1
    return f"{text[:place]}comb.sub{text[place + len('comb.add') :]}"


def module_of(graph: Graph, node: str) -> str:
    """The module that a stage is placed as."""
    found = re.search(rf'hw.instance "{node}" @(\w+)', right()[1])
    assert found is not None, node
    return found[1]


def with_another_entry(monkeypatch: pytest.MonkeyPatch, bit: int = 9) -> None:
    """One bit of one value of the table of SiLU is another one, in the definition."""
    bases = Table("silu", right()[0].inputs[0].point, right()[0].inputs[0].point, 9).bases
    place = len(bases) // 2 + 20
    wrong = [base ^ (1 << bit) if index == place else base for index, base in enumerate(bases)]
    monkeypatch.setattr(Table, "bases", wrong)


def test_another_operator_in_the_circuit_is_found() -> None:
    graph, text, _, given = right()
    wrong = with_another_operator(text)
    meant = expected(graph, text=MLP.replace("%y = mx.add", "%y = mx.sub"))
    device = ArcSimulator(wrong, graph.input_streams, graph.output_streams)
    check(compare(device, graph, given), meant)
    assert compare(device, graph, meant).is_equal


def test_a_flipped_bit_in_the_circuit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One constant of the text: that of an entry of the table."""
    graph, text, _, given = right()
    with_another_entry(monkeypatch)
    wrong, meant = circuit_text(design().module("mlp")), expected(graph)
    lines = [pair for pair in zip(text.splitlines(), wrong.splitlines(), strict=True) if pair[0] != pair[1]]
    assert len(lines) == 1, lines[:5]
    before, after = (int(re.findall(r"hw.constant (-?\d+)", line)[0]) for line in lines[0])
    assert (before ^ after).bit_count() == 1
    device = ArcSimulator(wrong, graph.input_streams, graph.output_streams)
    check(compare(device, graph, given), meant)


@cache
def emitted() -> dict[str, str]:
    graph, _, _, given = right()
    return files(graph, "mlp", given, {})


def simulated(folder: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """`make sim` in the emitted folder with some files changed."""
    for name, text in {**emitted(), **changes}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = ["make", "sim", f"VERILATOR={verilator()}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment())


def check_told(done: subprocess.CompletedProcess[str], meant: Vectors) -> None:
    """The emitted test bench fails, counts as many beats and names the first of them."""
    found, correct = meant.outputs["y"], right()[3].outputs["y"]
    wrong = (found != correct).any(-1)
    assert done.returncode != 0 and "PASS" not in done.stdout
    told = re.search(r"beats, (\d+) mismatches, 0 violations", done.stdout)
    assert told is not None and int(told[1]) == int(wrong.sum()) > 0, done.stdout[-1000:] + done.stderr[-1000:]
    place = int(wrong.argmax())
    numbers = [memory_text(each[place : place + 1], 24).strip() for each in (found, correct)]
    assert f"beat {place} of y: {numbers[0]}, expected {numbers[1]}\n" in done.stdout


@pytest.mark.slow
@needs_verilator
def test_the_emitted_test_bench_finds_faults_in_its_memories(tmp_path: Path) -> None:
    """The words of a weight, and two scales, in the files that fill the memories: the design is built once."""
    graph = right()[0]
    assert simulated(tmp_path).returncode == 0
    for fault in FAULTS:
        changed, words = faulty_words(fault)
        text = memory_text(words, graph.input_streams[CONFIG])
        check_told(simulated(tmp_path, **{f"vectors/{CONFIG}.mem": text}), expected(graph, changed))


@pytest.mark.slow
@needs_verilator
def test_the_emitted_test_bench_finds_another_operator(tmp_path: Path) -> None:
    """A plus in the emitted SystemVerilog becomes a minus."""
    graph = right()[0]
    name = f"rtl/{module_of(graph, 'y_add')}.sv"
    assert emitted()[name].count(" + ") == 1
    meant = expected(graph, text=MLP.replace("%y = mx.add", "%y = mx.sub"))
    check_told(simulated(tmp_path, **{name: emitted()[name].replace(" + ", " - ")}), meant)


@pytest.mark.slow
@needs_verilator
def test_the_emitted_test_bench_finds_a_flipped_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit of the activation's table in the emitted SystemVerilog."""
    graph, _, _, given = right()
    before = emitted()
    with_another_entry(monkeypatch)
    after = files(design(), "mlp", given, {})
    changed = {name: text for name, text in after.items() if text != before[name]}
    assert [name.startswith("rtl/") for name in changed] == [True]
    check_told(simulated(tmp_path, **changed), expected(graph))


@pytest.mark.slow
@needs_verilator
def test_the_emitted_test_bench_finds_beats_that_do_not_wait(tmp_path: Path) -> None:
    """Field case H3: the output's data changes while nobody takes it."""
    top = emitted()["rtl/mlp.sv"]
    port = re.search(r"assign y = (\w+);", top) or re.search(r"\.out\s*\(y\)", top)
    assert port is not None, top[-2000:]
    toggle = "  reg tick;\n  always_ff @(posedge clk) tick <= rst ? 1'b0 : ~tick;\n"
    end = "\nendmodule"
    if port[0].startswith("assign"):
        changed = top.replace(port[0], f"assign y = {port[1]} ^ {{23'd0, tick & ~y_ready}};")
    else:
        changed = top.replace(port[0], ".out (y_before)").replace(
            end, f"\n  assign y = y_before ^ tick & ~y_ready;{end}"
        )
        toggle = "  wire [23:0] y_before;\n" + toggle
    changed = changed.replace(");\n", f");\n{toggle}", 1)
    done = simulated(tmp_path, **{"rtl/mlp.sv": changed})
    told = re.search(r"(\d+) violations of the protocol", done.stdout)
    assert done.returncode != 0 and told is not None and int(told[1]) > 0, done.stdout[-1000:] + done.stderr[-1000:]


# Random faults in the text of every stage.

OTHER = {
    "comb.add": "comb.sub",
    "comb.sub": "comb.add",
    "comb.mul": "comb.add",
    "comb.and": "comb.or",
    "comb.or": "comb.and",
    "comb.xor": "comb.or",
    "comb.shl": "comb.shru",
    "comb.shru": "comb.shl",
    "icmp eq": "icmp ne",
    "icmp ne": "icmp eq",
    "icmp ult": "icmp uge",
    "icmp uge": "icmp ult",
    "icmp slt": "icmp sge",
    "icmp sgt": "icmp sle",
}


def mutated(text: str, draw: random.Random) -> tuple[str, dict[str, str]]:
    """One operator of every stage's own modules becomes another; (the text, what became of each module)."""
    parts = re.split(r"(?=^  hw\.module )", text, flags=re.M)
    told: dict[str, str] = {}
    for index, part in enumerate(parts):
        name = re.match(r"  hw\.module private @(panel_\w+)\(", part)
        places = [*re.finditer("|".join(map(re.escape, OTHER)), part)]
        if name is None or not places:
            continue
        place = draw.choice(places)
        parts[index] = part[: place.start()] + OTHER[place[0]] + part[place.end() :]
        line = part[: place.start()].count("\n")
        told[name[1]] = parts[index].splitlines()[line].strip()
    return "".join(parts), told


@pytest.mark.nightly
def test_random_faults_in_the_text_of_every_stage_are_found() -> None:
    """One operator in each stage at a time: most change what the small example gives.

    The rest are those that no input, or none so small, shows: bits that are dropped behind, ends of long counters.
    """
    examples = {name: example(name) for name in EXAMPLES}
    graph = side_by_side(examples)
    text = circuit_text(graph.module("panel"))
    placed = dict(re.findall(r'hw\.instance "(\w+?)_stage" @(\w+)', text))
    draw, made, caught, missed = random.Random(0), Counter[str](), Counter[str](), list[str]()
    for _ in range(12):
        wrong, told = mutated(text, draw)
        try:
            device = ArcSimulator(wrong, graph.input_streams, graph.output_streams)
        except MxloomError:
            continue  # An operator on which a signal now hangs on itself.
        runs = [device.run(phases(graph, examples), stall, 40_000) for stall in (NO_STALLS, Stalls.random(0.5))]
        found = {line.partition(":")[0] for run in runs for line in differences(run, examples)}
        for name, module in placed.items():
            changes = [told[each] for each in (module, f"{module}_dot") if each in told]
            made[name] += bool(changes)
            caught[name] += bool(changes) and name in found
            if changes and name not in found:
                missed.append(f"{name}: {'; '.join(changes)}")
    print("\n".join(missed))
    assert made.total() > 100
    assert caught.total() >= 0.85 * made.total(), f"{caught.total()} of {made.total()}"
    assert all(caught[name] for name in placed), "each stage's faults are found"
