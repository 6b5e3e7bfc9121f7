"""A small example of every stage: what it is given, and what its definition makes of it. A new stage joins the list."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules

import numpy as np
import torch

from mxloom.backends.dataflow import stages
from mxloom.backends.dataflow.codes import operand_code
from mxloom.backends.dataflow.dot_product import Accumulator, DotProduct
from mxloom.backends.dataflow.float_sum import FloatSum
from mxloom.backends.dataflow.graph import CONFIG, Boundary, Graph, Place
from mxloom.backends.dataflow.simulation.traffic import Phase, Run
from mxloom.backends.dataflow.stages._stream import Stage
from mxloom.backends.dataflow.stages.contraction import Contraction
from mxloom.backends.dataflow.stages.normalize import Normalize
from mxloom.backends.dataflow.stages.patches import Patches, Sliding
from mxloom.backends.dataflow.stages.pointwise import Binary, Convert
from mxloom.backends.dataflow.stages.pool import Pool
from mxloom.backends.dataflow.stages.quantize import Quantize
from mxloom.backends.dataflow.stages.quantize_mixed import QuantizeMixed
from mxloom.backends.dataflow.stages.quantize_scaled import QuantizeScaled
from mxloom.backends.dataflow.stages.rope import Rope
from mxloom.backends.dataflow.stages.route import Axis, Fifo, Fork, Reorder
from mxloom.backends.dataflow.stages.select import Select
from mxloom.backends.dataflow.stages.softmax import Softmax
from mxloom.backends.dataflow.stages.table import Activation
from mxloom.backends.dataflow.window import Window
from mxloom.dialects import integer
from mxloom.dialects.accumulator import AccumulatorAttr
from mxloom.dialects.contractions import coded_tensor, linear
from mxloom.dialects.formats import Rounding, encode_tensor
from mxloom.dialects.instances import format_of
from mxloom.dialects.integer import Point, Table, requantized
from mxloom.dialects.windows import windowed_codes

from .stages import codes_of, operand_beats, spread
from .test_contraction_stage import load, random_operand, type_of
from .test_float_sum import codes_in
from .test_quantize_mixed_stage import FP4, FP8, expected_beats, impacts_of, mixed

P, W = Point(24, 12), Point(16, 13)
WINDOW = (40, -20)

Beats = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Example:
    """A stage, beats for its inputs and its memories, and the beats that it must give."""

    stage: Stage
    given: Beats
    expected: Beats
    load: np.ndarray | None = None

    @property
    def counts(self) -> dict[str, int]:
        return {stream: len(beats) for stream, beats in self.expected.items()}


def kinds() -> set[type[Stage]]:
    """Every stage that can be built."""
    found: set[type[Stage]] = set()
    for module in iter_modules(stages.__path__):
        members = vars(import_module(f"{stages.__name__}.{module.name}")).values()
        found |= {each for each in members if isinstance(each, type) and issubclass(each, Stage)}
    return {each for each in found if not inspect.isabstract(each)}


def through(stage: Stage, x: torch.Tensor, y: torch.Tensor, load: torch.Tensor | None = None) -> Example:
    """One stream of numbers in, one out, and the words of a memory."""
    words = None if load is None else codes_of(load, stage.memories[0].width)
    (given,), (found,) = stage.inputs.items(), stage.outputs.items()
    return Example(stage, {given[0]: codes_of(x, given[1])}, {found[0]: codes_of(y, found[1])}, words)


def product(
    a: str,
    b: str,
    *,
    accumulator: str = "window",
    rows: int = 7,
    columns: int = 5,
    size: int = 70,
    bias: Point | None = None,
    copies: int = 1,
    dynamic: bool = False,
) -> Example:
    types = type_of(a), type_of(b)
    one, other = (operand_code(type, size) for type in types)
    blocks = [code.block for code in (one, other) if code.block is not None]
    segment = min(blocks) if blocks else size
    x, w = (random_operand(type, (n, size), n, "ordinary") for type, n in zip(types, (rows, columns), strict=True))
    biases = spread((rows if dynamic else columns,), bias.width, 9) if bias else None
    start = biases.double() * 2.0**-bias.fraction if bias and biases is not None else None
    result, sums = Point(24, 8), (coded_tensor(x), coded_tensor(w))
    how: Accumulator = Window(*WINDOW)
    if accumulator == "window":
        # A bias belongs to the rows of what is loaded, or to those of the stream that passes what stands in the banks.
        left, right = sums[::-1] if dynamic else sums
        total = windowed_codes(left, right, start, *WINDOW)
        total = total.T if dynamic else total
        found = requantized((total * 2.0 ** -WINDOW[1]).long(), -WINDOW[1], result)
    else:
        how = FloatSum(2, -(-size // segment), result)
        start = None if start is None else start.float()
        found = codes_in(linear(*sums, start, AccumulatorAttr.of("f32", "rne", 2)), result)
    stage = Contraction(
        DotProduct(one, other, segment, segment, how, bias), rows, columns, size, result, copies, dynamic
    )
    given = {"a": operand_beats(x, one, segment, segment)}
    if dynamic:
        given["b"] = operand_beats(w, other, segment, segment)
        words = None if bias is None or biases is None else codes_of(biases, bias.width)
    else:
        words = load(stage, w, biases)
    return Example(stage, given, {"out": codes_of(found, 24)}, words)


def quantized() -> Example:
    type, x = format_of("mxfp6_e2m3", rank=1), spread((6, 70), 24, 5)
    code = operand_code(type, 70)
    encoded = encode_tensor(x.double() * 2.0**-12, type, Rounding(scale_rule="even"))
    stage = Quantize(P, code, 32, 6, 70, "even")
    return Example(stage, {"in": codes_of(x, 24)}, {"out": operand_beats(encoded, code, 32, 32)})


def quantized_under_floats() -> Example:
    type, x = format_of("!mx.block<16xf4E2M1FN, f8E4M3FN>", rank=1), spread((6, 40), 24, 6)
    code = operand_code(type, 40)
    encoded = encode_tensor(x.float() * 2.0**-12, type)  # pyright: ignore[reportArgumentType]
    stage = QuantizeScaled(P, code, 16, 6, 40)
    return Example(stage, {"in": codes_of(x, 24)}, {"out": operand_beats(encoded, code, 16, 16)})


def quantized_in_two_kinds() -> Example:
    """Channels have sensitivities; the threshold is one of the impacts, so that a half of the blocks stays low."""
    type, x, point = mixed(FP4, FP8, 16), spread((6, 40), 24, 7), Point(12, 14)
    codes = torch.arange(40) * 51
    values, weights = x.double() * 2.0**-12, codes.double() * 2.0**-14
    impacts = impacts_of(values, type, weights=weights)
    threshold = float(sorted(impacts)[len(impacts) // 2])
    stage = QuantizeMixed(P, operand_code(type, 40), 16, 6, 40, threshold, "rne", point)
    words = codes_of(torch.cat([codes, codes.new_zeros(stage.memories[0].depth - 40)]), 12)
    is_low = [impact <= threshold for impact in impacts]
    return Example(stage, {"in": codes_of(x, 24)}, {"out": expected_beats(values, type, is_low)}, words)


def normalized(centred: bool) -> Example:
    x, w, b = spread((5, 20), 24, 0), spread((20,), 16, 1), spread((20,), 16, 2)
    if not centred:
        stage = Normalize(P, P, 5, 20, 1e-6, W)
        return through(stage, x, integer.rms_norm(x, w, P, W, P, 1e-6), w)
    stage = Normalize(P, P, 5, 20, 1e-6, W, W, centred=True)
    return through(stage, x, integer.layer_norm(x, w, b, P, W, W, P, 1e-6), (w & 0xFFFF) + ((b & 0xFFFF) << 16))


def probabilities() -> Example:
    x, result = spread((12, 6), 24, 3), Point(24, 22)
    keep = torch.arange(6)[None] <= (torch.arange(12) % 6)[:, None]
    stage = Softmax(P, result, 12, 6, 8, 0.5, causal=True, positions=6)
    return through(stage, x, integer.softmax(x, P, result, 8, 0.5, keep))


def turned() -> Example:
    x, cos, sin = spread((6, 8), 24, 5), spread((3, 8), 16, 7), spread((3, 8), 16, 8)
    halves = torch.cat([-x[:, 4:], x[:, :4]], -1)
    y = requantized(x * cos.repeat(2, 1) + halves * sin.repeat(2, 1), 26, Point(24, 11))
    return through(Rope(P, Point(24, 11), Point(16, 14), 6, 8, 3), x, y, (cos & 0xFFFF) + ((sin & 0xFFFF) << 16))


def two_streams(operation: str) -> Example:
    x, y, result = spread((60,), 24, 5), spread((60,), 10, 6), Point(24, 11)
    exact = {"add": x + (y << 10), "sub": x - (y << 10), "mul": x * y}[operation]
    z = requantized(exact, 14 if operation == "mul" else 12, result)
    stage = Binary(operation, P, Point(10, 2), result, 60)
    return Example(stage, {"a": codes_of(x, 24), "b": codes_of(y, 10)}, {"out": codes_of(z, 24)})


def beside_kept() -> Example:
    x, kept = spread((60,), 24, 5), spread((10,), 16, 6)
    y = requantized(x * kept.repeat(6), 25, Point(24, 11))
    return through(Binary("mul", P, W, Point(24, 11), 60, 10), x, y, kept)


def converted() -> Example:
    x = spread((60,), 24, 9)
    y = requantized((x.clamp(min=-1000) * -5 << 1) + (3 << 12), 13, Point(16, 9))
    return through(Convert(P, Point(16, 9), 60, -5, 0, "rne", -1000, 3, 1), x, y)


def curved() -> Example:
    table, x = Table("gelu", P, Point(20, 10), 7), spread((60,), 24, 5)
    return through(Activation(table, 60), x, table(x))


def windows() -> Example:
    lines, columns = Sliding(5, 3, 2, 1), Sliding(4, 2, 1, 1)
    x = spread((2, 3, 5, 4), 24, 5)
    rows = torch.nn.functional.unfold(x.double(), (3, 2), padding=1, stride=(2, 1)).long()
    rows = rows.unflatten(1, (3, -1)).permute(0, 3, 2, 1)
    return through(Patches(24, 3, lines, columns, 2), x.permute(0, 2, 3, 1), rows)


def pooled(operation: str) -> Example:
    x, result = spread((6, 7, 3), 24, 3), Point(20, 9)
    y = requantized(x.amax(1), 12, result) if operation == "max" else integer.mean(x.sum(1), 7, P, result)
    return through(Pool(operation, P, result, 6, 7, 3), x, y)


def forked() -> Example:
    x, stage = codes_of(spread((60,), 24, 5), 24), Fork(24, 3, 60)
    return Example(stage, {"in": x}, dict.fromkeys(stage.outputs, x))


def reordered() -> Example:
    x, y = spread((3, 4, 5), 24, 5), torch.zeros(3, 6, 4, dtype=torch.long)
    y[:, :5] = x.transpose(1, 2)
    return through(Reorder(24, 20, (Axis(6, 1, 5), Axis(4, 5)), 3), x, y)


def queued() -> Example:
    x = spread((60,), 24, 5)
    return through(Fifo(24, 3, 60), x, x)


def selected() -> Example:
    x = spread((6, 5, 2), 24, 5)
    return through(Select(24, 6, 5, 2, 1, 3), x, x[:, 1:4])


EXAMPLES: dict[str, Callable[[], Example]] = {
    "weights": lambda: product("mxint8", "mxfp4", bias=Point(24, 10), copies=2),
    "two_streams": lambda: product("mxfp8_e4m3", "mxfp4", dynamic=True),
    "streamed_weights": lambda: product("mxfp4", "mxint8", dynamic=True, bias=Point(24, 10)),
    "float_sums": lambda: product("mxint8", "mxfp8_e5m2", accumulator="f32", bias=Point(24, 10)),
    "quantize": quantized,
    "quantize_scaled": quantized_under_floats,
    "quantize_mixed": quantized_in_two_kinds,
    "rms_norm": lambda: normalized(centred=False),
    "layer_norm": lambda: normalized(centred=True),
    "softmax": probabilities,
    "rope": turned,
    "add": lambda: two_streams("add"),
    "sub": lambda: two_streams("sub"),
    "mul": lambda: two_streams("mul"),
    "kept": beside_kept,
    "convert": converted,
    "activation": curved,
    "patches": windows,
    "max_pool": lambda: pooled("max"),
    "mean_pool": lambda: pooled("mean"),
    "fork": forked,
    "queue": queued,
    "reorder": reordered,
    "select": selected,
}


@cache
def example(name: str) -> Example:
    return EXAMPLES[name]()


def side_by_side(examples: Mapping[str, Example]) -> Graph:
    """All stages in one design, each with streams of its own: one simulator for all of them."""
    graph = Graph()
    for name, each in examples.items():
        words = each.load
        node = graph.add("stage", each.stage, name, None if words is None else lambda _, words=words: [words])
        for stream, width in each.stage.inputs.items():
            graph.inputs.append(Boundary(f"{name}_{stream}", Point(width, 0), (len(each.given[stream]),)))
            graph.connect(Place("", f"{name}_{stream}"), Place(node.name, stream))
        for stream, width in each.stage.outputs.items():
            graph.outputs.append(Boundary(f"{name}_{stream}", Point(width, 0), (len(each.expected[stream]),)))
            graph.connect(Place(node.name, stream), Place("", f"{name}_{stream}"))
    return graph


def phases(graph: Graph, examples: Mapping[str, Example]) -> list[Phase]:
    """Fill all memories, then give every stage its beats."""
    given = {f"{name}_{stream}": beats for name, each in examples.items() for stream, beats in each.given.items()}
    load = [Phase({CONFIG: graph.configuration()})] if graph.loaded else []
    return [*load, Phase(given, {each.name: each.shape[0] for each in graph.outputs})]


def differences(run: Run, examples: Mapping[str, Example]) -> Iterator[str]:
    """What a run of stages side by side gave otherwise than they must, a line for each stream."""
    if run.violations or run.surplus:
        yield f"{run.violations} violations, {run.surplus} beats too many"
    for name, each in examples.items():
        for stream, beats in each.expected.items():
            found = run.outputs[f"{name}_{stream}"]
            if len(found) != len(beats):
                yield f"{name}: {len(found)} of {len(beats)} beats of {stream}"
            elif wrong := int((found != beats).any(-1).sum()):
                yield f"{name}: {wrong} of {len(beats)} beats of {stream} differ"
