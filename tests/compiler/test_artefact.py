"""Artefacts: what is loaded runs bit for bit as what was saved; nothing is half-written, nothing is believed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig

import mxloom
from mxloom.backends.safetensors_file import SafetensorsFile
from mxloom.compiler import _atomic
from mxloom.compiler.artefact import load, save
from mxloom.compiler.compiled import Compiled
from mxloom.compiler.inspection import inspect
from mxloom.compiler.model_source import open_model
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import MixedType, block_impact, storage_bits
from mxloom.dialects.instances import format_of

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: transformers.LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=512, n_embd=32, n_layer=1, n_head=4)
    ),
    "bert": lambda: transformers.BertModel(BertConfig(**SIZES)),
}
MIXED = {"weights": "mxfp4", "activations": "mxint8"}
TOKENS = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 3, 4, 5, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models, saved as transformers does; weights in bf16."""
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().to(torch.bfloat16).save_pretrained(root / name)
    return {name: root / name for name in MODELS}


Compile = Callable[..., Compiled]


@pytest.fixture(scope="module")
def compiled_as(folders: dict[str, Path]) -> Compile:
    """Compiles one of the models by rules; every model is captured once."""
    sources: dict[str, Any] = {}

    def compile(name: str, *rules: dict[str, str]) -> Compiled:
        sources[name] = sources.get(name) or open_model(folders[name])
        return mxloom.compile(sources[name], {"version": 1, "quantize": list(rules)} if rules else None)

    return compile


