"""Contractions: operands come as blocks from quantizers, weights stand in memories."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from xdsl.ir import Attribute, SSAValue

from ....dialects.contractions import transposed_format, transposed_tensor
from ....dialects.errors import MxloomError
from ....dialects.formats import Encoded, MixedType, Rounding, block_impact, encode_tensor, is_wide
from ....dialects.formats._format import SEARCHED_RULES
from ....dialects.integer import Point
from ....dialects.operations._operation import Operation
from ....dialects.operations._shapes import element_of, shape_of
from ....dialects.operations._values import path_of
from ....dialects.operations.cast import CastOp
from ....dialects.operations.parameter import ParameterOp
from ..codes import OperandCode, operand_code
from ..dot_product import Accumulator, DotProduct
from ..float_sum import FloatSum, why_no_float_sum
from ..flow import Flow, in_order, row_major
from ..graph import Fill, Place, WeightStream
from ..images import MixedBlocks, Rows, bits_of, packed, rows_of, rows_of_kinds
from ..keywords import port_name
from ..lowering import Design, check_finite, lowers, point_of, refusal, site_of
from ..stages._stream import Memory
from ..stages.contraction import Contraction
from ..stages.quantize import Quantize
from ..stages.quantize_mixed import QuantizeMixed
from ..stages.quantize_scaled import E2M1, E4M3, FEWEST_BITS, QuantizeScaled
from ..window import Window
from .parameters import fixed_codes

if TYPE_CHECKING:
    from torch import Tensor

LANES = 32
"""Elements of a beat where no block says how many."""


def window_of(attribute: Any) -> Window:
    """The window that an attribute states."""
    return Window(attribute.width.data, attribute.lsb.data)


def segment_of(a: OperandCode, b: OperandCode, size: int, lanes: int) -> int:
    """Elements that are summed exactly: those of the shorter block, or all of them."""
    blocks = [code.block for code in (a, b) if code.block is not None]
    return min(blocks) if blocks else -(-size // lanes) * lanes


def lanes_of(a: OperandCode, b: OperandCode, size: int) -> int:
    """Elements of a beat: those of the shorter block."""
    blocks = [code.block for code in (a, b) if code.block is not None]
    return min(blocks) if blocks else min(LANES, size)


def operands_of(op: Operation, a: Attribute, b: Attribute, size: int) -> tuple[OperandCode, OperandCode]:
    """How two types come to a contraction, rows along its sum. Raises MxloomError, naming the operation, where not."""
    try:
        codes = operand_code(a, size), operand_code(b, size)
    except MxloomError as error:
        raise refusal(op, str(error)) from None
    for code in codes:
        if code.tensor_scale:
            raise refusal(op, f"{code.name}: a factor of the whole tensor, made from its values, has no hardware: "
                          "let legalize-hardware make it a power of two")  # fmt: skip
    return codes


@lowers("mx.linear")
def _linear(design: Design, op: Any) -> None:
    size = shape_of(op.input)[-1]
    type = element_of(op.weight)
    weight_type = transposed_format(type) if op.transposed is not None else type
    a, b = operands_of(op, element_of(op.input), weight_type, size)
    lanes = lanes_of(a, b, size)
    bias = None if op.bias is None else point_of(op.bias, op)
    segment = segment_of(a, b, size, lanes)
    accumulator = _accumulator(op, (a, b), bias, -(-size // segment))
    columns, rows, point = shape_of(op.results[0])[-1], prod(shape_of(op.results[0])[:-1]), point_of(op.results[0], op)
    if site_of(op) in design.streamed:
        unit = DotProduct(b, a, lanes, segment, accumulator, bias)
        _streamed(design, op, Contraction(unit, columns, rows, size, point, dynamic=True), weight_type)
        return
    stage = Contraction(DotProduct(a, b, lanes, segment, accumulator, bias), rows, columns, size, point)
    node = design.graph.add("linear", stage, site_of(op), _weights(design, op, stage, weight_type))
    place = blocks_of(design, op, op.input, a, lanes)
    design.graph.connect(place, Place(node.name, "a"))
    design.give(op, Place(node.name, "out"))


def _streamed(design: Design, op: Any, stage: Contraction, type: Attribute) -> None:
    """A linear layer whose weight comes from outside, once for all rows of its input, which stand in the banks.

    It gives one column of its result after the other.
    """
    graph, code, lanes, steps, bias = design.graph, stage.unit.a, stage.unit.lanes, stage.steps, stage.unit.bias
    rows = _weight_rows(design, op, code, steps * lanes, type)
    biases = None if bias is None else [packed(_biases(design, op, bias)[:, None], bias.width)]
    node = graph.add("linear", stage, site_of(op), None if biases is None else lambda _: biases)
    beats = rows.codes.reshape(-1, lanes)
    words, width = bits_of(beats, code.code_bits), lanes * code.code_bits + code.side_bits
    if code.side_bits:
        length = steps * lanes if code.block is None else code.block
        sides = np.repeat(rows.sides, length // lanes, axis=1)[:, :steps].reshape(-1, 1)
        words = np.concatenate([words, bits_of(sides, code.side_bits)], 1)
    taken = {each.name for each in (*graph.inputs, *graph.streamed)}
    base = port_name(f"{site_of(op)}_weight")
    name = next(
        each for each in (base, *(f"{base}_{count}" for count in range(2, len(taken) + 3))) if each not in taken
    )
    own = path_of(op.results[0]) or op.name
    stream = WeightStream(name, width, np.packbits(words, axis=-1, bitorder="little"), own,
                          (lanes, code.code_bits, code.side_bits))  # fmt: skip
    graph.streamed.append(stream)
    graph.connect(Place("", name), Place(node.name, "a"))
    graph.connect(blocks_of(design, op, op.input, stage.unit.b, lanes), Place(node.name, "b"))
    shape, count = shape_of(op.results[0]), stage.columns
    strides = (*row_major(shape[:-1]), count)
    design.flows[op.results[0]] = Flow(Place(node.name, "out"), stage.result, shape, strides, prod(shape))


def _accumulator(op: Any, operands: tuple[OperandCode, OperandCode], bias: Point | None, segments: int) -> Accumulator:
    """How a linear layer adds up its segments: in a window, or in f32."""
    if op.window is not None:
        return window_of(op.window)
    if op.acc is None:
        raise refusal(op, "it states no window and no accumulator: run the pass legalize-hardware first")
    if op.acc.format != "f32":
        raise refusal(op, f"it adds up in {op.acc.label}: hardware has accumulators of f32, and windows")
    if (reason := why_no_float_sum(*operands, bias)) is not None:
        raise refusal(op, reason)
    return FloatSum(op.acc.partials.data, segments, point_of(op.results[0], op))


@lowers("mx.matmul")
def _matmul(design: Design, op: Any) -> None:
    if op.window is None:
        raise refusal(op, "it states no window: run the pass legalize-hardware first")
    product_of_streams(design, op, op.input, op.other, window_of(op.window))


def product_of_streams(design: Design, op: Any, input: SSAValue, other: SSAValue, window: Window) -> None:
    """A product of two computed values; the second stands in memory while rows of the first pass."""
    left, right = shape_of(input), shape_of(other)
    size = left[-1]
    type = transposed_format(element_of(other))
    a, b = operands_of(op, element_of(input), type, size)
    lanes = lanes_of(a, b, size)
    if left[:-2] != right[:-2]:
        raise refusal(op, f"operands of shapes {left} and {right}: hardware needs one batch")
    unit = DotProduct(a, b, lanes, segment_of(a, b, size, lanes), window)
    stage = Contraction(
        unit, left[-2], right[-1], size, point_of(op.results[0], op), dynamic=True, runs=prod(left[:-2])
    )
    node = design.graph.add("matmul", stage, site_of(op))
    design.graph.connect(blocks_of(design, op, input, a, lanes), Place(node.name, "a"))
    place = blocks_of(design, op, other, b, lanes, transposed=True)
    design.graph.connect(place, Place(node.name, "b"))
    design.give(op, Place(node.name, "out"))


def blocks_of(
    design: Design,
    op: Operation,
    value: SSAValue,
    code: OperandCode,
    lanes: int,
    *,
    transposed: bool = False,
) -> Place:
    """The stream of an operand's blocks: one quantizer for all that read a value alike."""
    key = (value, code, lanes, transposed)
    if key in design.quantized:
        return design.quantized[key]
    owner = value.owner
    if isinstance(owner, CastOp) and value not in design.flows:
        flow, how, sensitivity = design.flow(owner.input, op), owner.how(), owner.sensitivity
    else:
        flow, how, sensitivity = design.flow(value, op), Rounding(), None
    if transposed:
        rank = len(flow.shape)
        flow = flow.permuted([*range(rank - 2), rank - 1, rank - 2])
    weights = None if sensitivity is None else _sensitivities(design, op, sensitivity, flow, transposed)
    place = quantized(design, op, flow, code, lanes, how, site_of(op) if transposed else "", weights)
    design.quantized[key] = place
    return place


