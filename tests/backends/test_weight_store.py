"""The weight store: lazy, honest about what is tied, and shut to what leads out of its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from xdsl.ir import TypeAttribute

from mxloom.backends.weight_store import ALIGNMENT, UnknownWeightError, WeightStore
from mxloom.dialects.errors import MxloomError
from mxloom.dialects.formats import encode_tensor, storage_bits
from mxloom.dialects.instances import format_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tied() -> WeightStore:
    tensor = weights(4, 32)
    return WeightStore.from_state_dict({EMBEDDING: tensor, "norm": torch.ones(32), HEAD: tensor})


def format(name: str) -> TypeAttribute:
    return cast(TypeAttribute, format_of(name))


def bits_of(store: WeightStore) -> int:
    """What a file of the store's tensors takes, each once."""
    return sum(store.stored_bits(name) for name in store if name not in store.aliases)


def test_a_store_keeps_its_values_when_the_state_dict_changes() -> None:
    tensor = weights(3, 2)
    before = tensor.clone()
    store = WeightStore.from_state_dict({"w": tensor, "again": tensor})
    tensor.data.mul_(3)
    assert torch.equal(store["w"], before)
    assert store["again"].data_ptr() == store["w"].data_ptr()


def test_tied_weights_are_stored_once() -> None:
    store = tied()
    assert store.aliases == {HEAD: EMBEDDING}
    assert set(store) == {EMBEDDING, HEAD, "norm"}
    assert len(store) == 3
    assert store[HEAD].equal(store[EMBEDDING])
    assert bits_of(store) == 32 * (4 * 32 + 32)


def test_views_of_one_tensor_are_no_ties() -> None:
    whole = weights(4, 32)
    store = WeightStore.from_state_dict({"whole": whole, "row": whole[0], "turned": whole.T})
    assert not store.aliases
    assert store["row"].equal(whole[0])


@pytest.mark.parametrize("changed", [EMBEDDING, HEAD])
def test_replacing_one_use_leaves_the_other(changed: str) -> None:
    store, original = tied(), tied()[EMBEDDING]
    store.put(changed, torch.zeros(4, 32))
    kept = HEAD if changed == EMBEDDING else EMBEDDING
    assert store[kept].equal(original)
    assert store[changed].count_nonzero() == 0
    assert not store.aliases
    assert bits_of(store) == 32 * (2 * 4 * 32 + 32)


def test_replacing_the_owner_keeps_the_others_tied() -> None:
    tensor = weights(2, 2)
    store = WeightStore.from_state_dict({"a": tensor, "b": tensor, "c": tensor})
    store.put("a", torch.zeros(2, 2))
    assert store.aliases == {"c": "b"}
    assert store["c"].equal(tensor)


def test_encoding_one_use_of_a_tied_weight() -> None:
    """Field case E2 (a): the head in int8 per channel, the embedding untouched and counted beside it."""
    store, original = tied(), tied()[EMBEDDING]
    store.put_encoded(HEAD, encode_tensor(original, format("int8_channel")))
    assert store[EMBEDDING].equal(original)
    assert HEAD not in store
    assert store.stored_bits(HEAD) == storage_bits(format("int8_channel"), (4, 32)) == 8 * 128 + 32 * 4
    assert bits_of(store) == 32 * (4 * 32 + 32) + 8 * 128 + 32 * 4


def test_encoding_both_uses_of_a_tied_weight() -> None:
    """Field case E2 (b): both in int8 per channel, stored and counted once."""
    store = tied()
    encoded = encode_tensor(store[EMBEDDING], format("int8_channel"))
    store.put_encoded(EMBEDDING, encoded)
    store.alias(HEAD, EMBEDDING)
    assert store.wide(HEAD).equal(store.wide(EMBEDDING))
    assert store.wide(HEAD).equal(encoded.decode())
    assert bits_of(store) == 32 * 32 + 8 * 128 + 32 * 4


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxint8", "int4_g32", "int8_affine", "int8_channel", "ternary"])
def test_encoded_weights_come_back(name: str) -> None:
    store, tensor = WeightStore.from_state_dict({"w": weights(4, 64)}), weights(4, 64)
    encoded = encode_tensor(tensor, format(name))
    store.put_encoded("w", encoded)
    assert "w" not in store
    assert store.encoded("w", format(name), (4, 64)).decode().equal(encoded.decode())
    assert store.wide("w").equal(encoded.decode())
    assert store.stored_bits("w") == storage_bits(format(name), (4, 64))


