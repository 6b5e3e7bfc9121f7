"""Capture: nothing frozen in silence, the model's own line in every error, rotary tables in f32, gradients."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.compiler.capture import CaptureError, capture, register, structured
from mxloom.compiler.import_graph import constants, import_program
from mxloom.compiler.simplify import simplify
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations.contraction import LinearOp, MatmulOp
from mxloom.dialects.operations.parameter import ParameterOp

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "use_cache": False,
    "attn_implementation": "eager",
}


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **changes})).eval()


def tokens(batch: int, length: int, padding: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :padding] = 0
    return {"input_ids": torch.randint(3, 64, (batch, length), generator=generator), "attention_mask": mask}


def imported(model: nn.Module, example: dict[str, Tensor], **options: Any) -> Interpreter:
    program = simplify(capture(model, example, **options))
    store = WeightStore.from_state_dict({**model.state_dict(), **constants(program)})
    return Interpreter(import_program(program), store)


class Fixed(nn.Module):
    """Its batch is a constant of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, signal: Tensor) -> Tensor:
        return self.proj(signal).reshape([2, -1])


class Branching(nn.Module):
    """It takes another way for long inputs."""

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > 8:
            return ids * 2
        return ids + 1


class DataBranch(nn.Module):
    """It takes another way for positive inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, signal: Tensor) -> Tensor:
        if signal.sum() > 0:
            return self.proj(signal)
        return signal


def line_of(text: str) -> int:
    """The line of this file that holds `text` first."""
    return next(n for n, line in enumerate(Path(__file__).read_text().splitlines(), 1) if text in line)


def test_a_llama_captured_at_2_x_8_is_right_at_every_size() -> None:
    """Field case E4: 1 x 1, 1 x 13 and 3 x 40 from an example of 2 x 8."""
    model = llama()
    run = imported(model, tokens(2, 8))
    for batch, length, padding in ((1, 1, 0), (1, 13, 4), (3, 40, 5)):
        given = tokens(batch, length, padding)
        with torch.no_grad():
            expected = model(**given).logits
        assert torch.equal(run(*given.values())[0], expected)


def test_a_frozen_batch_is_an_error_that_names_input_dimension_value_and_line() -> None:
    """Field case E4."""
    with pytest.raises(CaptureError) as error:
        capture(Fixed(), {"signal": torch.randn(2, 8)})
    message = str(error.value)
    assert "Fixed: dimension 0 of input signal became the constant 2" in message
    assert f"test_capture.py:{line_of('.reshape([2, -1])')}: return self.proj(signal).reshape([2, -1])" in message


def test_a_dimension_that_the_user_fixes_may_be_frozen() -> None:
    model = Fixed()
    run = imported(model, {"signal": torch.randn(2, 8)}, dynamic=False)
    signal = torch.randn(2, 8)
    assert torch.equal(run(signal)[0], model(signal))


def test_a_branch_on_a_size_is_an_error_that_names_the_condition_and_the_line() -> None:
    """Captured at length 10, the other way of the branch would be lost: wrong at length 4 without a word."""
    with pytest.raises(CaptureError) as error:
        capture(Branching(), {"ids": torch.ones(2, 10, dtype=torch.long)})
    message = str(error.value)
    assert "Branching: the model takes another way where not ids.shape[1] > 8" in message
    assert f"test_capture.py:{line_of('if ids.shape[1] > 8')}" in message


def test_a_branch_on_data_is_an_error_with_the_line_the_rule_and_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError) as error:
        capture(DataBranch(), {"signal": torch.randn(4, 8)})
    message = str(error.value)
    assert message.startswith("DataBranch cannot be captured\n")
    assert f"test_capture.py:{line_of('if signal.sum() > 0')}: if signal.sum() > 0:" in message
    assert "because a Python branch depends on a tensor's value" in message
    assert "def forward" not in capsys.readouterr().err, "torch's dump of the graph is not for the user"
    assert "torch.where" in message


def test_an_example_of_batch_one_is_refused() -> None:
    with pytest.raises(CaptureError, match="the example signal has size 1 in dimension 0"):
        capture(DataBranch(), {"signal": torch.randn(1, 8)})


def test_an_example_with_a_wrong_name_is_refused() -> None:
    with pytest.raises(
        CaptureError, match="the example has 'x', which is no argument of its forward; these are: signal"
    ):
        capture(DataBranch(), {"x": torch.randn(4, 8)})


def test_the_model_is_left_as_it_was() -> None:
    model = llama(use_cache=True)
    model.set_attn_implementation("sdpa")
    capture(model, tokens(2, 8))
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is True


def test_generation_with_our_attention_and_a_cache_equals_eager() -> None:
    """The attention interface is what `to_hf()` uses: a padded batch, six new tokens, the cache of transformers."""
    model = llama(use_cache=True)
    given = {**tokens(2, 7, padding=2), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**given)
    register()
    model.set_attn_implementation("mxloom")
    assert torch.equal(model.generate(**given), expected)


@cache
def mistral() -> tuple[str, WeightStore]:
    """The text of a module with a window of six tokens, and its weights."""
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=6, head_dim=16)).eval()
    program = simplify(capture(model, tokens(2, 10, padding=3)))
    store = WeightStore.from_state_dict({**model.state_dict(), **constants(program)})
    return str(import_program(program)), store


@pytest.mark.parametrize("change", ["window", "causal", "padding"])
def test_masks_matter(change: str) -> None:
    """A module whose attention loses its window, its causality or its padding gives other numbers."""
    text, store = mistral()
    module = parse_module(text)
    given = tokens(2, 12, padding=3)
    before = Interpreter(module, store)(*given.values())[0]
    (attention,) = (op for op in module.walk() if op.name == "mx.attention")
    if change == "padding":
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
    else:
        del attention.properties[change]
    after = Interpreter(module, store)(*given.values())[0]
    assert (after - before).abs().max() > 1e-3


def rotary_tables(run: Interpreter, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the module computes by cos and sin."""
    seen: dict[str, Tensor] = {}

    def observe(value: Any, tensor: Any) -> None:
        target = getattr(value.owner, "target", None)
        if target is not None and target.data in ("aten.cos.default", "aten.sin.default"):
            seen[target.data.split(".")[1]] = tensor

    run(*given.values(), observe=observe)
    return seen


