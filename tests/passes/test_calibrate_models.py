"""`calibrate` on models: every sum equals what plain torch hooks find on the model's twin in f64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mxloom
from mxloom.backends.reference import body
from mxloom.compiler.driver import import_source
from mxloom.compiler.model_source import ModelSource, open_model
from mxloom.passes import _segments
from mxloom.passes._observed import plan_of
from mxloom.passes._sites import Site, sites
from mxloom.passes._statistics import Statistics

from .calibrated import collected, near, random, site_in


class Hooks:
    """What hooks on the layers of a model see: their inputs, and the gradients of these and of their weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = copy.deepcopy(model).double().eval()
        kinds = nn.Linear | nn.Conv2d | nn.Conv1d
        self.layers: dict[str, Any] = {n: m for n, m in self.model.named_modules() if isinstance(m, kinds)}
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self.squares: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(lambda _, given, name=name: self._see(name, given[0]))

    def _see(self, name: Any, given: Tensor) -> None:
        if given.requires_grad and not given.is_leaf:
            given.retain_grad()
        self.inputs[name].append(given)

    def backward(self, loss: Tensor) -> None:
        """Add the squares of one sequence's gradients."""
        self.model.zero_grad()
        loss.backward()
        for name, layer in self.layers.items():
            square = layer.weight.grad.square()
            self.squares[name] = self.squares.get(name, torch.zeros_like(square)) + square

    def gradients(self, name: str) -> Tensor:
        """Of a layer's input, by all that read it: [rows, channels]."""
        found = [given.grad for given in self.inputs[name]]
        return torch.cat([gradient.flatten(0, -2) for gradient in found if gradient is not None])

    def rows(self, name: str) -> Tensor:
        """A layer's inputs: [rows, channels]."""
        return torch.cat([given.detach().reshape(-1, given.shape[-1]) for given in self.inputs[name]])


IDS = torch.randint(0, 97, (5, 12), generator=torch.Generator().manual_seed(3))

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}


