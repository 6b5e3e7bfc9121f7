"""The stored form of mixed formats: bytes, sizes, random access, and what of hostile files is refused."""

import json
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mxloom
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import Encoded, MixedType, Rounding, bits, decode_block, encode_tensor, quantize
from mxloom.dialects.instances import format_of

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden_formats.json").read_text())["fgmp"]
NVFP4, FP8 = "block<16xf4E2M1FN, f8E4M3FN, f32>", "block<?x?xf8E4M3FN, f32>"
PAIRS: dict[str, tuple[str, str]] = {
    "nvfp4, fp8 per tensor": (NVFP4, FP8),
    "nvfp4, plain fp8": (NVFP4, "f8E4M3FN"),
    "mxfp4, mxfp8": ("block<32xf4E2M1FN>", "block<32xf8E4M3FN>"),
    "mxint4, mxint8": ("block<32x!mx.fixed<4, 2>>", "block<32x!mx.fixed<8, 6>>"),
    "int3 in groups, int8 per row": ("block<8xi3, bf16>", "block<?xi8, f32>"),
    "zero points": ("block<8xi4, f16, zero i4>", "block<8xi12, f32, zero i12>"),
    "a zero point per row": ("block<5xi5, f32>", "block<?xi8, f32, zero i8>"),
    "ternary, fixed": ("block<6x!mx.ternary, f32>", "!mx.fixed<9, 3>"),
    "int6, ternary": ("block<7xi6, f32>", "block<7x!mx.ternary, f32>"),
    "tiles": ("block<4x4xf4E2M1FN>", "block<4x4xf8E5M2>"),
    "tiles over rows": ("block<3x8xi2, f32>", "block<?xi8, f32, zero i8>"),
    "fp6, bf16 elements": ("block<16xf6E3M2FN>", "block<16xbf16, f32>"),
}
SHAPES = [(3, 40), (1, 1), (7, 33), (2, 5, 64), (0, 16), (4, 0), (9, 8)]


def mixed(low: str, high: str, rank: int = 2) -> MixedType:
    low, high = (part if part.startswith(("!", "f8")) else f"!mx.{part}" for part in (low, high))
    found = format_of(f"mixed<{low}, {high}>", rank=rank)
    assert isinstance(found, MixedType)
    return found


