"""Models that cannot be opened: one clear message that names the file, at once, without running or writing anything."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from mxloom.compiler import checkpoint
from mxloom.compiler.model_source import open_model
from mxloom.dialects.errors import MxloomError

LAYERS = 2


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small Llama."""
    folder = tmp_path_factory.mktemp("sound")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


@pytest.fixture
def folder(sound: dict[str, bytes], tmp_path: Path) -> Path:
    """A copy that a test may break."""
    for name, data in sound.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def configure(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))


def edit(folder: Path, remove: str = "", add: dict[str, torch.Tensor] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors") | (add or {})
    tensors.pop(remove, None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refuses(path: Path, message: str, status: int = 1) -> None:
    """One message; the folder stays as it was."""
    before = {name: entry.stat().st_mtime_ns for name, entry in _entries(path)}
    with pytest.raises(MxloomError, match=message) as error:
        open_model(path)
    assert error.value.exit_status == status
    assert len(str(error.value)) < 1000
    assert {name: entry.stat().st_mtime_ns for name, entry in _entries(path)} == before


def _entries(path: Path) -> list[tuple[str, Path]]:
    return [(entry.name, entry) for entry in path.iterdir()] if path.is_dir() else []


def test_sound_folder_opens(folder: Path) -> None:
    assert open_model(folder).task == "causal-lm"


def test_missing_folder(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", r"nowhere: no such folder or file\. mxloom does not download")


def test_name_on_a_hub_is_not_fetched() -> None:
    refuses(Path("HuggingFaceTB/SmolLM2-135M"), "no such folder or file")


def test_empty_folder(tmp_path: Path) -> None:
    refuses(tmp_path, "no weights: neither")


def test_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    refuses(tmp_path / "model.onnx", r"model\.onnx: a model is a folder with config\.json and safetensors, or a \.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickle_checkpoint(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refuses(folder, rf"{name} is a pickle, .* Convert it where you trust it")


def test_shard_index_that_points_outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(folder, r"index\.json: '\.\./model\.safetensors' is not the plain name")


def test_no_configuration(folder: Path) -> None:
    (folder / "config.json").unlink()
    refuses(folder, r"no config\.json, so the architecture of its weights is unknown")


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"text"', "\xff", "[" * 100_000, ""])
def test_configuration_that_is_no_json_object(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    refuses(folder, r"config\.json: (not valid JSON|must hold a JSON object)")


def test_configuration_without_end(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**9)
    refuses(folder, r"config\.json: more than 4000000 bytes")


@pytest.mark.parametrize("layers", [10_000_000, 10**30])
def test_millions_of_layers(layers: int, folder: Path) -> None:
    """Refused before anything is built, so without their memory."""
    configure(folder, num_hidden_layers=layers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuses(folder, rf"config\.json: num_hidden_layers is {layers}, but the checkpoint holds only 21 tensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


def test_building_stops_where_the_checkpoint_holds_far_fewer_tensors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of the configuration makes the modules: the second line of defence."""
    monkeypatch.setattr(checkpoint, "check_config", lambda folder, tensors: {})
    configure(folder, num_hidden_layers=10_000)
    refuses(folder, r"a model of more than 1360 parameter tensors; the checkpoint holds far fewer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 32, "head_dim": 8}, r"\[32, 16\] in the file and \[32, 32\] by config\.json"),
        ({"intermediate_size": 28}, r"mlp\.\w+\.weight is \[\d+, \d+\] in the file and \[\d+, \d+\] by config\.json"),
        ({"vocab_size": 33}, r"lm_head\.weight is \[32, 16\] in the file and \[33, 16\] by config\.json"),
    ],
)
def test_shapes_that_disagree_with_the_configuration(changes: dict[str, int], message: str, folder: Path) -> None:
    configure(folder, **changes)
    refuses(folder, rf"shapes that disagree with config\.json: .*{message}")


def test_layers_that_are_missing(folder: Path) -> None:
    configure(folder, num_hidden_layers=LAYERS + 1)
    refuses(folder, r"9 tensors that config\.json asks for are missing: model\.layers\.2\..* and 1 more")


def test_tensor_that_is_missing(folder: Path) -> None:
    edit(folder, remove="model.norm.weight")
    refuses(folder, r"1 tensors that config\.json asks for are missing: model\.norm\.weight\.")


def test_dtype_that_is_not_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F31"', 1))
    refuses(folder, r"model\.safetensors: tensor '.*' has the dtype 'F31', which is not read; these are: BOOL")


@pytest.mark.parametrize("architecture", ["GhostForCausalLM", "../../x", "os", "PreTrainedTokenizerBase"])
def test_architecture_that_transformers_lacks(architecture: str, folder: Path) -> None:
    """The class by the type of configuration serves instead; no other name of transformers is ever called."""
    configure(folder, architectures=[architecture])
    assert type(open_model(folder).model).__name__ == "LlamaForCausalLM"


def test_model_type_that_transformers_lacks(folder: Path) -> None:
    configure(folder, model_type="ghost")
    refuses(folder, r"config\.json: transformers cannot read it: ValueError: .*ghost")


@pytest.mark.parametrize("changes", [{"hidden_size": "wide"}, {"hidden_size": -16}, {"num_attention_heads": 0}])
def test_configuration_that_makes_no_sense(changes: dict[str, Any], folder: Path) -> None:
    configure(folder, **changes)
    refuses(folder, r"config\.json: (transformers cannot read it|the model cannot be built)")


@pytest.mark.parametrize("settings", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "mxfp4"}, "fp8"])
def test_checkpoint_that_is_quantized_already(settings: Any, folder: Path) -> None:
    configure(folder, quantization_config=settings)
    refuses(folder, r"config\.json: the checkpoint is already quantized .* Use the original checkpoint")


def test_broken_safetensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    refuses(folder, r"model\.safetensors: not a valid safetensors file: .* data bytes")


@pytest.mark.parametrize("data", [b"", b"GG", b"PK\x03\x04", b"GGUF", b"GGUF" + bytes(100), b"GGUF\x03" + b"\xff" * 64])
def test_broken_gguf(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    refuses(path, r"model\.gguf: (not a GGUF file|transformers cannot read it)")


def test_folder_of_several_ggufs(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    refuses(tmp_path, r"holds 2 GGUF files; name one, such as .*a\.gguf", status=2)


def test_weights_that_are_not_finite(folder: Path) -> None:
    edit(folder, add={"model.norm.weight": torch.tensor([1.0] * 14 + [float("nan"), float("inf")])})
    with pytest.raises(MxloomError, match=r"model\.norm\.weight: 2 of 16 values are NaN or infinite"):
        open_model(folder).weights.check_finite()