@cache
def llama(*, tied: bool) -> ModelSource:
    """A language model, captured once."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied, initializer_range=0.2)
    source = open_model(transformers.LlamaForCausalLM(config).eval(), example={"input_ids": IDS})
    import_source(source)
    return source


@pytest.fixture(scope="module", params=["tied", "untied"])
def seen(request: pytest.FixtureRequest) -> tuple[Statistics, Callable[[str], Site], Hooks]:
    """The statistics of a language model, and what hooks on its twin in f64 saw, one sequence at a time."""
    source = llama(tied=request.param == "tied")
    module = import_source(source).clone()
    found = collected(module, source.weights, [[IDS]], shard=2)
    hooks = Hooks(source.model)
    # The head's own part of a tied table's gradient: as if it were a matrix of its own.
    hooks.model.lm_head.weight = nn.Parameter(hooks.model.lm_head.weight.detach().clone())
    for row in IDS:
        logits = hooks.model(input_ids=row[None]).logits[0]
        hooks.backward(nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum"))
    return found, site_in(module), hooks


def test_every_hessian_of_a_language_model(seen: tuple[Statistics, Callable[[str], Site], Hooks]) -> None:
    found, site, hooks = seen
    assert len(hooks.layers) == 3 * 7 + 1
    for name in hooks.layers:
        rows = hooks.rows(name)
        assert len(rows) == 60
        for operand in ("weight", "input"):
            assert near(found.hessian(site(f"{name}.{operand}")), 2 * rows.T @ rows / 60)


def test_every_range_of_a_language_model(seen: tuple[Statistics, Callable[[str], Site], Hooks]) -> None:
    found, site, hooks = seen
    for name in hooks.layers:
        rows, inputs = hooks.rows(name), found.inputs(site(f"{name}.weight"))
        assert inputs.rows == 60
        assert near(inputs.minimum, rows.amin(0))
        assert near(inputs.maximum, rows.amax(0))
        assert near(inputs.largest, rows.abs().amax(0))
        assert near(inputs.mean, rows.mean(0), 1e-4)
        assert near(inputs.mean_magnitude, rows.abs().mean(0))
        assert near(inputs.mean_square, rows.square().mean(0))


def test_every_weight_has_its_squared_gradients_sequence_by_sequence(
    seen: tuple[Statistics, Callable[[str], Site], Hooks],
) -> None:
    found, site, hooks = seen
    for name in hooks.layers:
        assert near(found.fisher(site(f"{name}.weight")), hooks.squares[name] / 5)


def test_inputs_have_the_gradients_of_all_that_read_them(seen: tuple[Statistics, Callable[[str], Site], Hooks]) -> None:
    """q, k and v read one value, and so do gate and up: where its rounding goes, all of them go."""
    found, site, hooks = seen
    for name in ("self_attn.o_proj", "mlp.down_proj"):  # one reader: the gradient of the value is that of the reader
        path = f"model.layers.1.{name}"
        gradients = hooks.gradients(path)
        assert near(found.fisher(site(f"{path}.input")), gradients.square().mean(0))
    for readers in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        paths = [f"model.layers.1.{reader}" for reader in readers]
        assert all(hooks.inputs[path][0] is hooks.inputs[paths[0]][0] for path in paths)
        gradients = hooks.gradients(paths[0])
        for path in paths:
            assert near(found.fisher(site(f"{path}.input")), gradients.square().mean(0))


def test_a_table_has_the_gradients_of_the_rows_that_were_looked_up() -> None:
    source = llama(tied=False)
    module = import_source(source).clone()
    found = collected(module, source.weights, [[IDS]], kinds=("fisher",))
    wanted = torch.zeros(97, 32, dtype=torch.float64)
    twin: Any = copy.deepcopy(source.model).double()
    for row in IDS:
        twin.zero_grad()
        logits = twin(input_ids=row[None]).logits[0]
        nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
        wanted += twin.model.embed_tokens.weight.grad.square()
    assert near(found.fisher(site_in(module)("model.embed_tokens.weight")), wanted / 5)


def test_segments_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module in one piece, and cut wherever it may be: the same sums, up to the order in which f32 adds."""
    source = llama(tied=True)
    module = import_source(source).clone()
    found: list[Statistics] = []
    for target in (1 << 40, 1):
        monkeypatch.setattr(_segments, "TARGET", target)
        found.append(collected(module, source.weights, [[IDS]]))
    whole, cut = found
    for site in sites(module):
        if not site.is_probabilities:
            assert near(cut.fisher(site), whole.fisher(site).double(), 1e-6)
        if site.role in ("weight", "activation") and site.kind != "embedding":
            assert torch.equal(cut.hessian(site), whole.hessian(site))


class Convolutional(nn.Module):
    """Strides, paddings, dilations, groups, a depthwise layer, one dimension, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.groups = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2)
        self.depthwise = nn.Conv2d(12, 12, (1, 3), groups=12)
        self.line = nn.Conv1d(12, 6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.depthwise(torch.relu(self.groups(torch.relu(self.stem(x))))))
        return self.head(torch.relu(self.line(x.mean(2))).mean(2))


def columns(layer: Any, given: Tensor) -> Tensor:
    """im2col by torch's own: [groups, rows, channels * kernel]."""
    line = isinstance(layer, nn.Conv1d)
    padding: Any = (0, *layer.padding) if line else layer.padding
    kernel, dilation, stride = (
        (1, *sizes) if line else sizes for sizes in (layer.kernel_size, layer.dilation, layer.stride)
    )
    unfolded = nn.functional.unfold(given if given.ndim == 4 else given[:, :, None], kernel, dilation, padding, stride)
    rows = unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
    return torch.stack(rows.chunk(layer.groups, 1))


def test_convolutions_have_the_hessian_of_their_windows_group_by_group() -> None:
    model, x = Convolutional().eval(), random(4, 3, 9, 11)
    source = open_model(model, example={"x": x})
    module = import_source(source).clone()
    found, site = collected(module, source.weights, [[x]], fisher="kl"), site_in(module)
    hooks = Hooks(model)
    for image in x.double():
        hooks.model(image[None])
    for name in ("stem", "groups", "depthwise", "line"):
        layer = hooks.layers[name]
        rows = torch.cat([columns(layer, given.detach()) for given in hooks.inputs[name]], 1)
        wanted = 2 * rows.transpose(1, 2) @ rows / rows.shape[1]
        wanted = wanted[0] if layer.groups == 1 else wanted
        assert near(found.hessian(site(f"{name}.weight")), wanted)
        assert found.hessian_rows(site(f"{name}.weight")).tolist() == [rows.shape[1]] * layer.groups
        channels = torch.cat(
            [given.detach().movedim(1, -1).reshape(-1, given.shape[1]) for given in hooks.inputs[name]]
        )
        assert near(found.inputs(site(f"{name}.input")).largest, channels.abs().amax(0))
        assert near(found.inputs(site(f"{name}.input")).mean_square, channels.square().mean(0))
        assert found.fisher(site(f"{name}.weight")).shape == layer.weight.shape


