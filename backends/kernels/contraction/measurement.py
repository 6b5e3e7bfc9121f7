"""How fast linear layers on codes are here: against torch's f32, oneDNN and int8, and against what the machine can.

Every figure is a median over rounds in which all contestants run in turn, by CPU time of the thread that runs, so that
what else the machine does meets them alike and waiting for a core does not count.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ....dialects.accumulator import AccumulatorAttr
from ....dialects.contractions import Coded, coded
from ....dialects.formats import Rounding
from ....dialects.instances import format_of
from ..codes import Codes
from .exact_layers import ExactLayers
from .exact_linear import ExactLinear
from .limits import peak, read
from .packing import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

GEMMS = (
    ("mxfp4", "mxint8"),
    ("mxint8", "mxint8"),
    ("int8_channel", "int8_channel"),
    ("mxfp8_e4m3", "mxfp8_e4m3"),
)
"""Formats of weights and activations whose products of matrices are measured."""

GEMVS = (("mxfp4", "mxint8"), ("ternary", "int8_channel"))
"""Formats of weights and activations where one row is multiplied, and weights come from memory."""

ROWS, WIDTH = 256, 2048
"""Rows of activations; columns and depth of weights, twice as wide for one row."""

FROM_MEMORY = 96 << 20
"""Bytes of weights used in turn, three times the caches of a processor core, so that they come from memory."""

REPEATS = 4
"""Runs of one contestant after each other, where weights are in the caches."""

_PEAK_ROUNDS = 2_000_000
"""Some milliseconds."""

Run = Callable[[], object]


def medians(
    contestants: Mapping[str, Sequence[Run]],
    rounds: int,
    clock: Callable[[], float] = time.thread_time,
    before: Run | None = None,
    typical: Callable[[list[float]], float] = statistics.median,
) -> dict[str, float]:
    """Seconds of one run of each contestant: in every round all contestants, each with all its runs.

    Untimed ahead of each: `before`, or where there is none the first of its runs, so that caches hold what it reads.
    `typical` of the rounds: by a clock that the work of others moves too, the least says more than the median.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for runs in contestants.values():
        runs[0]()
    for _ in range(rounds):
        for name, runs in contestants.items():
            (before or runs[0])()
            begin = clock()
            for run in runs:
                run()
            times[name].append((clock() - begin) / len(runs))
    return {name: typical(found) for name, found in times.items()}


@dataclass(frozen=True)
class MeasuredLinear:
    """One linear layer [rows, size] x [columns, size]. `seconds` of every contestant, one call.

    `kernel` is the layer on codes, `call` the rounding of its input as well; the others start from f32 or int8 as they
    read it. of_peak: operations of `kernel` against those that stay in registers; of_bandwidth: bytes of packed weights
    against reading alone, for one row.
    """

    weights: str
    activations: str
    rows: int
    size: int
    columns: int
    why_not: str | None
    seconds: dict[str, float] = field(default_factory=dict)
    of_peak: float = 0.0
    of_bandwidth: float = 0.0

    @property
    def operations(self) -> int:
        """Multiplications and additions of the layer."""
        return 2 * self.rows * self.size * self.columns

    def gain(self, contestant: str, ours: str = "kernel") -> float:
        """How many times faster than a contestant ours is; 0 where it was not measured."""
        return self.seconds[contestant] / self.seconds[ours] if contestant in self.seconds else 0.0


@dataclass(frozen=True)
class Layer:
    """A layer with the input that it is measured on: f32, and its codes."""

    linear: ExactLinear
    rounded: ExactLayers
    x: Tensor
    codes: Codes | Coded

    def kernel(self) -> Tensor:
        """The layer on codes."""
        return self.linear(self.codes)

    def call(self) -> Tensor:
        """The layer on f32, rounded first."""
        return self.rounded(self.x)[0]

    def copied(self) -> Layer:
        """The same with weights of its own; before the first run."""
        linear = copy.deepcopy(self.linear)
        return replace(self, linear=linear, rounded=ExactLayers([linear], self.rounded.format))


