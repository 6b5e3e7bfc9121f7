"""`low-rank`: the error that is left against Eckart and Young, structure, store, cost, and what is refused."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportOperatorIssue=false

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mxloom.backends.reference import Interpreter
from mxloom.compiler.artefact import load, save
from mxloom.compiler.compiled import Compiled
from mxloom.compiler.driver import compile
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import encode_tensor, quantize
from mxloom.dialects.instances import format_of
from mxloom.dialects.operations.contraction import LinearOp
from mxloom.passes._context import CompileContext
from mxloom.passes._given import set_given
from mxloom.passes._sites import module_name, sites
from mxloom.passes.low_rank import LowRank

N, K, RANK = 40, 64, 8


def model(n: int = N, k: int = K) -> torch.nn.Sequential:
    """A layer whose weight has a few strong directions, as trained ones have, and columns of many sizes."""
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Linear(k, n)
    with torch.no_grad():
        strong = torch.randn(n, 3, generator=generator) @ torch.randn(3, k, generator=generator)
        layer.weight.copy_(strong + 0.3 * torch.randn(n, k, generator=generator))
    return torch.nn.Sequential(layer).eval()


def weight_of(net: torch.nn.Sequential) -> torch.Tensor:
    return net[0].weight.detach()  # pyright: ignore[reportReturnType, reportCallIssue]


def data(k: int = K) -> torch.Tensor:
    """Channels of unequal energy."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(64, k, generator=generator) * torch.logspace(-1, 1, k)


def low_rank(net: torch.nn.Sequential, options: str, weights: str = "mxfp4", **rule: Any) -> Compiled:
    recipe = {"quantize": [{"weights": weights, **rule}], "passes": [f"low-rank{{{options}}}"] if options else []}
    return compile(net, recipe, example={"input": data(weight_of(net).shape[1])})


