"""Operations of an emulation that read codes of their operands: a module that makes the codes, then calls the function.

For the definitions on torch tensors that no kernel has taken over: sums into windows under float scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xdsl.ir import SSAValue

from ..dialects.contractions import Coded, coded
from ..dialects.formats import Rounding
from ..dialects.operations._operation import AsCodes, Call
from ..dialects.operations._shapes import element_of
from ..dialects.operations._values import torch_dtype
from ..dialects.operations.cast import CastOp

if TYPE_CHECKING:
    from torch import nn


def on_codes(call: Call, constants: Mapping[Any, Any]) -> tuple[nn.Module, list[SSAValue]]:
    """The module of a call, and the values that it takes, in order.

    A value that a cast makes is taken from under the cast, as its codes need what the cast was given.
    """
    values: list[SSAValue] = []
    arguments: list[Any] = []
    for argument in call.args:
        if isinstance(argument, AsCodes) and argument in constants:
            arguments.append(constants[argument])
        elif isinstance(argument, AsCodes) and argument.value not in constants:
            owner = argument.value.owner
            how = owner.how() if isinstance(owner, CastOp) else Rounding()
            values.append(owner.input if isinstance(owner, CastOp) else argument.value)
            arguments.append(("codes", element_of(argument.value), how, argument.transposed))
        elif isinstance(argument, AsCodes):  # only the code of the graph is wanted
            arguments.append(None)
        elif isinstance(argument, SSAValue):
            values.append(argument)
            arguments.append(("value",))
        else:
            arguments.append(argument)
    return _module(call, arguments), values


def _module(call: Call, arguments: list[Any]) -> nn.Module:
    import torch
    from torch import nn

    wanted = None if call.dtype is None else torch_dtype(call.dtype)

    class OnCodes(nn.Module):
        """Calls a function of codes; constant codes are buffers, so that they move with the module."""

        def __init__(self) -> None:
            super().__init__()
            self.arguments = list(arguments)
            for place, argument in enumerate(arguments):
                if isinstance(argument, Coded):
                    # codes are numbers of 16 bits at most: f32 holds them in half the memory
                    self.register_buffer(f"codes_{place}", argument.codes.to(torch.float32))
                    self.register_buffer(f"factors_{place}", argument.factors)
                    self.register_buffer(f"over_{place}", argument.over)
                    self.arguments[place] = replace(argument, codes=argument.factors, over=None)

        def forward(self, *given: Any) -> Any:
            left = iter(given)
            return call.target(*(self._argument(place, left) for place in range(len(self.arguments))), **call.kwargs)

        def _argument(self, place: int, left: Any) -> Any:
            argument = self.arguments[place]
            match argument:
                case Coded():
                    codes, factors = getattr(self, f"codes_{place}"), getattr(self, f"factors_{place}")
                    over = getattr(self, f"over_{place}")
                    return replace(argument, codes=codes.to(torch.float64), factors=factors, over=over)
                case ("codes", fmt, how, transposed):
                    return coded(next(left), fmt, how, transposed=transposed)
                case ("value",):
                    value = next(left)
                    return value.to(wanted) if wanted is not None and value.is_floating_point() else value
            return argument

    return OnCodes()