def layer(
    weights: str, activations: str, rows: int, size: int, columns: int, accumulator: AccumulatorAttr | None = None
) -> Layer:
    """A layer [columns, size] of normally distributed weights, on as many rows of normally distributed values."""
    import torch

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, size, generator=draw)
    weight = coded(torch.randn(columns, size, generator=draw), format_of(weights, rank=2), Rounding())
    fmt = format_of(activations, rank=2)
    linear = ExactLinear(weight, None, accumulator or AccumulatorAttr.of(), fmt)
    rounded = ExactLayers([linear], str(fmt))
    return Layer(linear, rounded, x, copy.deepcopy(rounded.codes(x)))  # their memory is used again


def measure_linear(
    weights: str,
    activations: str,
    rows: int,
    size: int,
    columns: int,
    rounds: int = 7,
    peers: Mapping[str, Sequence[Run]] | None = None,
) -> MeasuredLinear:
    """One layer on one thread, with weights from memory where it has one row. `peers` run in the same rounds."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        first = layer(weights, activations, rows, size, columns)
        packed = first.linear._packed
        if packed is None:
            return MeasuredLinear(weights, activations, rows, size, columns, first.linear.why_not)
        own, few = bytes_of(packed.packed), rows == 1
        layers = [first, *(first.copied() for _ in range(_copies(own) - 1 if few else 0))]
        repeats = 1 if few else REPEATS
        runs: dict[str, Sequence[Run]] = {
            "kernel": [each.kernel for each in layers] * repeats,
            "call": [each.call for each in layers] * repeats,
        }
        runs |= {name: list(own) * repeats for name, own in _torch_runs(rows, size, columns, first.x).items()}
        runs |= {name: list(others) * repeats for name, others in (peers or {}).items()}
        limit, memory = peak(packed.path), torch.zeros(2, FROM_MEMORY if few else 0, dtype=torch.uint8)
        if few:
            runs["read"] = [_reading(part) for part in memory]
        else:
            runs["peak"] = [lambda: limit(_PEAK_ROUNDS)]
        with torch.no_grad():
            # Where weights come from memory, what the contestant before left in the caches must not help.
            found = medians(runs, rounds, before=_reading(memory) if few else None)
    finally:
        torch.set_num_threads(threads)
    of_peak = of_bandwidth = 0.0
    if few:
        of_bandwidth = own / found["kernel"] / (FROM_MEMORY / found.pop("read"))
    else:
        operations = limit.operations(_PEAK_ROUNDS) / found.pop("peak")
        of_peak = 2 * rows * size * columns / found["kernel"] / operations
    return MeasuredLinear(weights, activations, rows, size, columns, None, found, of_peak, of_bandwidth)


def _copies(size: int) -> int:
    """How many weights of so many bytes do not fit the caches together; of small ones, for a trial, some do."""
    return min(-(-FROM_MEMORY // size) + 1, 64)


def _reading(memory: Tensor) -> Run:
    return lambda: read()(memory)


def _torch_runs(rows: int, size: int, columns: int, x: Tensor) -> dict[str, Sequence[Run]]:
    """torch's f32 product, oneDNN's where torch has it, and the product of int8 matrices."""
    import torch

    weights = [torch.randn(columns, size) for _ in range(_copies(4 * size * columns) if rows == 1 else 1)]
    runs: dict[str, Sequence[Run]] = {"torch f32": [_linear(x, each) for each in weights]}
    if rows == 1:
        return runs
    if torch.backends.mkldnn.is_available():
        runs["oneDNN f32"] = [_linear(x.to_mkldnn(), weights[0].to_mkldnn(), torch.ops.aten.mkldnn_linear)]
    codes, transposed = (torch.randint(-127, 128, (n, size), dtype=torch.int8) for n in (rows, columns))
    runs["torch._int_mm"] = [_linear(codes, transposed.T, torch.ops.aten._int_mm)]
    return runs


def _linear(x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], object] | None = None) -> Run:
    import torch

    product = product or torch.nn.functional.linear
    return lambda: product(x, weight)
