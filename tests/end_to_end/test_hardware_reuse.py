"""One layer's hardware for all layers: loaded in turn, it equals the whole stack; layers that differ are refused."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import ceil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mxloom
from mxloom.backends.dataflow.graph import CONFIG
from mxloom.backends.dataflow.rounds import RoundCycles, compare_rounds, predicted_cycles
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.simulation.verilator import environment, is_available, verilator
from mxloom.backends.dataflow.verification import phases
from mxloom.compiler.command_line import main
from mxloom.compiler.reuse import Reused, reused
from mxloom.dialects.errors import MxloomError, UsageError

MODEL = Path(__file__).parents[2] / "examples" / "models" / "kjv-2m"
WIDTH, HIDDEN, POSITIONS = 24, 40, 3
RUNS = 4


class Layer(nn.Module):
    """A residual layer with a norm, whose weights have a size of their own."""

    def __init__(self, scale: float = 1.0, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        with torch.no_grad():
            self.up.weight.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.first, self.layers, self.last = nn.Linear(7, WIDTH), nn.ModuleList(layers), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def recipe(option: str) -> dict[str, object]:
    return {
        "version": 1,
        "quantize": [{"weights": "mxint8", "activations": "mxint8"}],
        "passes": [f"legalize-hardware{option}"],
    }


def compiled(model: nn.Module, option: str = '{share="layers"}') -> mxloom.Compiled:
    example = torch.randn((2, POSITIONS, 7), generator=torch.Generator().manual_seed(0))
    return mxloom.compile(model.eval(), recipe(option), example={"x": example})


def stack() -> Stack:
    torch.manual_seed(0)
    return Stack(*(Layer(scale) for scale in (0.5, 4.0, 1.0)))


@cache
def built() -> tuple[Reused, ArcSimulator]:
    design = reused(compiled(stack()), "layers")
    return design, ArcSimulator(design.text, design.graph.input_streams, design.graph.output_streams)


def words_of_a_layer() -> int:
    """A word for each 32 numbers of a row and one for its scale, a bias for each row; gain and bias of the norm."""
    rows = [(HIDDEN, WIDTH), (WIDTH, HIDDEN)]
    return sum(n * (2 * ceil(k / 32) + 1) for n, k in rows) + WIDTH


def test_one_layers_hardware_equals_the_stack() -> None:
    design, simulator = built()
    rounds = design.rounds(RUNS)
    assert [each.name for each in rounds] == ["layers.0", "layers.1", "layers.2"]
    predicted = predicted_cycles(design.graph, RUNS)
    assert predicted.loading == words_of_a_layer()
    for stalls in (NO_STALLS, Stalls.random(0.2)):
        results = compare_rounds(simulator, design.graph, rounds, stalls)
        for outcome, cycles in results:
            assert outcome.is_equal, outcome
            assert outcome.beats == RUNS * POSITIONS * WIDTH
            if stalls is NO_STALLS:
                assert cycles == predicted == RoundCycles(cycles.loading, outcome.cycles)
                assert outcome.latency == design.timing.latency
                assert outcome.interval == pytest.approx(design.timing.interval, abs=0.5)


def test_what_comes_out_is_what_the_next_layer_reads() -> None:
    """The simulator's own beats go in again, and come out at the end as those of the last layer."""
    design, simulator = built()
    rounds = design.rounds(RUNS)
    (given,), (out,) = design.graph.inputs, design.graph.outputs
    beats = rounds[0].vectors.inputs[given.name]
    for each in rounds:
        vectors = replace(each.vectors, inputs={given.name: beats})
        beats = simulator.run(phases(design.graph, vectors, each.configuration)).outputs[out.name]
    assert (beats == rounds[-1].vectors.outputs[out.name]).all()
    assert (beats != rounds[0].vectors.outputs[out.name]).any()


def test_another_layers_words_are_noticed() -> None:
    design, simulator = built()
    first, second, third = design.rounds(1)
    swapped = [first, replace(second, configuration=third.configuration), third]
    results = compare_rounds(simulator, design.graph, swapped)
    assert [outcome.is_equal for outcome, _ in results] == [True, False, True]


