"""Statistics of modules in tests: collected from inputs, found by the name of a site, compared with f64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from xdsl.dialects.builtin import ModuleOp

from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.mx import parse_module
from mxloom.passes._context import CompileContext
from mxloom.passes._sites import Site, sites
from mxloom.passes._statistics import Statistics
from mxloom.passes.calibrate import Calibrate


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def collected(module: ModuleOp, weights: WeightStore, inputs: list[list[Tensor]], **options: Any) -> Statistics:
    """What `calibrate` with these options leaves for the passes behind it."""
    ctx = CompileContext(weights=weights, calibration=lambda samples: inputs[:samples])
    Calibrate(**options).apply(ctx, module)
    assert ctx.statistics is not None
    return ctx.statistics


def of_text(
    text: str, weights: dict[str, Tensor], *inputs: list[Tensor], **options: Any
) -> tuple[Statistics, Callable[[str], Site]]:
    """The statistics of a module given as text, and its sites by name."""
    module = parse_module(text)
    return collected(module, WeightStore.from_state_dict(weights), list(inputs), **options), site_in(module)


def site_in(module: ModuleOp) -> Callable[[str], Site]:
    """The sites of a module by name."""
    named = {site.name: site for site in sites(module) if site.role != "cache"}
    return named.__getitem__


def near(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> bool:
    """Whether f32 sums are near their f64 ones, measured on the largest."""
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max())