def grid_of(type: MixedType, shape: tuple[int, ...]) -> tuple[int, ...]:
    dims = type.low_block.dims
    leading = shape[: len(shape) - len(dims)]
    return (*leading, *(-(-size // step) for size, step in zip(shape[len(leading) :], dims, strict=True)))


def spread(choice: torch.Tensor, type: MixedType, shape: tuple[int, ...]) -> torch.Tensor:
    """The choice of each element's block, computed from its index alone."""
    dims = (*(1 for _ in range(len(shape) - len(type.low_block.dims))), *type.low_block.dims)
    places = [torch.arange(size) // step for size, step in zip(shape, dims, strict=True)]
    return choice[tuple(torch.meshgrid(*places, indexing="ij"))].bool()


def random_choice(type: MixedType, shape: tuple[int, ...], share: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(grid_of(type, shape), generator=generator) < share).to(torch.uint8)


def gaussian(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def raw(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def stored_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors.values())


def test_the_bytes_of_fgmp() -> None:
    """Read by ml_dtypes: three blocks of nibbles under E4M3 scales, one of FP8 bytes, one bit a block."""
    type, w = mixed(NVFP4, FP8), torch.tensor(GOLDEN["w"]).reshape(1, 64)
    mask = GOLDEN["fp8_mask_p75"]
    encoded = encode_tensor(w, type, choice=torch.tensor([mask], dtype=torch.uint8))
    tensors = {name: raw(tensor).numpy() for name, tensor in encoded.tensors().items()}
    assert {name: len(data) for name, data in tensors.items()} == {
        **{"codes": 24, "scales": 3, "global_scale": 4, "high_codes": 16, "high_scales": 4},
        **{"choice": 1, "offsets": 4},
    }
    assert tensors["choice"].tolist() == [0b0010] and tensors["offsets"].tolist() == [0] * 4
    scales = tensors["scales"].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert scales.tolist() == [GOLDEN["s4"][i] for i in (0, 2, 3)]
    over, high_scale = (tensors[name].view(np.float32)[0] for name in ("global_scale", "high_scales"))
    assert (over, high_scale) == (np.float32(GOLDEN["gs4"]), np.float32(GOLDEN["gs8"]))
    nibbles = np.stack([tensors["codes"] & 15, tensors["codes"] >> 4], -1).reshape(3, 16)
    low = nibbles.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32) * (scales * over)[:, None]
    high = tensors["high_codes"].view(ml_dtypes.float8_e4m3fn).astype(np.float32) * high_scale
    read = np.stack([low[0], high, low[1], low[2]]).reshape(1, 64)
    assert torch.equal(torch.from_numpy(read), encoded.decode())
    kept = [mxloom.fake_quantize(w, name).reshape(4, 16) for name in ("nvfp4", "fp8_e4m3_tensor")]
    assert torch.equal(encoded.decode().reshape(4, 16), torch.stack([kept[bit][i] for i, bit in enumerate(mask)]))


@pytest.mark.parametrize(("low_share", "saving"), [(0.7, 29.84), (0.9, 38.59)])
def test_memory_is_what_fgmp_saves(low_share: float, saving: float) -> None:
    """arXiv 2504.14152, abstract: 30 % at 70 % FP4, 39 % at 90 %; offsets and tensor scales take what is missing."""
    type, shape = mixed(NVFP4, FP8), (160, 1024)
    blocks = 160 * 64
    choice = torch.zeros(160, 64, dtype=torch.uint8)
    choice.view(-1)[torch.randperm(blocks, generator=torch.Generator().manual_seed(0))[int(low_share * blocks) :]] = 1
    encoded = encode_tensor(gaussian(shape), type, choice=choice)
    needed = low_share * blocks * (64 + 8) + (1 - low_share) * blocks * 128 + blocks + 10 * 32 + 64
    assert encoded.storage_bits == round(needed) == type.storage_bits_at(shape, int(choice.sum()))
    assert stored_bytes(encoded.tensors()) * 8 == encoded.storage_bits
    fp8 = mxloom.encode(gaussian(shape), "fp8_e4m3_tensor").storage_bits
    found = 100 * (1 - encoded.storage_bits / fp8)
    assert 0 < saving - found < 100 * 32 / 1024 / 16 / 8 + 0.003
    assert round(found, 1) == round(saving - 0.03, 1)


@pytest.mark.parametrize(
    ("low", "high", "low_bits", "high_bits"),
    [
        (NVFP4, FP8, 4.5, 8),
        (NVFP4, "f8E4M3FN", 4.5, 8),
        ("block<32xf4E2M1FN>", "block<32xf8E4M3FN>", 4.25, 8.25),
        ("block<32x!mx.fixed<4, 2>>", "block<32x!mx.fixed<8, 6>>", 4.25, 8.25),
    ],
)
def test_bits_at_a_share_are_those_of_a_large_tensor(low: str, high: str, low_bits: float, high_bits: float) -> None:
    type, shape = mixed(low, high), (1024, 1024)
    block = type.low_block.dims[-1]
    once = 32 * sum("f32" in part for part in (low, high))
    for share in (0.0, 0.25, 0.75, 1.0):
        each = share * low_bits + (1 - share) * high_bits + 1 / block + 32 / (1024 * block)
        assert type.bits_at(share) == pytest.approx(each)
        assert type.storage_bits_at(shape, round((1 - share) * 2**20 / block)) == pytest.approx(each * 2**20 + once)
    assert bits(type) == type.bits_at(0.0)
    assert type.storage_bits(shape) == type.storage_bits_at(shape, 2**20 // block)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_is_stored_comes_back(name: str, share: float) -> None:
    """Whole, against torch code that picks each element; and block by block, from the bytes that hold the block."""
    for seed, shape in enumerate(SHAPES):
        type = mixed(*PAIRS[name], rank=len(shape))
        x, choice = gaussian(shape, seed), random_choice(type, shape, share, seed)
        encoded = encode_tensor(x, type, choice=choice)
        low, high = (quantize(x, part) for part in (type.low, type.high))
        expected = torch.where(spread(choice, type, shape), high, low)
        assert torch.equal(encoded.decode(), expected), shape
        tensors = encoded.tensors()
        back = Encoded.from_tensors(type, shape, tensors)
        assert torch.equal(raw(back.decode()), raw(expected)), shape
        for part, tensor in vars(encoded.parts).items():
            again = getattr(back.parts, part)
            assert tensor is again is None or torch.equal(raw(tensor), raw(again)), (shape, part)
        assert 0 <= stored_bytes(tensors) * 8 - encoded.storage_bits < 8 * len(tensors)
        assert encoded.storage_bits == type.storage_bits_at(shape, int(choice.sum())) <= type.storage_bits(shape)
        steps = (*(1 for _ in range(len(shape) - len(type.low_block.dims))), *type.low_block.dims)
        for place in product(*map(range, grid_of(type, shape))):
            cut = tuple(slice(at * step, (at + 1) * step) for at, step in zip(place, steps, strict=True))
            block = decode_block(type, shape, tensors, place)
            assert torch.equal(raw(block), raw(expected[cut])), (shape, place)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PAIRS)),
    st.lists(st.integers(0, 40), min_size=2, max_size=3),
    st.floats(0, 1),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_shape_and_any_choice(name: str, sizes: list[int], share: float, seed: int, dtype: torch.dtype) -> None:
    shape = tuple(sizes)
    type = mixed(*PAIRS[name], rank=len(shape))
    x, choice = gaussian(shape, seed, dtype), random_choice(type, shape, share, seed)
    encoded = encode_tensor(x, type, choice=choice)
    low, high = (quantize(x, part) for part in (type.low, type.high))
    back = Encoded.from_tensors(type, shape, encoded.tensors()).decode(dtype)
    assert back.dtype == dtype and torch.equal(back, torch.where(spread(choice, type, shape), high, low))


@pytest.mark.parametrize("name", ["nvfp4, fp8 per tensor", "mxfp4, mxfp8", "mxint4, mxint8", "zero points"])
@pytest.mark.parametrize("how", [{}, {"rounding": "rtz"}, {"rounding": "stochastic", "seed": 3}, {"exact": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_threshold_decides_as_in_rounding(name: str, how: dict[str, Any], dtype: torch.dtype) -> None:
    type, x = mixed(*PAIRS[name]), gaussian((16, 96), dtype=dtype)
    for threshold in (-1.0, 0.02, 0.1, torch.inf):
        rounding = Rounding(threshold=threshold, **how)
        encoded = encode_tensor(x, type, rounding)
        assert torch.equal(encoded.decode(dtype), quantize(x, type, rounding)), threshold
    assert encoded.choice is not None and int(encoded.choice.sum()) == 0


def test_offsets_count_high_blocks_over_many_groups() -> None:
    type, shape = mixed("block<4xi4, f32>", "block<4xi8, f32>"), (5, 4 * 1000 + 1)
    x, choice = gaussian(shape), random_choice(type, shape, 0.3)
    tensors = encode_tensor(x, type, choice=choice).tensors()
    flat = choice.reshape(-1).numpy()
    assert len(flat) == 5005 and tensors["offsets"].dtype == torch.int32
    assert tensors["offsets"].tolist() == [int(flat[: 1024 * group].sum()) for group in range(5)]
    assert np.unpackbits(tensors["choice"].numpy(), bitorder="little")[:5005].tolist() == flat.tolist()
    whole = torch.nn.functional.pad(Encoded.from_tensors(type, shape, tensors).decode(), (0, 3)).reshape(5005, 4)
    for number in (0, 1, 1000, 1001, 1022, 1023, 1024, 1025, 2047, 2048, 4095, 4096, 5003, 5004):
        place = divmod(number, 1001)
        block = decode_block(type, shape, tensors, place)
        assert torch.equal(block, whole[number][: len(block)]), number
    assert decode_block(type, shape, tensors, (4, 1000)).shape == (1,)


def test_a_block_is_read_from_its_group_alone() -> None:
    """Everything that does not belong to it is overwritten: the offsets of other groups, their bits, other codes."""
    type, shape, number = mixed("block<8xi4, f32>", "block<8xi8, f32>"), (30, 800), 2500
    choice = random_choice(type, shape, 0.5)
    encoded = encode_tensor(gaussian(shape), type, choice=choice)
    tensors, place = {name: tensor.clone() for name, tensor in encoded.tensors().items()}, divmod(number, 100)
    flat = choice.reshape(-1)
    before = int(flat[:number].sum())
    index, prefix, size = (before, "high_", 8) if flat[number] else (number - before, "", 4)
    for kept, name in (
        (slice(2, 3), "offsets"),
        (slice(2048 // 8, number // 8 + 1), "choice"),
        (slice(index * size, (index + 1) * size), f"{prefix}codes"),
        (slice(index, index + 1), f"{prefix}scales"),
    ):
        other = torch.full_like(tensors[name], 77)
        other[kept] = tensors[name][kept]
        tensors[name] = other
    found, expected = decode_block(type, shape, tensors, place), decode_block(type, shape, encoded.tensors(), place)
    assert torch.equal(found, expected)
    with pytest.raises(UsageError, match=r"a grid \[30, 100\] has a place in it, got \[30, 0\]"):
        decode_block(type, shape, tensors, (30, 0))


def test_given_scales_of_both_formats_are_kept() -> None:
    type = mixed("block<8xi4, f32>", "block<8xi8, f32>")
    x = torch.tensor([[-8.0, 7, 3, 1, 0, 2, -1, 5] * 2, [-128.0, 127, 64, 3, -5, 0, 1, 2] * 2]) * 0.25
    choice, quarter = torch.tensor([[0, 0], [1, 1]], dtype=torch.bool), torch.full((2, 2), 0.25)
    kept = encode_tensor(x, type, choice=choice, scales=quarter, high_scales=quarter)
    assert torch.equal(kept.decode(), x), "field case F5: the grid's own scale changes nothing, -8 and -128 included"
    assert kept.scales is not None and kept.high_scales is not None
    assert kept.scales.tolist() == [[0.25, 0.25], [0, 0]] and kept.high_scales.tolist() == [[0, 0], [0.25, 0.25]]
    symmetric = encode_tensor(x, type, choice=choice, scales=quarter, high_scales=quarter, symmetric=True).decode()
    assert symmetric[0, 0] == -7 * 0.25 and symmetric[1, 0] == -127 * 0.25
    assert torch.equal(symmetric[x > -2], x[x > -2])
    low_alone = encode_tensor(x, type, choice=torch.zeros(2, 2, dtype=torch.uint8), scales=quarter).decode()
    assert torch.equal(low_alone[0], x[0]) and low_alone[1].tolist() == (x[1].clamp(-2, 1.75)).tolist()
    assert torch.equal(encode_tensor(x, type, Rounding(threshold=1e9), choice=choice).decode()[1], x[1]) is False


def test_a_block_format_keeps_its_symmetric_range_if_asked() -> None:
    x, scales = torch.tensor([[-8.0, 7.0, 1.0, 0.0]]), torch.ones(1, 1)
    format = format_of("!mx.block<4xi4, f32>")
    assert encode_tensor(x, format, scales=scales).codes.tolist() == [[-8, 7, 1, 0]]
    assert encode_tensor(x, format, scales=scales, symmetric=True).codes.tolist() == [[-7, 7, 1, 0]]
    with pytest.raises(UsageError, match="scale is no part of an encoded tensor; these are: scales, global_scale"):
        encode_tensor(x, format, scale=scales)
    with pytest.raises(MxloomError, match="given scales: choice has no place in this format"):
        encode_tensor(x, format, scales=scales, choice=scales)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (torch.zeros(2, 2), r"torch.float32 of shape \[2, 2\]; it is uint8 or bool with one entry per block"),
        (torch.zeros(4, dtype=torch.uint8), r"torch.uint8 of shape \[4\]; .* of shape \[2, 2\]"),
        (torch.full((2, 2), 3, dtype=torch.uint8), "0 for a low block and 1 for a high one, got 3"),
    ],
)
def test_a_choice_that_is_none_is_refused(choice: torch.Tensor, message: str) -> None:
    with pytest.raises(MxloomError, match=f"given choice is {message}"):
        encode_tensor(gaussian((2, 32)), mixed(NVFP4, FP8), choice=choice)


def test_a_plain_high_format_takes_no_scales() -> None:
    choice = torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(MxloomError, match="f8E4M3FN has no scale, but scales were given"):
        encode_tensor(gaussian((2, 32)), mixed(NVFP4, "f8E4M3FN"), choice=choice, high_scales=torch.ones(1, 1))


def test_a_nan_makes_its_block_nan_and_no_other() -> None:
    x = gaussian((2, 64))
    x[0, 3] = x[1, 40] = torch.nan
    type, choice = mixed("block<32xf4E2M1FN>", "block<32xf8E4M3FN>"), torch.tensor([[0, 1], [0, 1]], dtype=torch.uint8)
    encoded = encode_tensor(x, type, choice=choice)
    back = Encoded.from_tensors(type, (2, 64), encoded.tensors()).decode()
    assert back.isnan().reshape(2, 2, 32).all(-1).tolist() == [[True, False], [False, True]]
    assert int(back.isnan().sum()) == 64


def stored() -> tuple[MixedType, tuple[int, ...], dict[str, torch.Tensor]]:
    """3 x 700 blocks of 5 numbers, of which the last of a row has 3; codes of 3 bits fill no whole byte."""
    type, shape = mixed("block<5xi3, f32>", "block<5x!mx.ternary, f32>"), (3, 3498)
    encoded = encode_tensor(gaussian(shape), type, choice=random_choice(type, shape, 0.4))
    return type, shape, {name: tensor.clone() for name, tensor in encoded.tensors().items()}


def changed(name: str, at: int, value: int) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][at] = value

    return change


def cut(name: str) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1]

    return change


def retyped(name: str, dtype: torch.dtype) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


SIZE = r"{}(: is| of .* must be) torch\.\w+ of shape"
HOSTILE: dict[str, tuple[Any, str]] = {
    "no choice": (lambda tensors: tensors.pop("choice"), r"choice: is missing"),
    "a short choice": (cut("choice"), r"choice: is torch.uint8 of shape \[262\]; 2100 blocks take a bit each"),
    "a choice in bytes": (retyped("choice", torch.int32), r"choice: is torch.int32 of shape"),
    "other blocks high": (lambda tensors: tensors["choice"].bitwise_not_(), SIZE.format("codes")),
    "no offsets": (lambda tensors: tensors.pop("offsets"), r"stored as codes"),
    "a first offset": (changed("offsets", 0, 1), r"offsets: entry 0 is 1, and 0 of the 0 blocks before it are high"),
    "a later offset": (changed("offsets", 2, -5), r"offsets: entry 2 is -5, and \d+ of the 2048 blocks before it"),
    "offsets in 64 bits": (retyped("offsets", torch.int64), SIZE.format("offsets")),
    "one offset less": (cut("offsets"), SIZE.format("offsets")),
    "short codes": (cut("codes"), SIZE.format("codes")),
    "short high codes": (cut("high_codes"), SIZE.format("high_codes")),
    "bits behind the codes": (changed("codes", -1, 255), r"codes: the bits behind its \d+ codes are not zero"),
    "no trits": (changed("high_codes", -1, 243), r"high_codes: a byte of five trits is at most 242"),
    "scales of another type": (retyped("scales", torch.float16), SIZE.format("scales")),
    "more high scales": (
        lambda tensors: tensors.update(high_scales=torch.nn.functional.pad(tensors["high_scales"], (0, 1))),
        SIZE.format("high_scales"),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tensors_are_refused(name: str) -> None:
    type, shape, tensors = stored()
    Encoded.from_tensors(type, shape, tensors)
    change, message = HOSTILE[name]
    change(tensors)
    with pytest.raises(MxloomError, match=message):
        Encoded.from_tensors(type, shape, tensors)
    store = WeightStore.from_state_dict({f"w.{part}": tensor for part, tensor in tensors.items()})
    with pytest.raises(MxloomError, match=rf"^w(\.|: ){message}"):
        store.declare("w", type, shape)


def test_the_bits_behind_the_choice_are_seen_where_they_alone_are_wrong() -> None:
    type, shape, tensors = stored()
    tensors["choice"][-1] |= 0b10000  # 2100 blocks: the last byte holds four
    with pytest.raises(MxloomError, match="choice: the bits behind its 2100 blocks are not zero"):
        Encoded.from_tensors(type, shape, tensors)


def test_swapped_blocks_of_two_groups_are_seen_by_the_offsets() -> None:
    """As many high blocks as before, so that all sizes fit."""
    type, shape, tensors = stored()
    bits = np.unpackbits(tensors["choice"].numpy(), bitorder="little")
    low, high = int(np.flatnonzero(bits[:1024] == 0)[0]), 1024 + int(np.flatnonzero(bits[1024:2048])[0])
    bits[[low, high]] = bits[[high, low]]
    tensors["choice"] = torch.from_numpy(np.packbits(bits, bitorder="little"))
    right = int(tensors["offsets"][1]) + 1
    with pytest.raises(MxloomError, match=rf"offsets: entry 1 is {right - 1}, and {right} of the 1024 blocks"):
        Encoded.from_tensors(type, shape, tensors)


def test_more_blocks_than_an_offset_counts_are_refused() -> None:
    type = mixed("block<1xi4, f32>", "f8E4M3FN")
    assert type.why_not((2**16, 2**15)) is not None and type.why_not((2**16 - 1, 2**15)) is None
    assert prod((2**16, 2**15)) == 2**31


def test_a_store_knows_the_size_of_what_it_holds() -> None:
    type, shape = mixed(NVFP4, FP8), (6, 80)
    encoded = encode_tensor(gaussian(shape), type, choice=random_choice(type, shape, 0.3))
    store = WeightStore.from_state_dict({"w": gaussian(shape)})
    store.put_encoded("w", encoded)
    store.alias("v", "w")
    assert store.stored_bits("w") == stored_bytes(encoded.tensors()) * 8
    assert torch.equal(store.wide("w"), encoded.decode()) and torch.equal(store.wide("v"), encoded.decode())
    store.put_encoded("w", mxloom.encode(gaussian(shape), "mxint8"))
    assert set(store.parts("w")) == {"codes", "scales"}, "nothing is left of the mixed tensor"
    assert torch.equal(store.wide("v"), encoded.decode())