def test_the_emitted_folder_has_a_folder_for_each_layer(tmp_path: Path) -> None:
    design, _ = built()
    folder = design.save(tmp_path / "stack", design.rounds(2))
    told, cost = (json.loads((folder / name).read_text()) for name in ("interface.json", "cost.json"))
    words = words_of_a_layer()
    assert told["reuse"]["loading_words"] == words
    assert [each["name"] for each in told["reuse"]["layers"]] == ["layers.0", "layers.1", "layers.2"]
    texts = [(folder / each["folder"] / f"{CONFIG}.mem").read_text() for each in told["reuse"]["layers"]]
    assert [text.count("\n") for text in texts] == [words] * 3 and len({*texts}) == 3
    reuse, stages = cost["reuse"], told["configuration"]["stages"]
    weights = sum(m["depth"] * m["width"] for stage in stages for m in stage["memories"]) / 8
    assert reuse["loading"]["cycles"] == words and reuse["loading"]["outside"]["bytes"] == weights
    assert reuse["total"]["loading_cycles"] == 3 * words
    assert reuse["total"]["cycles_of_one_input"] == 3 * predicted_cycles(design.graph, 1).total
    assert reuse["total"]["weights"]["bytes"] == 3 * weights
    energy = sum(cost["total"]["energy_pj"].values())
    assert reuse["total"]["on_chip_pj_of_one_input"] == pytest.approx(3 * energy)
    assert reuse["total"]["values_of_one_input"]["bytes"] == 3 * 2 * POSITIONS * WIDTH * 24 / 8
    assert reuse["total"]["weights"]["dram_pj"] == [3 * weights * 8 * pj / 64 for pj in (1300, 2600)]


class Twice(nn.Module):
    """The second layer reads what went into the first as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(7, WIDTH), nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.ways = nn.ModuleList(Way() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.ways[1](self.ways[0](x, x), x)


class Way(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) + y


REFUSED: dict[str, tuple[Callable[[], mxloom.Compiled], str, type[Exception], str]] = {
    "no list": (lambda: compiled(stack()), "blocks", UsageError, '"blocks" is no list of layers: .* 0 modules'),
    "a layer": (lambda: compiled(stack()), "layers.0", UsageError, '"layers.0" is no list of layers'),
    "one layer": (lambda: compiled(Stack(Layer()), ""), "layers", UsageError, "1 modules named layers.N"),
    "formats": (lambda: compiled(stack(), ""), "layers", MxloomError,
                r'(?s)layers.1 is not the hardware of layers.0: \S+ and \S+, in its place, differ: '
                r'unit.accumulator.lsb is .*compile with legalize-hardware\{share="layers"\}'),
    "sizes": (lambda: compiled(Stack(Layer(), Layer(hidden=48))), "layers", MxloomError,
              r"(?s)layers_0_up_linear and layers_1_up_linear, in its place, differ: columns is 40 .* 48 in the second"
              r".*only layers of one kind"),
    "inputs": (lambda: compiled(Twice(), ""), "ways", MxloomError, r"ways.1 reads first, ways.0\S*: one layer's"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_share_hardware_are_named(case: str) -> None:
    model, part, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        reused(model(), part)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    typed = mxloom.compile(MODEL, recipe('{share="model.layers"}'))
    return typed.save(tmp_path_factory.mktemp("reuse") / "typed")


@pytest.mark.slow
def test_one_layer_of_the_embedded_model_does_the_work_of_all(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", str(shared), "--reuse", "model.layers", "--sequence", "2", "--vectors", "2"]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["arc"]["is_equal"] and told["arc"]["cycles"] == told["predicted"]["cycles"]
    assert [each["beats"] for each in told["arc"]["layers"]] == [2 * 2 * 192] * 4
    for option, value in (("--part", "model.layers.0"), ("--memory", "1000")):
        assert main([*command, option, value]) != 0
        assert f"{option} and --reuse" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Verilator, make and a C++ compiler")
def test_the_emitted_stack_checks_itself_under_verilator(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "stack"
    assert main(["emit", str(shared), "--reuse", "model.layers", "--sequence", "2", "--out", str(out)]) == 0
    command = ["make", "sim", f"VERILATOR={verilator()}"]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{4 * 2 * 2 * 192} beats, 0 mismatches, 0 violations" in done.stdout
