"""Import: one node one operation, names and places of the model, nothing dropped in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from xdsl.dialects.builtin import FileLineColLoc, ModuleOp

from mxloom.backends.reference import Interpreter, body
from mxloom.backends.weight_store import WeightStore
from mxloom.compiler.capture import capture
from mxloom.compiler.import_graph import constants, import_program
from mxloom.compiler.simplify import simplify
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations._values import path_of


def program_of(model: nn.Module, **example: Tensor) -> Any:
    return simplify(capture(model, example))


def module_of(model: nn.Module, **example: Tensor) -> ModuleOp:
    return import_program(program_of(model, **example))


def operations(module: ModuleOp) -> list[Any]:
    return [op for op in body(module).ops if op.name.startswith("mx.")]


def agrees(model: nn.Module, module: ModuleOp, program: Any, *given: Tensor) -> bool:
    text = parse_module(str(module))
    store = WeightStore.from_state_dict({**model.state_dict(), **constants(program)})
    return torch.equal(Interpreter(text, store)(*given)[0], model(*given))


class Named(nn.Module):
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)])
        self.register_buffer("offset", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc_1(self.fc_1(x))
        for block in self.blocks:
            x = block(x)
        return x * self.offset + torch.tensor([0.5])


def test_values_bear_the_names_of_the_models_modules() -> None:
    """A module that runs twice gets `.1`; a name that ends in a number survives xDSL, which cuts such ends off."""
    module = parse_module(str(module_of(Named(), x=torch.randn(2, 8))))
    named = [(op.name, path_of(op.results[0])) for op in operations(module)]
    linears = [path for name, path in named if name == "mx.linear"]
    assert linears == ["fc_1", "fc_1.1", "blocks.0.0", "blocks.1.0"]
    parameters = {path for name, path in named if name == "mx.parameter"}
    assert {"fc_1.weight", "fc_1.bias", "blocks.0.0.weight", "offset"} <= parameters
    hints = [result.name_hint for op in body(module).ops for result in op.results]
    assert len(hints) == len(set(hints)), "every name is there once"


def test_parameters_are_called_as_the_state_dict_calls_them_and_the_rest_are_constants() -> None:
    model = Named()
    program = program_of(model, x=torch.randn(2, 8))
    sources = [op.source.data for op in operations(import_program(program)) if op.name == "mx.parameter"]
    held = constants(program)
    assert set(sources) == set(model.state_dict()) | set(held)
    assert torch.equal(held["offset"], torch.arange(8.0))
    (lifted,) = set(held) - {"offset"}
    assert torch.equal(held[lifted], torch.tensor([0.5]))
    assert agrees(model, import_program(program), program, torch.randn(5, 8))


def test_an_operation_knows_its_line_in_the_models_code() -> None:
    (product,) = (op for op in operations(module_of(Named(), x=torch.randn(2, 8))) if op.name == "mx.mul")
    place = product.location
    assert isinstance(place, FileLineColLoc)
    assert place.filename.data.endswith("test_import_graph.py")
    assert "x * self.offset" in Path(__file__).read_text().splitlines()[place.line.data - 1]


class Odd(nn.Module):
    """Arguments that the declared operations do not have."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, x, alpha=3)
        x = torch.div(x, 2.0, rounding_mode="floor")
        return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3)


def test_an_argument_that_no_declaration_has_keeps_the_node_opaque() -> None:
    """`alpha`, `rounding_mode`, `divisor_override`: dropped they would change the result."""
    model = Odd()
    program = program_of(model, x=torch.randn(2, 3, 4, 4))
    module = import_program(program)
    assert [op.target.data for op in operations(module)] == [
        "aten.add.Tensor",
        "aten.div.Tensor_mode",
        "aten.avg_pool2d.default",
    ]
    assert agrees(model, module, program, torch.randn(3, 3, 4, 4))


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.masked_fill(x < 0, float("-inf"))
        return torch.cat([x, torch.full((1, 4), float("nan")), torch.full((1, 4), 1e-45)]).nan_to_num(nan=-0.0)


def test_numbers_that_are_not_finite_survive_the_text() -> None:
    model = Infinite()
    program = program_of(model, x=torch.randn(2, 4))
    given = torch.randn(3, 4)
    store = WeightStore.from_state_dict(constants(program))
    got = Interpreter(parse_module(str(import_program(program))), store)(given)[0]
    assert torch.equal(got.view(torch.int32), model(given).view(torch.int32))


class Sizes(nn.Module):
    """Arithmetic on sizes, and sizes as arguments among numbers."""

    def forward(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        half = ids[:, length // 2 :]
        grown = half.reshape(batch, 1, -1).expand(batch, 3, length - length // 2)
        return torch.cat([grown, torch.zeros(batch, 3, max(length, 4), dtype=torch.long)], dim=2)


def test_sizes_are_values_of_the_module() -> None:
    model = Sizes()
    program = program_of(model, ids=torch.ones(2, 6, dtype=torch.long))
    module = import_program(program)
    names = {op.name for op in operations(module)}
    assert {"mx.size", "mx.sym", "mx.expand", "mx.slice"} <= names
    for batch, length in ((1, 5), (4, 9), (2, 2)):
        given = torch.arange(batch * length).reshape(batch, length)
        assert agrees(model, module, program, given)


class Several(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        values, places = x.topk(2)
        first, *_ = x.split([1, 3], dim=1)
        return {"values": values, "places": places, "first": first, "nothing": None, "again": x}


def test_all_tensors_of_an_output_come_back_in_order() -> None:
    model = Several()
    program = program_of(model, x=torch.randn(2, 4))
    x = torch.randn(3, 4)
    got = Interpreter(import_program(program), WeightStore.from_state_dict({}))(x)
    expected = [value for value in model(x).values() if value is not None]
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class Counting(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count


def test_a_model_that_changes_its_own_state_is_refused() -> None:
    with pytest.raises(MxloomError, match=r"changes its own state \(count\) while it runs"):
        module_of(Counting(), x=torch.randn(2, 4))


class Conditional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,))


def test_control_flow_is_refused_with_its_line() -> None:
    with pytest.raises(MxloomError, match=r"test_import_graph\.py:\d+: .*torch\.where|branches"):
        module_of(Conditional(), x=torch.randn(2, 4))
