"""Artefacts from anyone: sealed with right hashes, wrong inside; and places where none can be written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import mxloom
from mxloom.compiler._target import check_target
from mxloom.dialects.errors import MxloomError, UsageError

WEIGHTS = "weights.safetensors"
SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=1))


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    """A small Llama in MXFP4 with wide norms."""
    return mxloom.compile(llama(), weights="mxfp4").save(tmp_path / "artefact")


@pytest.fixture(scope="module")
def two_formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose head has blocks in MXFP4 and blocks in MXFP8."""
    mixed = "mixed<!mx.block<16xf4E2M1FN>, !mx.block<16xf8E4M3FN>>"
    rule = {"match": "lm_head", "weights": mixed, "weight_threshold": 1e-4}
    return mxloom.compile(llama(), {"version": 1, "quantize": [rule]}).save(
        tmp_path_factory.mktemp("mixed") / "artefact"
    )


def edit(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path, message: str) -> None:
    """After provenance.json was given the hashes that the files have now."""
    files = json.loads((folder / "provenance.json").read_text())["files"]
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files}
    edit(folder, "provenance.json", files=hashes)
    with pytest.raises(MxloomError, match=message) as error:
        mxloom.load(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", lambda t: t.to(torch.int32), "model.norm.weight: is stored as torch.int32"),
        ("model.norm.weight", lambda t: t * torch.nan, "model.norm.weight: 32 of 32 values are NaN"),
        ("model.norm.weight", lambda t: t[:16].clone(), r"model.norm.weight: is \[16\], module.mlir says \[32\]"),
        (
            "lm_head.weight.scales",
            lambda t: torch.full_like(t.view(torch.uint8), 255).view(t.dtype),
            "scales: 32 of 32 values are NaN",
        ),
        ("lm_head.weight.scales", lambda t: t.view(torch.uint8), "lm_head.weight.scales: is torch.uint8"),
        ("lm_head.weight.codes", lambda t: t.view(torch.int8), "lm_head.weight.codes: is torch.int8"),
    ],
)
def test_tensors_that_are_not_what_the_module_says(artefact: Path, name: str, change: Any, message: str) -> None:
    tensors = load_file(artefact / WEIGHTS)
    tensors[name] = change(tensors[name])
    save_file(tensors, artefact / WEIGHTS)
    refused(artefact, message)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("choice", lambda t: t.bitwise_not(), "(high_)?codes: is torch.uint8"),
        ("choice", lambda t: t[:-1], r"choice: is torch.uint8 of shape \[7\]; 64 blocks take a bit each"),
        ("offsets", lambda t: t + 1, "offsets: entry 0 is 1, and 0 of the 0 blocks before it are high"),
        ("high_codes", lambda t: torch.cat([t, t[:16]]), "high_codes: is torch.uint8"),
        ("scales", lambda t: t[:-1], "scales: is torch.float8_e8m0fnu"),
        ("high_codes", lambda t: torch.full_like(t, 127), " .* values, or their scales, are NaN"),
    ],
)
def test_mixed_blocks_that_do_not_fit(two_formats: Path, tmp_path: Path, part: str, change: Any, message: str) -> None:
    artefact = Path(shutil.copytree(two_formats, tmp_path / "artefact"))
    tensors = load_file(artefact / WEIGHTS)
    name = f"lm_head.weight.{part}"
    assert 0 < len(tensors["lm_head.weight.high_scales"]) < 64 and len(tensors[name])
    tensors[name] = change(tensors[name]).clone()
    save_file(tensors, artefact / WEIGHTS)
    refused(artefact, rf"lm_head.weight(\.|:){message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 2}, "describes another model .*: model.layers.1"),
        ({"hidden_size": 64}, "describes another model .*: model.embed_tokens.weight is"),
        ({"num_hidden_layers": 0}, "describes another model .*belongs to no part of the model"),
    ],
)
def test_a_configuration_of_another_model(artefact: Path, fields: dict[str, Any], message: str) -> None:
    edit(artefact, "config.json", **fields)
    refused(artefact, message)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"format_version": 99}, "format version 99; this mxloom reads 1"),
        ({"format_version": True}, "format version True"),
        ({"name": "../../x"}, "is no plain name"),
        ({"task": "image-classification"}, 'is a model for causal-lm, not for "image-classification"'),
    ],
)
def test_settings_that_lie(artefact: Path, own: dict[str, Any], message: str) -> None:
    fields = json.loads((artefact / "config.json").read_text())["mxloom"]
    edit(artefact, "config.json", mxloom=fields | own)
    refused(artefact, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret", "leads out of the folder"),
        ("/etc/passwd", "leads out of the folder"),
        ("a\0b", "is no name of a file"),
        ("\ud800", "is no name of a file"),
        ("x" * 5000, "is no name of a file"),
        ("gone.json", "missing, though provenance.json lists it"),
    ],
)
def test_names_in_the_provenance(artefact: Path, name: str, message: str) -> None:
    files = json.loads((artefact / "provenance.json").read_text())["files"]
    edit(artefact, "provenance.json", files={**files, name: "0" * 64})
    with pytest.raises(MxloomError, match=message):
        mxloom.load(artefact)


