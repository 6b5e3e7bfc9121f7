"""The main job on the embedded model: compile, evaluate, count, save, load, generate."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import mxloom

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "models" / "kjv-2m"
RECIPE = ROOT / "examples" / "recipes" / "demo_mixed.yaml"


@pytest.fixture(scope="module")
def wide() -> mxloom.Compiled:
    return mxloom.compile(MODEL)


@pytest.fixture(scope="module")
def mixed(wide: mxloom.Compiled) -> mxloom.Compiled:
    return mxloom.compile(wide.source, RECIPE)


@pytest.fixture(scope="module")
def folder(mixed: mxloom.Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixed.save(tmp_path_factory.mktemp("artefact") / "mixed")


def tokens() -> torch.Tensor:
    return torch.randint(5, 1000, (2, 40), generator=torch.Generator().manual_seed(0))


def test_the_wide_module_is_the_model_of_transformers(wide: mxloom.Compiled):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(wide(input_ids=tokens()).logits, model(tokens(), use_cache=False).logits)


def test_a_loaded_artefact_runs_bit_identically(mixed: mxloom.Compiled, folder: Path):
    loaded = mxloom.load(folder)
    assert torch.equal(loaded(input_ids=tokens()).logits, mixed(input_ids=tokens()).logits)
    assert str(loaded.module.body.block.first_op.attributes) == str(mixed.module.body.block.first_op.attributes)


def test_the_file_holds_what_the_report_counts(mixed: mxloom.Compiled, folder: Path):
    """Bits from the bytes of the file's tensors, against bits from types, within 0.01."""
    report = json.loads((folder / "report.json").read_text())
    with safe_open(folder / "weights.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 (no mapping)
    assert abs(8 * stored / report["cost"]["parameters"] - report["cost"]["weight_bits"]) < 0.01
    assert report["cost"]["weight_bits"] == mixed.cost().weight_bits == mxloom.load(folder).cost().weight_bits


def test_formats_rank_as_theory_says(wide: mxloom.Compiled):
    """More bits, nearer to float: MXINT8 < MXFP8 < MXFP4 in KL, and the order of MXINT4 behind MXINT8."""
    text = MODEL / "held_out.txt"
    told = mxloom.remembered(wide)
    divergence = {}
    for format in ("mxint8", "mxfp8_e4m3", "mxfp4", "mxint4"):
        quantized = mxloom.compile(
            wide.source, {"quantize": [{"kind": "linear", "weights": format, "activations": format}]}
        )
        divergence[format] = mxloom.evaluate(quantized, text, against=told, context=256, limit=4).against.kl_mean
    assert 0 < divergence["mxint8"] < divergence["mxfp8_e4m3"] < divergence["mxfp4"]
    assert divergence["mxint8"] < divergence["mxint4"]


def test_generation_from_a_loaded_artefact(folder: Path):
    loaded = mxloom.load(folder)
    produced = loaded.to_hf().generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = tokens()
    for _ in range(4):
        ids = torch.cat([ids, loaded(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(produced, ids)
