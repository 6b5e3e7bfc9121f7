"""Where a scale of input channels can be folded: found by structure, in many architectures; the function stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mxloom.dialects.errors import UsageError
from mxloom.passes._channels import Channels, UnfollowedError, along, reshaped
from mxloom.passes._folding import Fold, find_fold
from mxloom.passes._scaled_parameters import Parameters
from mxloom.passes._sites import sites
from mxloom.passes._smoothing import Group, groups_of, scale_at_run_time

from .scaled_models import MODELS, Captured, assert_same, captured, model


def scaled_everywhere(held: Captured, *, online: bool = False, spread: float = 1.0) -> list[Group]:
    """Put an uneven scale into every group that takes one, between 1/8 and 8 or so."""
    groups = groups_of(held.module)
    parameters, generator = Parameters(held.module, held.weights, "smoothed"), np.random.default_rng(0)
    for group in groups:
        assert group.fold is not None
        count = group.fold.channels.count
        drawn = generator.lognormal(0, spread, count)
        scale = group.fold.channels.gathered([(np.arange(count), drawn)], np.maximum)
        if group.reason is None:
            parameters.apply(group.fold, scale)
        elif online:
            scale_at_run_time(group, scale, parameters)
    held.module.verify()
    return groups


def folds(groups: list[Group]) -> dict[str, str]:
    return {group.name: group.fold.into for group in groups if group.fold is not None and group.reason is None}


@pytest.mark.parametrize("name", MODELS)
def test_folded_or_at_run_time_the_function_stays(name: str) -> None:
    held = model(name)
    before = held.outputs()
    groups = scaled_everywhere(held, online=True)
    assert_same(held.outputs(), before)
    weighted = {site.operation for site in sites(held.module) if site.role == "activation"}
    assert {site.operation for group in groups for site in group.sites} == weighted
    assert 0.9 < sum(group.share for group in groups) <= 1


LAYER = "model.layers.0"
LLAMA = {
    f"{LAYER}.self_attn.q_proj, {LAYER}.self_attn.k_proj, {LAYER}.self_attn.v_proj": f"{LAYER}.input_layernorm",
    f"{LAYER}.self_attn.o_proj": f"{LAYER}.self_attn.v_proj",
    f"{LAYER}.mlp.gate_proj, {LAYER}.mlp.up_proj": f"{LAYER}.post_attention_layernorm",
    f"{LAYER}.mlp.down_proj": f"{LAYER}.mlp.up_proj",
    "lm_head": "model.norm",
}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", LLAMA),
        ("qwen3", LLAMA),
        ("gemma", LLAMA),
        (
            "phi3",
            {
                f"{LAYER}.self_attn.qkv_proj": f"{LAYER}.input_layernorm",
                f"{LAYER}.self_attn.o_proj": f"{LAYER}.self_attn.qkv_proj",
                f"{LAYER}.mlp.gate_up_proj": f"{LAYER}.post_attention_layernorm",
                f"{LAYER}.mlp.down_proj": f"{LAYER}.mlp.gate_up_proj",
            },
        ),
        (
            "mixtral",
            {
                f"{LAYER}.mlp.gate, {LAYER}.mlp.experts": f"{LAYER}.post_attention_layernorm",
                f"{LAYER}.mlp.experts.1": f"{LAYER}.mlp.experts",
            },
        ),
        (
            "gpt2",
            {
                "transformer.h.0.attn.c_attn": "transformer.h.0.ln_1.",
                "transformer.h.0.attn.c_proj": "transformer.h.0.attn.c_attn",
                "transformer.h.0.mlp.c_fc": "transformer.h.0.ln_2.",
            },
        ),
        (
            "bert",
            {
                "bert.encoder.layer.0.attention.output.dense": "bert.encoder.layer.0.attention.self.value",
                "bert.pooler.dense": "bert.encoder.layer.0.output.LayerNorm",
            },
        ),
        ("vit", {"vit.layers.0.mlp.fc1": "vit.layers.0.layernorm_after", "classifier": "vit.layernorm"}),
    ],
)
def test_what_makes_a_value_takes_the_inverse(name: str, wanted: dict[str, str]) -> None:
    found = folds(groups_of(model(name).module))
    assert {reads: found.get(reads) for reads in wanted} == {k: v.removesuffix(".") for k, v in wanted.items()}


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        ("gpt2", "transformer.h.0.mlp.c_proj", "mx.pow"),
        ("bert", "bert.encoder.layer.0.attention.self.query", "LayerNorm (mx.layer_norm) reads it"),
        ("bert", "bert.encoder.layer.0.output.dense", "mx.gelu"),
        ("bert", "classifier", "mx.tanh"),
        ("vit", "vit.embeddings.patch_embeddings.projection", "pixel_values is an input of the model"),
    ],
)
def test_a_group_that_cannot_says_why(name: str, module: str, reason: str) -> None:
    (group,) = [g for g in groups_of(model(name).module) if any(site.module == module for site in g.sites)]
    assert group.reason is not None
    assert reason in group.reason


def test_attention_beside_the_mlp_with_one_norm_for_each() -> None:
    found = folds(groups_of(model("gpt_neox").module))
    layer = "gpt_neox.layers.0"
    assert found[f"{layer}.attention.query_key_value"] == f"{layer}.input_layernorm"
    assert found[f"{layer}.mlp.dense_h_to_4h"] == f"{layer}.post_attention_layernorm"


class Parallel(nn.Module):
    """One norm for attention's value and the MLP, one of which alone would not do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.a, self.b, self.c = nn.Linear(16, 8), nn.Linear(16, 12, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.a(y), self.b(y.reshape(-1, 16)).reshape(*y.shape[:-1], 12), self.c(y[:, -1:])], -1)