def factors(own: Compiled) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in f64."""
    a, b = (own.weights.wide(f"0.weight.low_rank_{name}").double() for name in "ab")
    return a, b


@pytest.mark.parametrize(("n", "k"), [(40, 64), (96, 64)])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("format", ["mxfp4", "int4_g32", "nvfp4"])
def test_what_is_left_is_what_eckart_and_young_leave(format: str, scaled: bool, n: int, k: int) -> None:
    """The squares of the singular values behind the rank, of the error times the roots of E[x^2]."""
    net = model(n, k)
    own = low_rank(net, f"rank={RANK} scaled={str(scaled).lower()}", format)
    wide = weight_of(net)
    error = (wide.double() - quantize(wide, format_of(format)).double()) * (
        data(k).double().square().mean(0).sqrt() if scaled else 1.0
    )
    values = torch.linalg.svdvals(error).square()
    a, b = factors(own)
    assert a.shape == (n, RANK)
    assert b.shape == (RANK, k)
    scale = data(k).double().square().mean(0).sqrt() if scaled else torch.ones(k, dtype=torch.float64)
    left = (error - a @ b * scale).square().sum()
    assert left <= values.sum()
    assert torch.isclose(left, values[RANK:].sum(), rtol=1e-3)


def test_data_tells_which_channels_count() -> None:
    """Outputs miss less than without: that is what the scaling is for."""
    net, x = model(), data()
    missed = {
        options: float((low_rank(net, options)(x) - net(x)).detach().square().sum())
        for options in ("", f"rank={RANK} scaled=false", f"rank={RANK}")
    }
    plain, unscaled, scaled = missed.values()
    assert scaled < unscaled < plain


def test_the_layer_is_a_sum_of_two() -> None:
    """Q(W) x + bias + A (B x) in f64, the thin layers reading x as bf16 beside the layer's own rounding."""
    net, x = model(), data()
    own = low_rank(net, f"rank={RANK}", activations="mxint8")
    a, b = factors(own)
    q = quantize(weight_of(net), format_of("mxfp4")).double()
    rounded = quantize(x, format_of("mxint8")).double()
    thin = (x.bfloat16().double() @ b.T).float().bfloat16().double()
    wanted = rounded @ q.T + net[0].bias.detach().double() + thin @ a.T
    found = own(x)
    assert torch.allclose(found.double(), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert torch.equal(Interpreter(own.module, own.weights)(x)[0], found)
    names = [module_name(op) for op in own.module.walk() if isinstance(op, LinearOp)]
    assert names == ["0", "0.low_rank_b", "0.low_rank_a"]
    formats = {site.name: str(site.format) for site in sites(own.module)}
    assert formats["0.low_rank_a.input"] == formats["0.low_rank_b.weight"] == "bf16"


def test_cost_counts_what_is_added() -> None:
    plain, own = (low_rank(model(), options).cost() for options in ("", f"rank={RANK}"))
    assert own.macs - plain.macs == data().shape[0] * RANK * (N + K) // data().shape[0]
    assert own.bytes - plain.bytes == 2 * RANK * (N + K)


@pytest.mark.parametrize("order", ["after", "before"])
def test_either_order_misses_less_than_rounding_alone(order: str) -> None:
    """An outlier column goes into the wide part, so that what is rounded has smaller blocks."""
    net = model()
    with torch.no_grad():
        weight_of(net)[:, 7] *= 20
    x = data()
    plain, own = low_rank(net, "", "mxint4"), low_rank(net, f"rank={RANK} order={order}", "mxint4")
    missed = [float((each(x) - net(x)).detach().square().sum()) for each in (plain, own)]
    assert missed[1] < missed[0]


def test_before_rounds_what_the_thin_layers_leave() -> None:
    """The weight in the store and A B make the old weight: in float nothing changes."""
    net, x = model(), data()
    own = low_rank(net, f"rank={RANK} order=before format=f32")
    a, b = factors(own)
    held = own.weights.wide("0.weight").double() + a @ b
    assert torch.allclose(held, weight_of(net).double(), rtol=1e-5, atol=1e-6)
    for op in [op for op in own.module.walk() if op.name == "mx.cast"]:
        op.result.replace_all_uses_with(op.input)
    (found,) = Interpreter(own.module, own.weights)(x)
    assert float((found - net(x)).detach().norm() / net(x).detach().norm()) < 1e-5


def test_a_format_for_the_thin_layers() -> None:
    own = low_rank(model(), f"rank={RANK} format=mxint8")
    formats = {site.name: str(site.format) for site in sites(own.module)}
    assert formats["0.low_rank_b.weight"] == "!mx.block<32x!mx.fixed<8, 6>>"
    assert {t.name: t.format for t in own.cost().tensors}["0.weight.low_rank_b"] == "mxint8"


def test_codes_that_a_pass_decided() -> None:
    """The error of the codes that are there, whoever chose them."""
    net = model()
    own = low_rank(net, "")
    site = next(site for site in sites(own.module) if site.role == "weight")

    worse = encode_tensor(weight_of(net) * 1.1, format_of("mxfp4"))
    set_given(site, own.weights, worse)
    context = CompileContext(weights=own.weights)
    LowRank(rank=RANK, scaled=False).apply(context, own.module)
    a, b = factors(own)
    error = weight_of(net).double() - worse.decode().double()
    left = (error - a @ b).square().sum()
    assert torch.isclose(left, torch.linalg.svdvals(error).square()[RANK:].sum(), rtol=1e-3)
    with pytest.raises(UsageError, match=r"low-rank\{order=before\}: the codes of the weight of 0 are decided"):
        LowRank(rank=RANK, scaled=False, order="before").apply(context, own.module)


GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
RULE = {"weights": "mxfp4", "activations": "mxint8"}


def test_models_of_layers_in_either_layout(tmp_path: Path) -> None:
    """GPT-2: weights [K, N], and a head that shares the embedding's, which stays as it is."""
    torch.manual_seed(0)
    own = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2))
    own.save_pretrained(tmp_path / "own")
    ids = torch.arange(3, 10)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    recipe = {"quantize": [RULE], "passes": ["low-rank{rank=4 order=before}"]}
    found = compile(tmp_path / "own", recipe, calibration=[given])
    wte = "transformer.wte.weight"
    assert torch.equal(found.weights.wide(wte), own.transformer.wte.weight)
    taken = [found.weights.wide(f"{wte}.low_rank_{name}").double() for name in "ab"]
    assert torch.allclose(
        found.weights.wide(f"{wte}.residual").double(),
        own.transformer.wte.weight.double() - taken[0] @ taken[1],
        atol=1e-6,
    )
    again = load(save(found, tmp_path / "artefact"))
    assert torch.equal(again(**given).logits, found(**given).logits)
    with pytest.raises(MxloomError, match=r"low_rank_b is no module of"):
        found.to_hf()


REFUSED = {
    "rank=0": "rank is 1 or more, got 0",
    "order=later": "order is after or before, got 'later'",
    "rank=8 match=head": "'head' matches 0 of 1 linear layers",
    "rank=40": "has no effect: 0 has 64 inputs and 40 outputs, and a rank of 40 is no less",
    "format=fp4": "unknown format 'fp4'",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items())
def test_refused(options: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        low_rank(model(), options)


def test_no_format_no_data() -> None:
    with pytest.raises(UsageError, match="low-rank has no effect: 0 has a weight in no narrow format"):
        compile(model(), {"passes": ["low-rank{rank=8}"]}, example={"input": data()})
    own = low_rank(model(), "")
    with pytest.raises(UsageError, match="low-rank"):
        LowRank(rank=RANK).apply(CompileContext(weights=own.weights), own.module)


def test_a_layer_that_gains_nothing_is_told() -> None:
    """A weight that its format holds exactly has no error to give back."""
    net = model()
    with torch.no_grad():
        weight_of(net).sign_()
    with pytest.raises(UsageError, match="would miss no less with a rank of 8 than by rounding alone"):
        low_rank(net, f"rank={RANK}")
