"""A pass outside of mxloom's repository: every cast clips its blocks to a share of their largest value."""

from dataclasses import dataclass

from xdsl.context import Context
from xdsl.dialects.builtin import FloatAttr, ModuleOp, f64
from xdsl.passes import ModulePass
from xdsl.universe import Universe


@dataclass(frozen=True)
class ToyClip(ModulePass):
    """Set `clip` of every cast to `ratio`."""

    name = "toy-clip"

    ratio: float = 0.95

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        for inner in op.walk():
            if inner.name == "mx.cast":
                inner.properties["clip"] = FloatAttr(self.ratio, f64)


TOY_UNIVERSE = Universe(all_passes={"toy-clip": lambda: ToyClip})