def test_every_reader_of_the_value_takes_the_scale() -> None:
    held = captured(Parallel(), {"x": torch.randn(3, 1, 16)})
    before = held.outputs()
    assert folds(scaled_everywhere(held)) == {"a, b, c": "norm"}
    assert_same(held.outputs(), before)


class Tied(nn.Module):
    """A table that the head reads too, a linear that is used twice, a norm weight with another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.both = nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.both(torch.relu(self.both(self.norm(x))))
        return self.norm(x * self.norm.weight) @ self.table.weight.T


def test_weights_with_other_readers_are_copied_and_stay() -> None:
    held = captured(Tied(), {"tokens": torch.tensor([[1, 2, 3], [4, 5, 19]])})
    before, stored = held.outputs(), {name: held.weights[name].clone() for name in held.weights}
    (table,) = [name for name in stored if name.startswith("table")]
    groups = scaled_everywhere(held)
    assert [group.reason for group in groups] == [None, None, None]
    assert_same(held.outputs(), before)
    assert held.weights[table].equal(stored[table])
    made = set(held.names()) - stored.keys()
    assert {name.rpartition(".")[0] for name in made} <= stored.keys()
    assert {name.rpartition(".")[0] for name in made} >= {table, "norm.weight", "both.weight", "both.bias"}
    assert table in held.names()


def test_a_tied_table_is_not_touched() -> None:
    held = model("llama_tied")
    name = held.weights.canonical("model.embed_tokens.weight")
    before, table = held.outputs(), held.weights[name].clone()
    assert folds(scaled_everywhere(held))["lm_head"] == "model.norm"
    assert held.weights[name].equal(table)
    assert [n for n in held.names() if n.startswith(name)] == [name, f"{name}.smoothed"]
    assert_same(held.outputs(), before)


class Gemma(nn.Module):
    """RMSNorm with the gain 1 + w, and a linear that reads it."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.norm_weight, self.linear = nn.Parameter(torch.tensor(weight)), nn.Linear(len(weight), 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.linear((scaled * (1.0 + self.norm_weight.float())).type_as(x))


def gemma(weight: list[float], scale: list[float]) -> tuple[Captured, list[Tensor], list[Tensor]]:
    held = captured(Gemma(weight), {"x": torch.randn(4, len(weight))})
    held.weights.put("norm_weight", torch.tensor(weight))
    before = held.outputs()
    Parameters(held.module, held.weights, "smoothed").apply(fold_of(held, "linear"), np.array(scale))
    held.module.verify()
    return held, before, held.outputs()


def test_norms_with_a_gain_of_1_plus_w() -> None:
    """Field case P2: new w = (1 + w) / s - 1; w / s would be wrong."""
    held, before, after = gemma([0.5, -0.25, 0.0], [2.0, 0.5, 4.0])
    assert held.weights["norm_weight"].tolist() == [-0.25, 0.5, -0.75]
    assert_same(after, before, 1e-6)


def test_a_gain_near_0_is_kept_as_such() -> None:
    """(1 + w) / s of 1e-6 is w = -0.999999, of which f32 holds the gain to 6 % only."""
    held, before, after = gemma([0.5, -0.25, 0.0], [1e6, 3e5, 1e6])
    assert_same(after, before, 1e-6)
    assert held.weights["norm_weight.smoothed"].tolist() == pytest.approx([1.5e-6, 2.5e-6, 1e-6], rel=1e-6)