def test_rotary_tables_of_a_model_cast_to_bf16_are_those_of_f32() -> None:
    """Field case E3: head size 64, base 10 000, positions to 4095, within 3e-4 of float64.

    The feature and figures of the specification: inv_freq .7498942, at position 4095 the cosine is -.089910.
    """
    model = llama(hidden_size=128, max_position_embeddings=4096).to(torch.bfloat16)
    rounded = model.model.rotary_emb.inv_freq
    run = imported(model, tokens(2, 8))
    assert model.model.rotary_emb.inv_freq is rounded, "the user's model is left as it was"
    length = 4096
    given = {"input_ids": torch.ones(1, length, dtype=torch.long), "attention_mask": torch.ones(1, length).long()}
    tables = rotary_tables(run, given)
    frequencies = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    for name, exact in (("cos", angles.cos()), ("sin", angles.sin())):
        got = tables[name][0, :, :32].double()
        assert (got - exact).abs().max() < 3e-4
    assert math.isclose(tables["cos"][0, 4095, 1].item(), -0.089910, abs_tol=3e-4)


def test_a_bf16_model_is_captured_as_the_f32_model_of_its_weights() -> None:
    model = llama().to(torch.bfloat16)
    given = tokens(2, 8, padding=2)
    run = imported(model, tokens(3, 6))
    wide = llama()
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    with torch.no_grad():
        expected = wide(**given).logits
    assert torch.equal(run(*given.values())[0], expected)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


FAMILIES = {
    "llama": llama,
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=1, n_head=2, use_cache=False)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "use_cache")})
    ),
}


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_captured_graph_are_those_of_the_model(name: str) -> None:
    """Every parameter gets the gradient that eager gives it: Fisher information and training need no more."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    model.set_attn_implementation("eager")
    given = tokens(2, 8, padding=2)
    graph = simplify(capture(model, given)).module()
    model(**given).logits.square().sum().backward()
    graph(**given).logits.square().sum().backward()
    got = {name: parameter.grad for name, parameter in graph.named_parameters()}
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(wanted) > 8
    for parameter, gradient in wanted.items():
        assert torch.equal(got[parameter], gradient), parameter  # pyright: ignore[reportArgumentType]


def test_structured_leaves_a_plain_module_alone() -> None:
    with structured(Fixed()):
        pass


class BareExperts(nn.Module):
    """Attention of 4 x [64, 64] and experts as bare 3-D parameters [E, in, out], no nn.Linear among them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(4)])
        self.gate_up = nn.Parameter(0.1 * torch.randn(4, 64, 64))
        self.down = nn.Parameter(0.1 * torch.randn(4, 32, 64))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.attention:
            x = linear(x)
        rows = x.expand(4, *x.shape)
        gate, up = torch.bmm(rows, self.gate_up).chunk(2, dim=-1)
        return torch.bmm(nn.functional.silu(gate) * up, self.down).mean(0)


def test_experts_in_bare_parameters_are_contractions_whose_weights_are_seen() -> None:
    """Field case E1: 40 960 of 40 960 weights stand in contractions, and those of [E, in, out] run along `in`."""
    torch.manual_seed(0)
    model = BareExperts().eval()
    program = simplify(capture(model, {"x": torch.randn(3, 64)}))
    module = import_program(program)
    reached = {
        op.source.data: math.prod(op.result.type.get_shape())  # pyright: ignore[reportAttributeAccessIssue]
        for op in module.walk()
        if isinstance(op, ParameterOp) and all(isinstance(use.operation, LinearOp | MatmulOp) for use in op.result.uses)
    }
    assert sum(reached.values()) == 40_960
    products = [op for op in module.walk() if isinstance(op, MatmulOp)]
    assert [op.reduced()["other"] for op in products] == [(-2,), (-2,)]
    x = torch.randn(5, 64)
    assert torch.equal(Interpreter(module, WeightStore.from_state_dict(model.state_dict()))(x)[0], model(x))
