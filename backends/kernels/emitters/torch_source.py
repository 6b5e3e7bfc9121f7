"""The block function as torch source: eager operations, on any device that torch has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from xdsl.dialects import arith, math
from xdsl.dialects.builtin import f32, f64, i1, i32, i64

from ._spelling import Language, function_text

if TYPE_CHECKING:
    from xdsl.dialects.func import FuncOp

TORCH = Language(
    name="torch",
    # Never a number of Python: on GPUs torch divides by those, and by tensors on the CPU, through their reciprocal.
    constant="torch.full((), {value}, dtype={type}, device=DEVICE)",
    bitcast="{0}.view({type})",
    types={
        f32: "torch.float32",
        f64: "torch.float64",
        i1: "torch.bool",
        i32: "torch.int32",
        i64: "torch.int64",
    },
    calls={
        arith.DivfOp: "torch.div({0}, {1})",
        arith.MaxSIOp: "torch.maximum({0}, {1})",
        arith.MinSIOp: "torch.minimum({0}, {1})",
        arith.ShRUIOp: "({0} >> {1}) & ~(-2 << (31 - {1}))",  # the shift of i32 brings the sign along
        arith.SelectOp: "torch.where({0}, {1}, {2})",
        arith.ExtFOp: "{0}.to(torch.float64)",
        arith.TruncFOp: "{0}.to(torch.float32)",
        math.RoundEvenOp: "torch.round({0})",
        math.TruncOp: "torch.trunc({0})",
    },
    wide={},
    bounds={"ogt": "torch.minimum({0}, {1})", "olt": "torch.maximum({0}, {1})"},
)


def torch_source(function: FuncOp, arguments: Sequence[str]) -> str:
    """Python source of a function on tensors whose last dimension are the lanes, leading ones the blocks.

    Scalars of the function are tensors whose last dimension is 1, or of no dimension. Constants lie where the first
    argument does. Raises MxloomError for an operation that has no form in torch.
    """
    lines = [line.replace("DEVICE", f"{arguments[0]}.device") for line in function_text(function, TORCH, arguments)]
    return "\n".join(["import torch", "", "", *lines, ""])


def torch_function(function: FuncOp, arguments: Sequence[str]) -> Callable[..., Any]:
    """The function that `torch_source` writes out."""
    name = function.sym_name.data
    space: dict[str, Callable[..., Any]] = {}
    exec(compile(torch_source(function, arguments), f"<mxloom @{name}>", "exec"), space)
    return space[name]