def quantized(
    design: Design,
    op: Operation,
    flow: Flow,
    code: OperandCode,
    lanes: int,
    how: Rounding,
    site: str,
    sensitivities: tuple[Point, np.ndarray] | None = None,
) -> Place:
    """A quantizer behind a flow; of mixed blocks, with the sensitivities of a row's numbers and their format."""
    if how.clip is not None or how.rounding == "stochastic":
        raise refusal(op, "clipped and stochastic rounding of computed values have no hardware")
    if how.scale_rule in SEARCHED_RULES:
        raise refusal(
            op, f"the scale rule {how.scale_rule} of computed values has no hardware: it tries several scales"
        )
    if code.block_rows != 1:
        raise refusal(op, f"a computed value in {code.name}: its blocks take several rows, a quantizer sees one")
    if code.scale is not None and code.scale.mantissa_bits:
        _check_scaled(op, code, how, flow.point)
    own = site or design_site(flow, op)
    stage = _quantizer(op, flow, code, lanes, how, sensitivities[0] if sensitivities else None)
    words = [] if sensitivities is None else [_padded(sensitivities[1], memory) for memory in stage.memories]
    fill: Fill | None = (lambda _: words) if words else None
    node = design.graph.add("quantize", stage, own, fill)
    design.graph.connect(in_order(design.graph, flow, f"{own}_operand"), Place(node.name, "in"))
    return Place(node.name, "out")


