"""What every operation answers: verification, shape, MACs and meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xdsl.dialects.builtin import TensorType
from xdsl.ir import Attribute, SSAValue
from xdsl.irdl import IRDLOperation, traits_def
from xdsl.traits import Pure
from xdsl.utils.exceptions import VerifyException

from ._shapes import Shape, ShapeOf, fits, shape_of, text


@dataclass(frozen=True)
class Call:
    """What an operation computes: a torch operator applied to arguments in which SSA values stand for what they hold.

    `dtype`, where it is set, is the element type to which every float tensor among the arguments is converted first:
    an operation computes as wide as its widest operand or result.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: Attribute | None = None


@dataclass(frozen=True)
class AsCodes:
    """Stands in a call for a value's codes and factors (`contractions.Coded`), K being its last dimension.

    `transposed` says that K is the last but one dimension of the value.
    """

    value: SSAValue
    transposed: bool = False


class Operation(IRDLOperation):
    """An operation of `mx`: it computes wide and rounds once into the type of its result."""

    traits = traits_def(Pure())

    def result_shape(self) -> Shape | None:
        """Shape of the (first) result as the operands imply it; None where it is not determined by them."""
        return None

    def check(self) -> None:
        """Rules of the operation beyond types and the shape of the result; raises VerifyException."""

    def macs(self, shapes: ShapeOf = shape_of) -> int:
        """Multiply-accumulates for the stated shapes (`shapes` answers for every value, no `?` left)."""
        return 0

    def call(self) -> Call:
        """The meaning on torch tensors."""
        raise NotImplementedError(f"{self.name} has no meaning on torch tensors")

    def shape_call(self) -> Call:
        """A call on plain tensors whose results have the shapes and dtypes of those of `call`."""
        return self.call()

    def verify_(self) -> None:
        from .. import formats

        for value in (*self.operands, *self.results):
            if isinstance(value.type, TensorType):
                formats.verify_tensor(value.type)
        self.check()
        expected = self.result_shape()
        if expected is not None and not fits(expected, shape_of(self.results[0])):
            raise VerifyException(
                f"{self.name}: the operands give a result of shape {text(expected)}, "
                f"but its type says {text(shape_of(self.results[0]))}"
            )

    def require(self, condition: bool, message: str) -> None:
        """Raise VerifyException with the operation's name and `message` unless `condition` holds."""
        if not condition:
            raise VerifyException(f"{self.name}: {message}")