@pytest.fixture(scope="module")
def saved(compiled_as: Compile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in MXFP4 with activations in MXINT8, saved."""
    return save(compiled_as("llama", MIXED), tmp_path_factory.mktemp("artefacts") / "a")


@pytest.fixture
def artefact(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(saved, tmp_path / "a"))


def first(outputs: Any) -> torch.Tensor:
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


@pytest.mark.parametrize("rules", [(), (MIXED,), ({"weights": "nvfp4"},)], ids=["wide", "mixed", "nvfp4"])
@pytest.mark.parametrize("name", MODELS)
def test_loaded_runs_bit_for_bit(
    name: str, rules: tuple[dict[str, str], ...], compiled_as: Compile, tmp_path: Path
) -> None:
    compiled = compiled_as(name, *rules)
    assert save(compiled, tmp_path / "a") == tmp_path / "a"
    loaded = load(tmp_path / "a")
    assert first(loaded(**TOKENS)).equal(first(compiled(**TOKENS)))
    assert loaded.pipeline == compiled.pipeline
    assert loaded.recipe == compiled.recipe
    assert (loaded.source.name, loaded.source.task) == (compiled.source.name, compiled.source.task)
    again = save(loaded, tmp_path / "b")
    assert (again / "module.mlir").read_bytes() == (tmp_path / "a" / "module.mlir").read_bytes()
    assert (again / "weights.safetensors").read_bytes() == (tmp_path / "a" / "weights.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_loaded_generates_as_what_was_saved(name: str, compiled_as: Compile, tmp_path: Path) -> None:
    compiled = compiled_as(name, MIXED)
    save(compiled, tmp_path / "a")
    logits = [model.to_hf()(**TOKENS).logits for model in (compiled, load(tmp_path / "a"))]
    assert logits[0].equal(logits[1])


def test_files(saved: Path) -> None:
    names = {path.name for path in saved.iterdir()}
    assert names >= {"module.mlir", "weights.safetensors", "config.json", "report.json", "provenance.json"}
    provenance = json.loads((saved / "provenance.json").read_text())
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["pipeline"]
    for name, digest in provenance["files"].items():
        assert hashlib.sha256((saved / name).read_bytes()).hexdigest() == digest
    assert set(provenance["files"]) == names - {"provenance.json"}
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["mxloom"]["format_version"] == 1


def test_stored_bits_are_those_of_the_formats(saved: Path) -> None:
    """The file's tensors, counted without our store, take what the formats say; wide ones stay bf16."""
    file = SafetensorsFile(saved / "weights.safetensors")
    parts = [name for name in file if name.startswith("model.layers.0.mlp.down_proj.weight.")]
    assert sum(file.entries[name].bits for name in parts) == storage_bits(format_of("mxfp4"), (32, 48)) == 32 * 2 * 136
    assert file.entries["model.embed_tokens.weight"].dtype == "BF16"
    assert "model.layers.0.mlp.down_proj.weight" not in file


def test_same_run_same_bytes(compiled_as: Compile, tmp_path: Path) -> None:
    for name in "ab":
        save(compiled_as("bert", {"weights": "mxint4"}), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def bits(folder: Path) -> int:
    return sum(entry.bits for entry in SafetensorsFile(folder / "weights.safetensors").entries.values())


def test_wide_tie_is_stored_once(compiled_as: Compile, tmp_path: Path) -> None:
    tied = save(compiled_as("tied"), tmp_path / "tied")
    apart = save(compiled_as("llama"), tmp_path / "apart")
    assert bits(apart) - bits(tied) == 16 * 64 * 32
    assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("threshold", [-1.0, 1e-4, 1e9], ids=["all high", "both", "all low"])
def test_weights_of_mixed_blocks_are_packed(threshold: float, compiled_as: Compile, tmp_path: Path) -> None:
    mixed = "mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, !mx.block<?x?xf8E4M3FN, f32>>"
    rule = {"match": "*.q_proj", "weights": mixed, "activations": mixed, "activation_threshold": 1e-4}
    compiled = compiled_as("llama", rule | {"weight_threshold": threshold}, MIXED)
    again = load(save(compiled, tmp_path / "a"))
    assert torch.equal(again(**TOKENS).logits, compiled(**TOKENS).logits)
    weight, type = "model.layers.0.self_attn.q_proj.weight", format_of(mixed)
    assert isinstance(type, MixedType)
    wide = compiled.weights.wide(weight)
    high = int((block_impact(wide, type) > threshold).sum())
    assert high == {-1.0: 64, 1e9: 0}.get(threshold, high) and (threshold != 1e-4 or 0 < high < 64)
    file = SafetensorsFile(tmp_path / "a" / "weights.safetensors")
    parts = {name: entry.bits for name, entry in file.entries.items() if name.startswith(f"{weight}.")}
    # 64 blocks of 16: NVFP4 with a scale each, FP8 with one for all; two tensor scales, a bit a block, one offset
    needed = (64 - high) * (16 * 4 + 8) + high * 16 * 8 + 32 + 32 + 64 + 32
    assert sum(parts.values()) == needed and weight not in file
    (counted,) = [tensor for tensor in again.cost().tensors if tensor.name == weight]
    assert counted.bits == needed and counted.own_bits == pytest.approx(needed - 64 - 32 + 2)
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["cost"]["weight_bits"] == again.cost().weight_bits
    assert report["cost"]["bytes"] == sum(entry.bits for entry in file.entries.values()) // 8
    (note,) = compiled.undecided()
    assert note in compiled.notes() and note not in report["notes"] and not again.undecided()
    assert note.startswith("1 weights in mixed formats are counted as the most") and note.endswith(weight)


@pytest.mark.parametrize(
    ("model", "format", "made"), [("bert", "nvfp4", "weight.times_2"), ("gemma", "mxint8", "plus_one")]
)
def test_weights_that_a_pass_made_are_loaded(model: str, format: str, made: str, tmp_path: Path) -> None:
    """Weights times a power of two in the place of a tensor's factor, and 1 + weight of Gemma's norms."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | {"num_key_value_heads": 4, "head_dim": 8}
    own = MODELS["bert"]() if model == "bert" else transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes))
    own.save_pretrained(tmp_path / "own")
    recipe = {"quantize": [{"weights": format, "activations": format}], "passes": ["legalize-hardware"]}
    compiled = mxloom.compile(tmp_path / "own", recipe)
    again = load(save(compiled, tmp_path / "a"))
    assert made in str(again.module)
    found, wanted = (each(TOKENS["input_ids"])[0] for each in (again, compiled))
    assert torch.equal(found, wanted)


def test_head_quantized_alone_unties(compiled_as: Compile, folders: dict[str, Path], tmp_path: Path) -> None:
    """Field case E2 (a): both in the file, the embedding bit-equal to the original, the tie cut."""
    compiled = compiled_as("tied", {"match": "*lm_head", "weights": "int8_channel"})
    folder = save(compiled, tmp_path / "a")
    wide = save(compiled_as("tied"), tmp_path / "wide")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert bits(folder) - bits(wide) == storage_bits(format_of("int8_channel"), (64, 32)) == 64 * 32 * 8 + 64 * 32
    original = SafetensorsFile(folders["tied"] / "model.safetensors")["model.embed_tokens.weight"]
    held = SafetensorsFile(folder / "weights.safetensors")
    assert any(tensor.shape == original.shape and tensor.equal(original) for tensor in held.values())
    assert first(load(folder)(**TOKENS)).equal(first(compiled(**TOKENS)))


def test_both_uses_in_one_format_stay_tied(compiled_as: Compile, tmp_path: Path) -> None:
    """Field case E2 (b): stored once, counted once, tie kept."""
    rules = [{"match": "*lm_head"}, {"match": "*embed_tokens", "kind": "embedding"}]
    compiled = compiled_as("tied", *({**rule, "weights": "int8_channel"} for rule in rules))
    folder = save(compiled, tmp_path / "a")
    wide = save(compiled_as("tied"), tmp_path / "wide")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert bits(folder) - bits(wide) == storage_bits(format_of("int8_channel"), (64, 32)) - 16 * 64 * 32
    loaded = load(folder)
    assert first(loaded(**TOKENS)).equal(first(compiled(**TOKENS)))
    model = loaded.source.loaded()
    assert model.get_parameter("lm_head.weight").equal(model.get_parameter("model.embed_tokens.weight"))


def test_module_without_configuration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    inputs = torch.randn(3, 32)
    compiled = mxloom.compile(model, weights="mxint8", example={"input": torch.randn(2, 32)})
    loaded = load(save(compiled, tmp_path / "a"))
    assert first(loaded(inputs)).equal(first(compiled(inputs)))
    with pytest.raises(MxloomError, match="Sequential: the artefact holds the compiled module, not the Python code"):
        loaded.source.model(inputs)


def test_folder_that_is_no_artefact_is_left_alone(saved: Path, tmp_path: Path) -> None:
    compiled = load(saved)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files that are no mxloom artefact; nothing was overwritten") as error:
        save(compiled, tmp_path)
    assert error.value.exit_status == 2
    with pytest.raises(UsageError, match=r"notes\.txt: is there and is no folder"):
        save(compiled, tmp_path / "notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("exchange", [True, False])
def test_artefact_is_replaced_whole(
    exchange: bool, artefact: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(_atomic, "_exchange", lambda one, other: False)
    (artefact / "old").write_text("old")
    save(load(saved), artefact)
    assert not (artefact / "old").exists()
    assert [path.name for path in artefact.parent.iterdir()] == ["a"]
    load(artefact)


def test_artefact_can_be_saved_over_itself(artefact: Path) -> None:
    before = (artefact / "weights.safetensors").read_bytes()
    save(load(artefact), artefact)
    assert (artefact / "weights.safetensors").read_bytes() == before


def test_failure_while_writing_leaves_nothing(saved: Path, artefact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = load(saved)
    before = {path.name: path.read_bytes() for path in artefact.iterdir()}

    def full(self: Compiled) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Compiled, "report", full)
    for target in (artefact, artefact.parent / "new"):
        with pytest.raises(OSError, match="No space left"):
            save(compiled, target)
    assert {path.name: path.read_bytes() for path in artefact.iterdir()} == before
    assert [path.name for path in artefact.parent.iterdir()] == ["a"]


def test_nan_scale_is_never_written(compiled_as: Compile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field case F4, at the last gate: whatever pass made the scale, the file is not written."""
    compiled = compiled_as("llama", {"weights": "nvfp4"})
    module, weights = compiled.packed()
    name = "model.layers.0.mlp.up_proj.weight"
    weights[f"{name}.scales"].view(torch.uint8)[0, 0] = 0x7F
    monkeypatch.setattr(Compiled, "packed", lambda self: (module, weights))
    with pytest.raises(MxloomError, match=rf"^{name}: 1 of .* scales values are NaN or infinite; it is not written"):
        save(compiled, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def sign(folder: Path) -> None:
    """Make the hashes fit again: what stands behind them must be checked too."""
    path = folder / "provenance.json"
    provenance = json.loads(path.read_text())
    for name in provenance["files"]:
        provenance["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    path.write_text(json.dumps(provenance))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ["module.mlir", "weights.safetensors", "config.json", "report.json"])
def test_changed_byte_is_found(name: str, artefact: Path) -> None:
    data = bytearray((artefact / name).read_bytes())
    data[-3] ^= 1
    (artefact / name).write_bytes(data)
    with pytest.raises(MxloomError, match=rf"{name}: changed since it was written"):
        load(artefact)


@pytest.mark.parametrize("name", ["weights.safetensors", "report.json"])
def test_missing_file_is_named(name: str, artefact: Path) -> None:
    (artefact / name).unlink()
    with pytest.raises(MxloomError, match=rf"{name}: missing, though provenance\.json lists it"):
        load(artefact)


def test_folders_that_are_no_artefact(tmp_path: Path) -> None:
    with pytest.raises(MxloomError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(MxloomError, match=r"no mxloom artefact \(module\.mlir or provenance\.json is missing\)"):
        load(tmp_path)


def test_other_version_is_refused(artefact: Path) -> None:
    edit_json(artefact / "provenance.json", format_version=2)
    with pytest.raises(MxloomError, match="format version 2; this mxloom reads 1"):
        load(artefact)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname"])
def test_listed_file_that_leads_out(name: str, artefact: Path) -> None:
    (artefact.parent / "secret").write_text("x")
    files = json.loads((artefact / "provenance.json").read_text())["files"]
    edit_json(artefact / "provenance.json", files={**files, name: "0" * 64})
    with pytest.raises(MxloomError, match=r"leads out of the folder"):
        load(artefact)


def test_error_in_the_module_names_its_line(artefact: Path) -> None:
    path = artefact / "module.mlir"
    lines = path.read_text().splitlines()
    number = next(index for index, line in enumerate(lines) if "mx.linear" in line)
    lines[number] = lines[number].replace("mx.linear", "mx.liner")
    path.write_text("\n".join(lines))
    sign(artefact)
    with pytest.raises(MxloomError, match=rf"module\.mlir:{number + 1}: .*mx\.liner"):
        load(artefact)


def test_module_that_does_not_verify(artefact: Path) -> None:
    path = artefact / "module.mlir"
    path.write_text(path.read_text().replace("!mx.block<32xf4E2M1FN>", "!mx.block<33xf4E2M1FN>"))
    sign(artefact)
    with pytest.raises(MxloomError, match=r"(module\.mlir|weights\.safetensors): "):
        load(artefact)


def test_weight_of_another_shape(artefact: Path) -> None:
    path = artefact / "module.mlir"
    path.write_text(path.read_text().replace('"model.norm.weight"', '"model.embed_tokens.weight"'))
    sign(artefact)
    with pytest.raises(MxloomError, match=r"model\.embed_tokens\.weight: is \[64, 32\], module\.mlir says \[32\]"):
        load(artefact)


def test_weight_that_is_not_there(artefact: Path) -> None:
    path = artefact / "module.mlir"
    path.write_text(path.read_text().replace('"model.norm.weight"', '"model.nrom.weight"'))
    sign(artefact)
    with pytest.raises(MxloomError, match=r"'model\.nrom\.weight' \(did you mean \"model\.norm\.weight\"\?\)"):
        load(artefact)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (None, '"mxloom" must give name and task'),
        ({"name": "x", "task": "chess", "tied": {}}, '"mxloom" must give name and task'),
        ({"name": "x", "task": "module", "tied": {"a": 1}, "format_version": 1}, '"tied" in "mxloom" must map names'),
        ({"name": "x", "task": "module", "tied": {"a": "b"}, "format_version": 1}, "no weight is named 'b'"),
    ],
)
def test_broken_settings(own: Any, message: str, artefact: Path) -> None:
    edit_json(artefact / "config.json", mxloom=own)
    sign(artefact)
    with pytest.raises(MxloomError, match=message):
        load(artefact)


def test_configuration_of_ten_million_layers(artefact: Path) -> None:
    edit_json(artefact / "config.json", num_hidden_layers=10_000_000)
    sign(artefact)
    with pytest.raises(MxloomError, match="num_hidden_layers is 10000000, but the checkpoint holds only"):
        load(artefact)


def test_a_model_with_few_positions_is_inspected_at_its_own_length(tmp_path: Path) -> None:
    sizes: dict[str, Any] = SIZES | {"max_position_embeddings": 24}
    transformers.BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "own")
    found = inspect(mxloom.compile(tmp_path / "own", weights="nvfp4", activations="nvfp4"))
    # Query, key, value and output, both layers of the MLP, the products of attention, and the pooler of one position.
    products = 4 * 32 * 32 + 2 * 32 * 48 + 2 * 24 * 32
    assert (found.sequence, found.macs) == (24, 24 * products + 32 * 32)
