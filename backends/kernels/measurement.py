"""How fast the kernels are here: against torch's `copy_` and against the same numerics in torch's operations.

Every figure is a median over rounds in which all contestants run in turn, so that what else the machine does meets them
alike. Times are CPU time of the process where one thread runs, so that waiting for a core does not count.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...dialects import formats
from ...dialects.formats import Rounding
from ...dialects.instances import format_of
from . import _prepared
from . import statistics as statistics_of_blocks
from ._prepared import Prepared
from .fake_quantization import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

LARGE, SMALL = (4096, 4096), (128, 1024)
"""A tensor that no cache holds (64 MiB), and one that the second cache holds (512 KiB)."""


@dataclass(frozen=True)
class Measured:
    """One format: times of `copy_` over times of the kernel, of the eager definition over the kernel, first uses."""

    format: str
    why_not: str | None
    from_memory: float = 0.0
    in_cache: float = 0.0
    over_eager: float = 0.0
    first_use: float = 0.0
    from_disk: float = 0.0


def measure(name: str, rounds: int = 7) -> Measured:
    """The figures of one format on this machine, one thread; `first_use` and `from_disk` in CPU seconds."""
    import torch

    fmt, threads = format_of(name, rank=2), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = prepare(fmt, Rounding(), LARGE, torch.float32)
        if isinstance(found, str):
            return Measured(name, found)
        first_use, from_disk = _first_uses(name)
        from_memory, over_eager = _ratios(name, LARGE, rounds, 1, eager=True)
        in_cache, _ = _ratios(name, SMALL, rounds, 50, eager=False)
    finally:
        torch.set_num_threads(threads)
    return Measured(name, None, from_memory, in_cache, over_eager, first_use, from_disk)


def copy_bandwidth(shape: tuple[int, int], rounds: int = 7) -> float:
    """Bytes a second that `copy_` reads and writes, one thread."""
    import torch

    x = torch.ones(shape, dtype=torch.float32)
    y = torch.empty_like(x)
    repeats = max(1, LARGE[0] * LARGE[1] // x.numel() // 4)
    return 2 * x.nbytes / statistics.median(_time(lambda: y.copy_(x), repeats) for _ in range(rounds))


def _ratios(name: str, shape: tuple[int, int], rounds: int, repeats: int, *, eager: bool) -> tuple[float, float]:
    import torch

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out, fmt = torch.empty_like(x), format_of(name, rank=2)
    kernel = prepare(fmt, Rounding(), shape, torch.float32)
    assert isinstance(kernel, Prepared)
    kernel(x, out)
    copies, kernels, eagers = [], [], []
    for _ in range(rounds):
        copies.append(_time(lambda: out.copy_(x), repeats))
        kernels.append(_time(lambda: kernel(x, out), repeats))
        if eager and len(eagers) < 3:
            eagers.append(_time(lambda: formats.quantize(x, fmt), 1))
    typical = statistics.median(kernels)
    return statistics.median(copies) / typical, statistics.median(eagers) / typical if eagers else 0.0


def _first_uses(name: str) -> tuple[float, float]:
    """CPU seconds of the first rounding with nothing kept, and with the kernel on disk alone."""
    import torch

    x: Tensor = torch.ones(4, 64, dtype=torch.float32)
    fmt = format_of(name, rank=2)
    with tempfile.TemporaryDirectory() as folder, _cache_at(folder):
        times = []
        for _ in range(2):
            _forget()
            begin = time.process_time()
            kernel = prepare(fmt, Rounding(), tuple(x.shape), torch.float32)
            assert isinstance(kernel, Prepared)
            kernel(x, None)
            times.append(time.process_time() - begin)
    _forget()
    return times[0], times[1]


def _forget() -> None:
    for function in (
        prepare,
        _prepared._kernel,
        _prepared._largest_kernel,
        statistics_of_blocks._kernel,
    ):
        function.cache_clear()


@contextmanager
def _cache_at(folder: str) -> Iterator[None]:
    before = os.environ.get("MXLOOM_CACHE")
    os.environ["MXLOOM_CACHE"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["MXLOOM_CACHE"]
        else:
            os.environ["MXLOOM_CACHE"] = before


def _time(run: Callable[[], object], repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - begin) / repeats
