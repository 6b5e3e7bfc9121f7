"""Linear layers as hardware, whatever format their weights have; what is refused, by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mxloom.backends.dataflow.lowering import lower
from mxloom.backends.dataflow.rtl import circuit_text
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.verification import compare, vectors
from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import Rounding, encode_tensor, quantize
from mxloom.dialects.mx import parse_module, parse_type

X, B = "!mx.fixed<24, 12>", "!mx.fixed<16, 10>"
INT8 = "!mx.block<32x!mx.fixed<8, 6>>"
WEIGHTS = {
    "blocks of 4 rows": "!mx.block<4x32x!mx.fixed<8, 6>>",
    "blocks of 4 rows of FP4": "!mx.block<4x32xf4E2M1FN>",
    "blocks of 5 rows, the last of 2": "!mx.block<5x32xf4E2M1FN>",
    "square blocks": "!mx.block<16x16xf8E4M3FN>",
    "ternary": "!mx.block<?x?x!mx.ternary, f32>",
    "ternary, a scale a row": "!mx.block<?x!mx.ternary, f32>",
    "int8, a scale a channel": "!mx.block<?xi8, f32>",
    "int8, one scale": "!mx.block<?x?xi8, f32>",
    "int4 in groups": "!mx.block<32xi4, bf16>",
    "int4, a scale a channel": "!mx.block<?xi4, f32>",
    "fixed point": "!mx.fixed<8, 6>",
    "NVFP4 beneath no factor": "!mx.block<16xf4E2M1FN, f8E4M3FN>",
    "mixed blocks": "!mx.mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>",
    "mixed blocks of 4 rows": "!mx.mixed<!mx.block<4x32xf4E2M1FN>, !mx.block<4x32xf8E4M3FN>>",
}
ROWS, COLUMNS, SIZE = 5, 12, 70


def linear(type: str, *, bias: bool = True, given: str = INT8, window: str = ", window = #mx.window<44, -24>") -> str:
    """y = x w' + b, x rounded into `given` and w into `type`."""
    options = " {threshold = 0.01}" if "mixed" in type else ""
    values, kinds = ("%q, %wf, %bf", f", tensor<{COLUMNS}x{B}>") if bias else ("%q, %wf", "")
    return f"""
func.func @f(%x: tensor<{ROWS}x{SIZE}x{X}>) -> tensor<{ROWS}x{COLUMNS}x{X}> attributes {{outputs = ["y"]}} {{
  %w = mx.parameter "w" : tensor<{COLUMNS}x{SIZE}xf32>
  %wf = mx.cast %w{options} : tensor<{COLUMNS}x{SIZE}xf32> to tensor<{COLUMNS}x{SIZE}x{type}>
  %b = mx.parameter "b" : tensor<{COLUMNS}xf32>
  %bf = mx.cast %b : tensor<{COLUMNS}xf32> to tensor<{COLUMNS}x{B}>
  %q = mx.cast %x : tensor<{ROWS}x{SIZE}x{X}> to tensor<{ROWS}x{SIZE}x{given}>
  %y = mx.linear {values}{window}
    : (tensor<{ROWS}x{SIZE}x{given}>, tensor<{COLUMNS}x{SIZE}x{type}>{kinds}) -> tensor<{ROWS}x{COLUMNS}x{X}>
  func.return %y : tensor<{ROWS}x{COLUMNS}x{X}>
}}"""


