"""The commands on a small language model in a folder: what they print, write, refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from mxloom.compiler.command_line import main

HIDDEN, INTERMEDIATE, HEADS, KEY_VALUE_HEADS, LAYERS, HEAD = 64, 96, 4, 2, 2, 16
TEXT = "And God said, Let there be light: and there was light. " * 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights in bf16, tied embeddings, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "genesis.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def artefact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefacts") / "mxfp4"
    assert main(["compile", str(model), "--weights", "mxfp4", "--activations", "mxint8", "--out", str(folder)]) == 0
    return folder


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """What a command prints with --json: one document alone on stdout."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_compile_writes_one_folder(artefact: Path) -> None:
    files = {file.name for file in artefact.iterdir()}
    assert {"module.mlir", "weights.safetensors", "config.json", "report.json", "provenance.json"} <= files
    assert "!mx.block<32xf4E2M1FN>" in (artefact / "module.mlir").read_text()
    provenance = json.loads((artefact / "provenance.json").read_text())
    assert provenance["pipeline"] == "quantize{weights=mxfp4 activations=mxint8}"


def test_compile_says_what_became_of_the_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        'version: 1\nquantize:\n- {match: "*lm_head", keep: f32}\n'
        "- {kind: linear, weights: nvfp4, activations: mxint8}\n- {kind: attention, attention: mxint8}\n"
    )
    assert main(["compile", str(model), "--recipe", str(recipe), "--out", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "lm_head" in captured.out
    assert f"wrote {tmp_path / 'out'}" in captured.out
    assert "quantize" in captured.err
    assert "wrote" not in captured.err


def test_compile_in_json(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "r.yaml"
    (tmp_path / "text.txt").write_text(TEXT)
    recipe.write_text(
        "version: 1\nquantize: [{weights: mxfp4, activations: mxint8}]\n"
        "evaluate: {text: text.txt, context: 32, limit: 2}\n"
    )
    out = tmp_path / "out"
    results = document(capsys, "compile", str(model), "--recipe", str(recipe), "--out", str(out))
    assert results["folder"] == str(out)
    assert results["cost"]["quantized_weight_bits"] == 4.25
    assert results["recipe"]["quantize"] == [{"weights": "mxfp4", "activations": "mxint8"}]
    evaluated = document(capsys, "eval", str(out), "--text", str(text), "--context", "32", "--limit", "2")
    assert results["evaluation"]["perplexity"] == evaluated["perplexity"]


def test_eval_against_the_float_model(
    model: Path, artefact: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(artefact), "--text", str(text), "--context", "64", "--limit", "3"]
    results = document(capsys, *arguments, "--against", str(model))
    assert results["perplexity"] > 1
    assert document(capsys, *arguments)["perplexity"] == results["perplexity"]
    itself = document(capsys, "eval", str(model), *arguments[2:])
    assert itself["perplexity"] != results["perplexity"]


def test_inspect_in_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = document(capsys, "inspect", str(model), "--batch", "1", "--sequence", "8")
    check_counts(results, tokens=8)
    check_ties_groups_and_wide(results)


def check_counts(results: Any, tokens: int) -> None:
    """Multiply-accumulates and bytes follow from the shapes."""
    layers = {layer["module"]: layer for layer in results["layers"]}
    down = layers["model.layers.1.mlp.down_proj"]
    assert down["weight"] == [HIDDEN, INTERMEDIATE]
    assert down["macs"] == tokens * HIDDEN * INTERMEDIATE
    assert down["weight_bytes"] == 2 * HIDDEN * INTERMEDIATE
    assert layers["model.layers.0.self_attn.k_proj"]["weight"] == [KEY_VALUE_HEADS * HEAD, HIDDEN]
    linear = HIDDEN * (2 * HEADS + 2 * KEY_VALUE_HEADS) * HEAD + 3 * HIDDEN * INTERMEDIATE
    attention = 2 * tokens * HEADS * HEAD
    assert results["macs"] == tokens * (LAYERS * (linear + attention) + HIDDEN * 257)


def check_ties_groups_and_wide(results: Any) -> None:
    """Tied names, operands that read one value, and parameters that no contraction reads."""
    assert results["ties"] == {"lm_head.weight": "model.embed_tokens.weight"}
    attention = {f"model.layers.0.self_attn.{name}_proj.input" for name in "qkv"}
    assert attention in [set(members) for members in results["groups"].values()]
    wide = {entry["name"]: entry["why"] for entry in results["wide"]}
    assert wide["model.norm.weight"] == "read by rms_norm"
    assert not any("proj" in name for name in wide)


def test_inspect_folds_layers_that_repeat(artefact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artefact)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model.layers.*.mlp.up_proj", "linear", "96x64", "2"] in [row[:4] for row in rows]
    assert ["model.layers.*.self_attn.attention", "attention", "-", "2"] in [row[:4] for row in rows]


def test_a_rule_that_matches_nothing_is_an_error_with_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        'version: 1\nquantize:\n- {weights: mxfp4, match: "re:.*gate"}\n- {match: gate_proj, keep: f32}\n'
    )
    out = tmp_path / "out"
    assert main(["compile", str(model), "--recipe", str(recipe), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"mxloom: {recipe}:4: " in error
    assert "matches 0 of " in error
    assert "mlp.gate_proj" in error
    assert not out.exists()


def test_a_folder_of_others_is_not_overwritten(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert main(["compile", str(model), "--weights", "mxfp4", "--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