def test_heads_that_share_a_value_share_its_scale() -> None:
    """Four heads of eight channels over two of values: 32 inputs of the projection are 16 channels."""
    fold = fold_of(model("llama"), f"{LAYER}.self_attn.o_proj")
    first = fold.channels.first(np.arange(32)).reshape(2, 2, 8)
    assert (first == first[:, :1]).all()
    assert len(np.unique(first)) == 16


class Convolutions(nn.Module):
    """Two convolutions, one of them depthwise, pooling, a batch norm, two kinds of rectifiers, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.norm, self.prelu = nn.BatchNorm2d(8), nn.PReLU(8)
        self.grouped, self.last = nn.Conv2d(8, 6, 1, groups=2), nn.Linear(6 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.leaky_relu(self.first(x), 0.1)
        x = self.prelu(self.norm(self.depth(x)))
        x = torch.relu(self.grouped(nn.functional.max_pool2d(x, 2)))
        return self.last(x.flatten(1))


def test_convolutions_take_scales() -> None:
    held = captured(Convolutions(), {"x": torch.randn(2, 3, 8, 8)})
    before = held.outputs()
    groups = scaled_everywhere(held)
    assert folds(groups) == {"depth": "first", "grouped": "norm", "last": "grouped"}
    fold = fold_of(held, "last")
    assert len(np.unique(fold.channels.first(np.arange(54)))) == 6
    assert_same(held.outputs(), before)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(torch.relu(x + self.b(x)))


def test_a_sum_scales_both_of_its_parts() -> None:
    held = captured(Residual(), {"x": torch.randn(3, 8)})
    before = held.outputs()
    groups = scaled_everywhere(held)
    assert folds(groups) == {"b, c": "b, a"}
    assert_same(held.outputs(), before)


class Refusing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.a(x)
        if self.how == "returned":
            return self.b(y), y
        if self.how == "square":
            return self.b(y * y)
        if self.how == "twice":
            return self.b(y) + y.softmax(-1)
        return self.b(nn.functional.linear(x, self.a.weight * self.a.bias[:, None] + self.b.weight.exp()))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("returned", "a is a result of the model"),
        ("square", "multiplies two values that are scaled both"),
        ("twice", "softmax"),
        ("computed", "is computed in the model"),
    ],
)
def test_what_forbids_a_fold(how: str, reason: str) -> None:
    held = captured(Refusing(how), {"x": torch.randn(3, 8)})
    with pytest.raises(UnfollowedError, match=reason):
        fold_of(held, "b")


def fold_of(held: Captured, module: str) -> Fold:
    (found,) = [s for s in sites(held.module) if s.module == module and s.role == "activation"]
    return find_fold(found)


def test_a_pattern_that_names_no_module_is_told_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"matches 0 of 8 modules \(did you mean .*o_proj"):
        groups_of(model("llama").module, "*.o_porj")


def test_labels_follow_reshapes_where_sizes_are_known() -> None:
    from mxloom.dialects.operations._shapes import UNKNOWN as U

    heads = reshaped(along(64, 2, 3), (U, U, 64), (U, U, 4, 16))
    assert heads.shape == (1, 1, 4, 16)
    assert heads.ravel().tolist() == list(range(64))
    pixels = reshaped(along(3, 1, 4), (U, 3, 2, 2), (U, 12))
    assert pixels.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert reshaped(along(4, 1, 3), (2, 4, 3), (2, 12)).shape == (1, 12)
    with pytest.raises(UnfollowedError, match=r"\[\?, 4, \?\] becomes \[\?, \?\]"):
        reshaped(along(4, 1, 3), (U, 4, U), (U, U))


def test_channels_that_are_one_are_scaled_alike() -> None:
    channels = Channels(5)
    channels.unite(np.array([0, 1, 2]), np.array([1, 1, 5]))  # 5 is no channel: nothing scales it
    assert channels.first(np.arange(6)).tolist() == [0, 0, 5, 3, 4, 5]
    assert channels.gathered([(np.arange(5), np.array([3.0, 7, 9, 1, 2]))], np.maximum).tolist() == [7, 7, 9, 1, 2]
    assert channels.spread(np.array([2.0, 2, 9, 4, 8]), np.array([[0, 1], [2, 4]])).tolist() == [[2, 2], [1, 8]]
