"""What passes may ask for beside the module: the weights, and how to report progress."""

from __future__ import annotations

from dataclasses import dataclass, field

from xdsl.context import Context

from ..backends.weight_store import WeightStore
from ..dialects.errors import UsageError


@dataclass
class CompileContext(Context):
    """xDSL's context with the weights of the model that is compiled."""

    weights: WeightStore | None = field(default=None)


def weights_of(ctx: Context, pass_name: str) -> WeightStore:
    """The weights of the model, or an error that says why the pass cannot run without them."""
    weights = getattr(ctx, "weights", None)
    if weights is None:
        raise UsageError(
            f"the pass {pass_name!r} reads weights, and there are none here: "
            "run it through `mxloom compile`, which opens the model"
        )
    return weights
