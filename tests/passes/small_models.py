"""Small modules for tests of passes, with inputs to calibrate with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from xdsl.dialects.builtin import ModuleOp

from mxloom.compiler.driver import import_source
from mxloom.compiler.model_source import open_model
from mxloom.compiler.pipeline import apply_pass, parse_passes
from mxloom.passes._context import CompileContext


class Mlp(nn.Module):
    """Two linears over correlated inputs; the second's weight is stored transposed."""

    def __init__(self, width: int = 64, outputs: int = 48) -> None:
        super().__init__()
        self.first = nn.Linear(width, 96)
        self.second = nn.Parameter(torch.randn(96, outputs) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(self.first(x)) @ self.second


def correlated(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows whose columns hang together, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width) * 0.3
    scale = 1 + 8 * (torch.arange(width) % 17 == 3)
    return torch.randn(rows, width, generator=generator) @ mixing * scale


def prepared(
    model: nn.Module, example: dict[str, Any], inputs: list[Any], pipeline: str, task: str | None = None
) -> tuple[ModuleOp, Any]:
    """The module of a model after a pipeline, and the context with its weights and notes.

    `inputs` are what passes calibrate with, each all arguments of the module.
    """
    source = open_model(model, example=example)
    module = import_source(source).clone()
    context = CompileContext(weights=source.weights.copy(), calibration=lambda samples: inputs[:samples], task=task)
    run(module, context, pipeline)
    return module, context


def run(module: ModuleOp, context: CompileContext, pipeline: str) -> None:
    """More passes over a module."""
    for step in parse_passes(pipeline):
        apply_pass(step, context, module)