class Shared(nn.Module):
    """One layer that is applied twice; of one number the squared gradients do not hang on its sign."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))).sum(1, keepdim=True)


def test_a_weight_read_twice_has_all_rows_and_the_whole_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_segments, "TARGET", 1)
    model, x = Shared().eval(), random(8, 6)
    source = open_model(model, example={"x": x})
    module = import_source(source).clone()
    found = collected(module, source.weights, [[x]])
    weights = [site for site in sites(module) if site.role == "weight"]
    assert len(weights) == 2
    hooks = Hooks(model)
    hooks.model(x.double())
    rows = hooks.rows("layer")
    assert len(rows) == 16
    for row in x.double():
        hooks.backward(hooks.model(row[None]).sum())
    for site in weights:
        assert near(found.hessian(site), 2 * rows.T @ rows / 16)
        assert found.inputs(site).rows == 16
        assert near(found.inputs(site).largest, rows.abs().amax(0))
        assert near(found.fisher(site), hooks.squares["layer"] / 8)


class Remembered(nn.Module):
    """A value that layers read one after the other, as decoders read what an encoder made."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.memory = nn.Linear(6, 6)
        self.readers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.tanh(self.memory(x))
        for reader in self.readers:
            x = torch.tanh(x + reader(memory))
        return x.sum(1, keepdim=True)


def test_a_value_that_several_segments_read_has_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_segments, "TARGET", 1)
    monkeypatch.setattr(_segments, "NEAR", 1)
    model, x = Remembered().eval(), random(8, 6)
    source = open_model(model, example={"x": x})
    module = import_source(source).clone()
    plan = plan_of(module)
    assert len(_segments.segments_of(body(module), plan, _segments.fixed_values(body(module)))) >= 4
    found, site, hooks = collected(module, source.weights, [[x]]), site_in(module), Hooks(model)
    for row in x.double():
        hooks.backward(hooks.model(row[None]).sum())
    for name in hooks.layers:
        assert near(found.fisher(site(f"{name}.weight")), hooks.squares[name] / 8)
    # The memory is read by the three readers alone, so its gradient is that of all that read it.
    assert near(found.fisher(site("readers.1.input")), hooks.gradients("readers.0").square().mean(0))
    assert torch.equal(found.fisher(site("readers.0.input")), found.fisher(site("readers.2.input")))


def test_float_statistics_are_those_of_the_model_before_its_casts() -> None:
    wide = llama(tied=True)
    before = collected(import_source(wide), wide.weights, [[IDS]])
    narrow = mxloom.compile(wide, weights="mxfp4", activations="mxfp4")
    after = collected(narrow.module, narrow.weights, [[IDS]])
    emulated = collected(narrow.module, narrow.weights, [[IDS]], numerics="emulated")
    first, later = (
        site_in(narrow.module)("model.layers.0.self_attn.q_proj.weight"),
        "model.layers.2.mlp.down_proj.weight",
    )
    site, own = site_in(narrow.module)(later), site_in(import_source(wide))(later)
    assert torch.equal(after.hessian(site), before.hessian(own))
    assert torch.equal(after.fisher(site), before.fisher(own))
    # Inputs of the first layer stand under its cast and nothing rounded comes before them; those of later layers do.
    assert torch.equal(emulated.hessian(first), after.hessian(first))
    assert not near(emulated.hessian(site), after.hessian(site).double(), 1e-2)


def test_the_pass_is_one_of_a_recipe_and_its_notes_are_in_the_report() -> None:
    recipe = {"passes": ["calibrate{kinds=ranges,hessian samples=2}"]}
    compiled = mxloom.compile(llama(tied=True), recipe, calibration=[IDS[:1]])
    (note,) = compiled.report()["notes"]
    assert "rests on 12 rows for 32 columns and" in note
