"""What passes may ask for beside the module: the weights, and inputs to calibrate with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from xdsl.context import Context

from ..backends.weight_store import WeightStore
from ..dialects.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ._statistics import Statistics

Calibration = Callable[[int], Sequence[Sequence["Tensor"]]]
"""Answers with at most so many inputs of the module, each all of its arguments in order."""


@dataclass
class CompileContext(Context):
    """xDSL's context with the weights of the model that is compiled, and inputs that show what it computes.

    `samples` inputs are taken where a pass does not say how many; `statistics` are those of the module as it stands
    (see `statistics_of`); `task` is the model's; what passes have to tell goes into `notes`.
    """

    weights: WeightStore | None = field(default=None)
    calibration: Calibration | None = field(default=None)
    samples: int = field(default=128)
    statistics: Statistics | None = field(default=None)
    task: str | None = field(default=None)
    notes: list[str] = field(default_factory=list)


def weights_of(ctx: Context, pass_name: str) -> WeightStore:
    """The weights of the model, or an error that says why the pass cannot run without them."""
    weights = getattr(ctx, "weights", None)
    if weights is None:
        raise UsageError(
            f"the pass {pass_name!r} reads weights, and there are none here: "
            "run it through `mxloom compile`, which opens the model"
        )
    return weights


def note(ctx: Context, line: str) -> None:
    """Keep a line for the report: what a pass did, and what it left alone and why."""
    notes = getattr(ctx, "notes", None)
    if notes is not None:
        notes.append(line)


def calibration_of(ctx: Context, pass_name: str, samples: int) -> Sequence[Sequence[Tensor]]:
    """Inputs to calibrate with, or an error that says why the pass cannot run without them."""
    calibration = getattr(ctx, "calibration", None)
    found = calibration(samples) if calibration is not None else ()
    if not found:
        raise UsageError(
            f"the pass {pass_name!r} measures the ranges of values, and there are no inputs to run the model on: "
            "run it through `mxloom compile`, or give calibration= to mxloom.compile"
        )
    return found
