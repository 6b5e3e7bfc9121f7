"""`residual-channels`: values against the augmented product in plain torch, channels, structure, cost, refusals."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false

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
from mxloom.dialects.formats import quantize
from mxloom.dialects.instances import format_of
from mxloom.passes._context import CompileContext
from mxloom.passes._sites import sites
from mxloom.passes.residual_channels import ResidualChannels

N, K = 24, 64


def model(k: int = K) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(k, N)).eval()


def weight_of(net: torch.nn.Sequential) -> torch.Tensor:
    return net[0].weight.detach()  # pyright: ignore[reportReturnType]


def data() -> torch.Tensor:
    """Channels whose largest magnitudes are 1 to 2, but for four: 120, 80, 40 and 18."""
    x = torch.randn(50, K, generator=torch.Generator().manual_seed(1))
    largest = torch.linspace(1, 2, K)
    largest[[5, 40, 17, 33]] = torch.tensor([120.0, 80.0, 40.0, 18.0])
    return x / x.abs().amax(0) * largest


def augmented(net: torch.nn.Sequential, options: str, format: str = "nvfp4", weights: str = "nvfp4") -> Compiled:
    rule = {"weights": weights, "activations": format}
    recipe = {"quantize": [rule], "passes": [f"residual-channels{{{options}}}"]}
    return compile(net, recipe, example={"input": data()})


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize(
    ("format", "weights", "count"),
    [("nvfp4", "nvfp4", 16), ("mxfp4", "mxint8", 32), ("int4_channel", "int8_channel", 4)],
)
def test_the_augmented_product_of_the_paper(format: str, weights: str, count: int, reorder: bool) -> None:
    """[Q(X) | Q(X_o - Q(X_o))] [Q(W) | Q(W_o)]' in f64; above 1/8 of the largest lie four channels."""
    net, x = model(), data()
    own = augmented(net, f"reorder={str(reorder).lower()}", format, weights)
    order = x.abs().amax(0).argsort(descending=True)
    outliers = order[:count] if reorder else order[:count].sort().values
    arranged = order if reorder else torch.arange(K)
    given, weight = format_of(format), format_of(weights)
    rounded = quantize(x[:, arranged].contiguous(), given)
    here = torch.tensor([arranged.tolist().index(channel) for channel in outliers.tolist()])
    residual = quantize(x[:, outliers] - rounded[:, here], given)
    left = torch.cat([rounded, residual], 1).double()
    right = torch.cat([quantize(w, weight) for w in (weight_of(net)[:, arranged], weight_of(net)[:, outliers])], 1)
    wanted = left @ right.double().T + net[0].bias.detach().double()
    found = own(x)
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(Interpreter(own.module, own.weights)(x)[0], found)


@pytest.mark.parametrize("options", ["", "reorder=false", "top=16"])
def test_without_casts_nothing_changes(options: str) -> None:
    """The residual of what is not rounded is 0."""
    net, x = model(), data()
    own = augmented(net, options)
    for op in [op for op in own.module.walk() if op.name == "mx.cast"]:
        op.result.replace_all_uses_with(op.input)
    (found,) = Interpreter(own.module, own.weights)(x)
    wanted = net(x).detach()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_outputs_are_nearer_with_residuals() -> None:
    net, x = model(), data()
    plain = compile(net, {"quantize": [{"activations": "nvfp4"}]}, example={"input": x})
    recipe = {"quantize": [{"activations": "nvfp4"}]}
    missed = [float((plain(x) - net(x)).detach().norm())]
    for passes in ("residual-channels{reorder=false}", "residual-channels", "residual-channels{top=48}"):
        own = compile(net, {**recipe, "passes": [passes]}, example={"input": x})
        missed.append(float((own(x) - net(x)).detach().norm()))
    assert missed == sorted(missed, reverse=True)


@pytest.mark.parametrize(
    ("options", "channels"), [("share=0.5", 16), ("top=1", 16), ("top=17", 32), ("top=63", 64), ("share=0.001", 64)]
)
def test_channels_come_in_whole_blocks(options: str, channels: int) -> None:
    own = augmented(model(), options)
    assert own.weights.shape("0.weight.residual_channels") == (N, channels)