def test_codes_of_another_format_or_shape_are_refused() -> None:
    store = WeightStore()
    store.put_encoded("w", encode_tensor(weights(4, 64), format("mxfp4")))
    with pytest.raises(MxloomError, match=r"^w.codes: is .* of shape \[128\]; \[4, 64\] in .* takes .*\[256\]"):
        store.declare("w", format("mxint8"), (4, 64))
    with pytest.raises(MxloomError, match=r"^w: "):
        store.encoded("w", format("mxfp4"), (4, 96))
    with pytest.raises(MxloomError, match=r"^v: no codes are stored"):
        store.encoded("v", format("mxfp4"), (4, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_wide_is_f32(dtype: torch.dtype) -> None:
    tensor = weights(3, 5).to(dtype)
    wide = WeightStore.from_state_dict({"w": tensor}).wide("w")
    assert wide.dtype == torch.float32
    assert wide.equal(tensor.float())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_stay_integers(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    assert WeightStore.from_state_dict({"w": tensor}).wide("w").dtype == dtype


def test_wide_values_are_aligned(tmp_path: Path) -> None:
    save_file({name: weights(3, 5) for name in "abcdefgh"}, tmp_path / "model.safetensors")
    store = WeightStore.from_safetensors(tmp_path)
    assert any(store[name].data_ptr() % ALIGNMENT for name in store)
    assert not any(store.wide(name).data_ptr() % ALIGNMENT for name in store)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(
        UnknownWeightError, match=r"no weight is named 'lm_haed.weight' \(did you mean \"lm_head.weight\""
    ):
        tied()["lm_haed.weight"]
    assert tied().get("nothing") is None


def test_a_copy_changes_on_its_own() -> None:
    store = tied()
    other = store.copy()
    other.put(HEAD, torch.zeros(1))
    assert store.shape(HEAD) == (4, 32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(value: float) -> None:
    tensor = torch.zeros(10, dtype=torch.bfloat16)
    tensor[3:5] = value
    store = WeightStore.from_state_dict({"good": torch.ones(2), "bad": tensor, "count": torch.tensor(1)})
    with pytest.raises(MxloomError, match=r"^bad: 2 of 10 values are NaN or infinite"):
        store.check_finite()
    store.check_finite(["good", "count"])


@pytest.mark.parametrize(("part", "byte"), [("scales", 0x7F), ("scales", 0xFF)])
def test_nan_byte_in_e4m3_scales_is_refused(part: str, byte: int) -> None:
    """Field case F4: a zero block whose scale became 0x7F must not reach a file."""
    store = WeightStore()
    store.put_encoded("w", encode_tensor(weights(1, 32), format("nvfp4")))
    store.check_scales()
    store[f"w.{part}"].view(torch.uint8)[0, 1] = byte
    with pytest.raises(MxloomError, match=r"^w: 1 of 2 scales values are NaN or infinite; it is not written"):
        store.check_scales()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_f32_scales_that_are_not_finite_are_refused(value: float) -> None:
    store = WeightStore()
    store.put_encoded("w", encode_tensor(weights(1, 32), format("nvfp4")))
    store["w.global_scale"].fill_(value)
    with pytest.raises(MxloomError, match=r"^w: 1 of 1 global scale values are NaN"):
        store.check_scales()


def shards(folder: Path, weight_map: Any) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "model-1.safetensors")
    save_file({"c": torch.zeros(4)}, folder / "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path, {"a": "model-1.safetensors", "c": "model-2.safetensors"})
    store = WeightStore.from_safetensors(tmp_path)
    assert set(store) == {"a", "c"}
    assert store["c"].equal(torch.zeros(4))


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", ".", "model-1.bin", "a\\x.safetensors", 7, None],
)
def test_index_that_leads_out_of_the_folder(shard: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    shards(folder, {"a": shard})
    with pytest.raises(MxloomError, match=r"index\.json: .* (is not the plain name|must be a file name)"):
        WeightStore.from_safetensors(folder)


def test_link_that_leaves_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(MxloomError, match=r"model\.safetensors is a link that leaves"):
        WeightStore.from_safetensors(folder)


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    blobs.mkdir()
    folder.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "5678")
    (folder / "model.safetensors").symlink_to("../../blobs/5678")
    assert WeightStore.from_safetensors(folder)["a"].equal(torch.ones(2))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", r"must hold a JSON object; it holds \[\]"),
        ("{", r"not valid JSON"),
        ("[" * 100_000, r"not valid JSON"),
        ('{"weight_map": []}', r'"weight_map" must map'),
        ("{}", r'"weight_map" must map'),
        ('{"weight_map": {"a": "gone.safetensors"}}', r"the shard gone\.safetensors is not in"),
    ],
)
def test_broken_index(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(MxloomError, match=message):
        WeightStore.from_safetensors(tmp_path)


def test_index_that_names_a_tensor_the_shard_lacks(tmp_path: Path) -> None:
    shards(tmp_path, {"z": "model-1.safetensors"})
    with pytest.raises(MxloomError, match=r"model-1\.safetensors: tensor 'z' is missing, though the shard index"):
        WeightStore.from_safetensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "x.pkl"])
def test_pickle_is_refused_unread(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(MxloomError, match=rf"{name} is a pickle, .* reads safetensors and GGUF only"):
        WeightStore.from_safetensors(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(MxloomError, match="no weights: neither"):
        WeightStore.from_safetensors(tmp_path)
    with pytest.raises(MxloomError, match="no such folder"):
        WeightStore.from_safetensors(tmp_path / "nowhere")


def test_several_files_without_an_index(tmp_path: Path) -> None:
    for name in "ab":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(MxloomError, match=r"2 safetensors files, but no model\.safetensors\.index\.json"):
        WeightStore.from_safetensors(tmp_path)