def store(**changed: torch.Tensor) -> WeightStore:
    """Rows of weights of magnitudes that differ, so that no two blocks have scales by chance alike."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(COLUMNS, SIZE, generator=generator) * 2.0 ** -torch.arange(COLUMNS)[:, None].float().div(2).floor()
    return WeightStore.from_state_dict({"w": w, "b": torch.randn(COLUMNS, generator=generator) * 4, **changed})


def check(text: str, copies: int = 1) -> None:
    """The design of a module, with so many units in its contraction, gives what the reference gives."""
    module, weights = parse_module(text), store()
    graph = lower(module, weights)
    for node in graph.nodes.values():
        if isinstance(node.stage, Contraction):
            node.stage = replace(node.stage, copies=copies)
    graph.add_forks()
    generator = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(ROWS, SIZE, generator=generator) * 8,) for _ in range(3)]
    given = vectors(module, weights, graph, inputs)
    device = ArcSimulator(circuit_text(graph.module("linear")), graph.input_streams, graph.output_streams)
    for stall in (NO_STALLS, Stalls.random(0.3)):
        outcome = compare(device, graph, given, stall)
        assert outcome.is_equal, outcome


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_in_every_format(name: str, bias: bool) -> None:
    check(linear(WEIGHTS[name], bias=bias))


@pytest.mark.parametrize(
    "name", ["blocks of 5 rows, the last of 2", "ternary", "int8, a scale a channel", "mixed blocks"]
)
def test_weights_that_several_units_share(name: str) -> None:
    """Five units for twelve rows: rows that share scales stand in memories apart, and two units lack their last row."""
    check(linear(WEIGHTS[name]), copies=5)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "mixed" not in WEIGHTS[name]])
def test_the_reference_is_near_the_product_of_the_rounded_weights(name: str) -> None:
    """The sum in the window is exact to its lowest bit for each segment, and the result to half a step more.

    Mixed blocks are rounded by a decision, which the tests of their quantizer look at.
    """
    generator, weights = torch.Generator().manual_seed(1), store()
    x = quantize(torch.randn(ROWS, SIZE, generator=generator) * 8, parse_type(INT8), Rounding())  # pyright: ignore[reportArgumentType]
    w = quantize(weights.wide("w"), parse_type(WEIGHTS[name]), Rounding())  # pyright: ignore[reportArgumentType]
    b = (weights.wide("b").double() * 1024).round() / 1024
    (found,) = Interpreter(parse_module(linear(WEIGHTS[name])), weights)(x)
    assert float((found.double() - (x.double() @ w.double().T + b)).abs().max()) <= 2.0**-13 + 6 * 2.0**-25


def test_memories_hold_a_scale_once_for_all_rows_of_a_block() -> None:
    """Each row of a block of four rows has the scale of the block: the words of scales repeat four times."""
    graph = lower(parse_module(linear("!mx.block<4x32xf4E2M1FN>", bias=False)), store())
    (node,) = (each for each in graph.nodes.values() if isinstance(each.stage, Contraction))
    _, scales = node.fills
    rows = torch.from_numpy(scales.copy()).reshape(COLUMNS, -1)
    assert rows.shape[1] == 3
    for start in range(0, COLUMNS, 4):
        assert (rows[start : start + 4] == rows[start]).all()
    assert len({tuple(rows[start].tolist()) for start in (0, 4, 8)}) == 3


def test_weights_in_a_format_already_are_taken_as_they_are() -> None:
    """A parameter whose type is a format, without a cast: the stored codes go into the memory."""
    type = "!mx.block<4x32xf4E2M1FN>"
    shape = f"tensor<{COLUMNS}x{SIZE}x"
    cast = f"  %wf = mx.cast %w : {shape}f32> to {shape}{type}>\n"
    text = linear(type)
    assert cast in text
    text = text.replace(cast, "").replace(
        f'%w = mx.parameter "w" : {shape}f32>', f'%wf = mx.parameter "w" : {shape}{type}>'
    )
    packed = store()
    packed.put_encoded("w", encode_tensor(packed.wide("w"), parse_type(type)))  # pyright: ignore[reportArgumentType]
    same = lower(parse_module(text), packed).configuration()
    assert (same == lower(parse_module(linear(type)), store()).configuration()).all()


REFUSED: dict[str, tuple[str, str]] = {
    "zero points": (
        linear("!mx.block<32xi4, bf16, zero i4>"),
        r"y \(mx.linear\): .*: zero points have no hardware; use a symmetric format",
    ),
    "wide weights": (linear("bf16", window=""), r"y \(mx.linear\): bf16 has no hardware: quantize the operand"),
    "no window": (
        linear(INT8, window=""),
        r"y \(mx.linear\): it states no window and no accumulator: run the pass legalize-hardware first",
    ),
    "a factor of the tensor": (
        linear("!mx.block<16xf4E2M1FN, f8E4M3FN, f32>"),
        r"y \(mx.linear\): .*: a factor of the whole tensor, made from its values, has no hardware: let legalize-hard",
    ),
    "computed blocks of several rows": (
        linear(INT8, given="!mx.block<5x32x!mx.fixed<8, 6>>"),
        r"y \(mx.linear\): a computed value in .*: its blocks take several rows, a quantizer sees one",
    ),
    "computed scales in f32": (
        linear(INT8, given="!mx.block<?xi8, f32>"),
        r"y \(mx.linear\): a computed value in .*: of scales that are floats hardware chooses those of",
    ),
    "kinds of two block lengths": (
        linear("!mx.mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN, f8E4M3FN>>", window=""),
        r"y \(mx.linear\): .*: hardware takes both kinds of blocks of one shape and with one kind of scale",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_hardware_is_named(name: str) -> None:
    text, message = REFUSED[name]
    with pytest.raises(MxloomError, match=message):
        lower(parse_module(text), store())


@pytest.mark.parametrize(("name", "broken"), [("w", float("nan")), ("w", float("inf")), ("b", float("nan"))])
def test_parameters_that_hold_no_numbers_are_named(name: str, broken: float) -> None:
    """An infinite bias is none of them: its cast holds it within the format, in the reference too."""
    tensor = store().wide(name).clone()
    tensor.view(-1)[3] = broken
    message = rf"y \(mx.linear\): its parameter {name}f? holds NaN or infinity, which hardware does not"
    with pytest.raises(MxloomError, match=message):
        lower(parse_module(linear(INT8)), store(**{name: tensor}))


def test_a_computed_weight_is_named() -> None:
    relu = "%v = mx.relu %w : (tensor<12x70xf32>) -> tensor<12x70xf32>"
    text = linear(INT8, bias=False).replace("%wf = mx.cast %w ", f"{relu}\n  %wf = mx.cast %v ")
    with pytest.raises(MxloomError, match=r"y \(mx.linear\): the weight wf is no parameter in a format"):
        lower(parse_module(text), store())