def _check_scaled(op: Operation, code: OperandCode, how: Rounding, point: Point) -> None:
    """Raise MxloomError where blocks under float scales are not those that hardware makes."""
    if (code.elements, code.scale) != ((E2M1,), E4M3):
        raise refusal(op, f"a computed value in {code.name}: of scales that are floats hardware chooses those of "
                      "blocks of f4E2M1FN under f8E4M3FN")  # fmt: skip
    if how.rounding != "rne":
        raise refusal(op, f"a computed value in {code.name}, rounded {how.rounding}: hardware rounds to nearest even")
    if point.width < FEWEST_BITS:
        raise refusal(op, f"a computed value in {code.name}: hardware makes its scales from {FEWEST_BITS} bits or more")


def _sensitivities(
    design: Design, op: Operation, value: SSAValue, flow: Flow, transposed: bool
) -> tuple[Point, np.ndarray]:
    """(the format of the sensitivities, one whole number for each place in a row)."""
    shape = shape_of(value)
    along, others = (shape[:-2] + shape[-1:], shape[-2:-1]) if transposed else (shape[:-1], shape[-1:])
    if prod(along) != 1 or others != flow.shape[-1:]:
        raise refusal(op, f"sensitivities of shape {shape}: hardware keeps one for each place along the sum")
    found = fixed_codes(design, op, value).reshape(-1)
    if (found < 0).any():
        raise refusal(op, "a sensitivity is negative, and squared gradients are not")
    return point_of(value, op), found


def _padded(numbers: np.ndarray, memory: Memory) -> np.ndarray:
    """The words of a memory that keeps one number each, zeros behind them."""
    return packed(np.pad(numbers, (0, memory.depth - len(numbers)))[:, None] & ((1 << memory.width) - 1), memory.width)


def _quantizer(
    op: Operation, flow: Flow, code: OperandCode, lanes: int, how: Rounding, sensitivity: Point | None
) -> Quantize | QuantizeMixed | QuantizeScaled:
    rows, size = prod(flow.shape[:-1]), flow.shape[-1]
    if code.scale is not None and code.scale.mantissa_bits:
        return QuantizeScaled(flow.point, code, lanes, rows, size)
    if not code.is_mixed:
        rule = how.scale_rule or ("floor" if code.elements[0].is_fixed else "even")
        return Quantize(flow.point, code, lanes, rows, size, rule, how.rounding)
    if how.threshold is None:
        raise refusal(op, f"a computed value in {code.name}: no cast says above which threshold its blocks are high")
    try:
        return QuantizeMixed(flow.point, code, lanes, rows, size, how.threshold, how.rounding, sensitivity)
    except MxloomError as error:
        raise refusal(op, f"a computed value in {code.name}: {error}") from None