@pytest.mark.parametrize("name", ["config.json", "provenance.json", WEIGHTS])
def test_links_are_no_files_of_an_artefact(artefact: Path, name: str, tmp_path: Path) -> None:
    (artefact / name).rename(tmp_path / name)
    (artefact / name).symlink_to(tmp_path / name)
    with pytest.raises(MxloomError, match="is a link; an artefact holds its files themselves"):
        mxloom.load(artefact)
    (artefact / name).unlink()
    (artefact / name).symlink_to(artefact / name)
    with pytest.raises(MxloomError, match=r"is a link|no mxloom artefact"):
        mxloom.load(artefact)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('outputs = ["logits"]', 'outputs = ["logits", "more"]', "it must be a list of 1 names"),
        ('outputs = ["logits"]', "outputs = [3 : i64]", "it must be a list of 1 names"),
        ('outputs = ["logits"]', 'absent = [1 : i64], outputs = ["logits"]', "it must be a list of 2 names"),
        (
            'outputs = ["logits"]',
            'absent = [2 : i64], outputs = ["logits", "more"]',
            "a list of places among the outputs",
        ),
        ('outputs = ["logits"]', 'absent = ["more"], outputs = ["logits"]', "a list of places among the outputs"),
        ('outputs = ["logits"]', "absent = [0 : i64]", "the attribute outputs is missing"),
        ("builtin.module {", "builtin.module {\n  func.func private @more()", "a module holds one function"),
    ],
)
def test_modules_that_cannot_run(artefact: Path, old: str, new: str, message: str) -> None:
    text = (artefact / "module.mlir").read_text()
    assert old in text
    (artefact / "module.mlir").write_text(text.replace(old, new))
    refused(artefact, message)


@pytest.mark.parametrize("text", ["", "builtin.module {\n}", "func.func private @forward() -> ()", "\0", "(" * 3000])
def test_text_that_is_no_module_of_ours(artefact: Path, text: str) -> None:
    (artefact / "module.mlir").write_text(text)
    refused(artefact, "module.mlir")


def test_places_where_no_folder_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for place, message in (
        (tmp_path / "file", "is there and is no folder"),
        (tmp_path / "file" / "below", "is there and is no folder|Not a directory"),
        (tmp_path / "link", "is a link"),
        (tmp_path / "full", "holds files that are no mxloom artefact"),
        (tmp_path / ("x" * 300), "cannot be a folder|takes more than 255 bytes"),
        ("", "is no folder's name"),
        ("a\0b", "is no folder's name"),
    ):
        with pytest.raises(UsageError, match=message):
            check_target(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "link"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    compiled = mxloom.compile(nn.Linear(4, 4), example={"input": torch.ones(2, 4)})
    folder = compiled.save(tmp_path / ("x" * 255))
    assert torch.equal(mxloom.load(folder)(torch.ones(1, 4)), compiled(torch.ones(1, 4)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float8_e4m3fn])
def test_checkpoints_whose_weights_are_no_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MxloomError, match=f"no floats.*model.norm.weight is {str(dtype)[6:]}"):
        mxloom.compile(tmp_path, weights="mxfp4")