def test_types_are_visible_and_counted() -> None:
    own = augmented(model(), "")
    formats = {site.name: str(site.format) for site in sites(own.module)}
    nvfp4 = str(format_of("nvfp4"))
    assert formats == dict.fromkeys(
        ("0.input", "0.weight", "0.residual_channels.input", "0.residual_channels.weight"), nvfp4
    )
    plain = compile(model(), {"quantize": [{"weights": "nvfp4", "activations": "nvfp4"}]}, example={"input": data()})
    assert own.cost().macs - plain.cost().macs == 16 * N * own.sizes(1)[0][0]
    added = {t.name: t.format for t in own.cost().tensors}
    assert added["0.weight.residual_channels"] == "nvfp4"


class Shared(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.one, self.other = torch.nn.Linear(K, N), torch.nn.Linear(K, N, bias=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.one(input) * self.other(input)


def test_layers_that_read_one_value_share_its_residual() -> None:
    net = Shared().eval()
    recipe = {"quantize": [{"weights": "mxint8", "activations": "nvfp4"}], "passes": ["residual-channels"]}
    own = compile(net, recipe, example={"input": data()})
    names = [op.name for op in own.module.walk()]
    assert names.count("mx.sub") == names.count("mx.aten") == 1
    assert names.count("mx.linear") == 4
    two = [site.value for site in sites(own.module) if site.name.endswith("residual_channels.input")]
    assert two[0] is two[1]


GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}


def test_models_of_layers_in_either_layout(tmp_path: Path) -> None:
    """GPT-2: weights [K, N], and a head that shares the embedding's, which stays as it is."""
    torch.manual_seed(0)
    own = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)).eval()
    own.save_pretrained(tmp_path / "own")
    rule = {"weights": "mxint8", "activations": "mxint8"}
    ids = torch.arange(3, 10)[None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = compile(tmp_path / "own", {"quantize": [rule]})
    recipe = {"quantize": [rule], "passes": ["residual-channels{top=32}"]}
    found = compile(tmp_path / "own", recipe, calibration=[given])
    with torch.no_grad():
        wanted = own(**given).logits
    missed = [float((each(**given).logits - wanted).norm()) for each in (plain, found)]
    assert missed[1] < missed[0]
    assert torch.equal(found.weights.wide("transformer.wte.weight"), own.transformer.wte.weight)
    again = load(save(found, tmp_path / "artefact"))
    assert torch.equal(again(**given).logits, found(**given).logits)
    with pytest.raises(MxloomError, match="residual_channels is no module of"):
        found.to_hf()


def test_accumulators_after_residuals() -> None:
    recipe = {
        "quantize": [{"weights": "mxint8", "activations": "mxint8"}],
        "passes": ["residual-channels", "accumulate"],
    }
    own, x = compile(model(), recipe, example={"input": data()}), data()
    assert str(own.module).count("acc = ") == 2
    assert torch.equal(Interpreter(own.module, own.weights)(x)[0], own(x))


REFUSED = {
    "share=1.0": "share lies between 0 and 1, got 1.0",
    "top=0": "top is a number of 1 or more, got 0",
    "match=head": "'head' matches 0 of 1 linear layers",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items())
def test_refused(options: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        augmented(model(), options)


def test_no_format_no_data() -> None:
    with pytest.raises(UsageError, match="residual-channels has no effect: 0 reads its input in no narrow format"):
        compile(
            model(), {"quantize": [{"weights": "mxfp4"}], "passes": ["residual-channels"]}, example={"input": data()}
        )
    with pytest.raises(UsageError, match="residual-channels: the codes of the weight of 0 are decided already"):
        rule = {"weights": "mxfp4", "activations": "mxfp4"}
        compile(model(), {"quantize": [rule], "passes": ["clip", "residual-channels"]}, example={"input": data()})
    own = compile(model(), {"quantize": [{"activations": "mxfp4"}]}, example={"input": data()})
    with pytest.raises(UsageError, match="residual-channels"):
        ResidualChannels().apply(CompileContext(weights=own.weights), own.module)