def design_site(flow: Flow, op: Operation) -> str:
    """The name of a quantizer: that of the stage whose numbers it takes."""
    return flow.place.node or f"{flow.place.stream}_{site_of(op)}"


def encoded_weight(
    design: Design, op: Operation, value: SSAValue, type: Attribute, *, transposed: bool
) -> Encoded | MixedBlocks:
    """A weight as codes and scales, rows along the sum."""
    owner = value.owner
    if isinstance(owner, CastOp) and isinstance(owner.input.owner, ParameterOp):
        wide, how = design.constant(owner.input), owner.how()
        sensitivity = None if owner.sensitivity is None else design.constant(owner.sensitivity)
    elif isinstance(owner, ParameterOp) and not is_wide(element_of(value)):
        found = design.weights.encoded(owner.source.data, element_of(value), shape_of(value))
        wide, how, sensitivity = found.decode(), Rounding(), None
        check_finite(op, value, wide)
        if isinstance(found.format, MixedType):
            return _stored_blocks(transposed_tensor(found) if transposed else found)
        if not transposed:
            return found
    else:
        raise refusal(op, f"the weight {value.name_hint} is no parameter in a format")
    assert wide is not None
    check_finite(op, value, wide)
    if isinstance(type, MixedType):
        return _mixed_weight(wide, element_of(value), type, how, transposed, sensitivity)
    wide = wide.transpose(-1, -2).contiguous() if transposed else wide
    return encode_tensor(wide.float(), type, how)  # pyright: ignore[reportArgumentType]


def _stored_blocks(found: Encoded) -> MixedBlocks:
    """A stored mixed weight, rows along the sum, in both kinds: what is not stored of a kind is 0, and not read."""
    mixed = found.format
    assert isinstance(mixed, MixedType)
    low, high, choice = mixed.parted(found.parts)
    return MixedBlocks(Encoded.of(mixed.low, low), Encoded.of(mixed.high, high), choice == 0)


def _mixed_weight(
    wide: Tensor, stated: Attribute, type: MixedType, how: Rounding, transposed: bool, sensitivity: Tensor | None
) -> MixedBlocks:
    """A weight in both kinds. The kind is decided in the layout that is `stated`, as the reference does."""
    assert isinstance(stated, MixedType) and how.threshold is not None
    is_low = block_impact(wide, stated, sensitivity, how) <= how.threshold
    if transposed:
        wide, is_low = wide.transpose(-1, -2).contiguous(), is_low.transpose(-1, -2)
    low, high = (encode_tensor(wide.float(), part, each) for part, each in type.roundings(how))
    return MixedBlocks(low, high, is_low)


def _weights(design: Design, op: Any, stage: Contraction, type: Attribute) -> Fill:
    """What makes the words of a contraction's memories: those of each copy in turn."""
    lanes, code, bias = stage.unit.lanes, stage.unit.b, stage.unit.bias
    rows = _weight_rows(design, op, code, stage.steps * lanes, type)
    biases = None if bias is None else _biases(design, op, bias)

    def fill(folded: Contraction) -> list[np.ndarray]:
        missing = folded.groups * folded.copies - folded.columns
        codes = np.pad(rows.codes, ((0, missing), (0, 0)))
        sides = np.pad(rows.sides, ((0, missing), (0, 0)))[:, : folded.side_words]
        found: list[np.ndarray] = []
        for copy in range(folded.copies):
            found.append(packed(codes[copy :: folded.copies].reshape(-1, lanes), code.code_bits))
            if code.side_bits:
                found.append(packed(sides[copy :: folded.copies].reshape(-1, 1), code.side_bits))
            if biases is not None and bias is not None:
                own = np.pad(biases, (0, missing))[copy :: folded.copies]
                found.append(packed(own.reshape(-1, 1), bias.width))
        return found

    return fill


def _weight_rows(design: Design, op: Any, code: OperandCode, padded: int, type: Attribute) -> Rows:
    """The rows of a linear layer's weight, along the sum."""
    encoded = encoded_weight(design, op, op.weight, type, transposed=op.transposed is not None)
    mixed = isinstance(encoded, MixedBlocks)
    return rows_of_kinds(encoded, code, padded) if mixed else rows_of(encoded, code, padded)


def _biases(design: Design, op: Any, bias: Point) -> np.ndarray:
    return fixed_codes(design, op, op.bias) & ((1 << bias.width) - 1)
