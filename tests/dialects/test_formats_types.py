"""Format types: their text, what they refuse and in which words, their bits, and how they lie on tensors."""

import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xdsl.dialects.builtin import (
    DYNAMIC_INDEX,
    IndexType,
    IntegerType,
    TensorType,
    bf16,
    f4E2M1FN,
    f8E4M3FN,
    f8E8M0FNU,
    f16,
    f32,
    f64,
    i1,
    i8,
    i32,
    i64,
)
from xdsl.ir import Attribute, TypeAttribute
from xdsl.utils.exceptions import VerifyException

from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import (
    FAMILIES,
    BlockType,
    FixedType,
    MinifloatType,
    MixedType,
    Rounding,
    TernaryType,
    bits,
    default_scale_rule,
    is_wide,
    storage_bits,
    verify_tensor,
)
from mxloom.dialects.instances import BLOCK_FORM, INSTANCES, format_of, name_of, parse_format

NVFP4 = "!mx.block<16xf4E2M1FN, f8E4M3FN, f32>"
TEXTS = [
    "!mx.fixed<8, 6>",
    "!mx.fixed<16, -2>",
    "!mx.float<3, 1>",
    "!mx.ternary",
    "!mx.block<32xf4E2M1FN>",
    "!mx.block<32x1xf4E2M1FN>",
    "!mx.block<4x4xf6E3M2FN>",
    "!mx.block<32x!mx.fixed<8, 6>>",
    "!mx.block<32x!mx.float<3, 1>>",
    NVFP4,
    "!mx.block<16xi4, f8E4M3FN, f32>",
    "!mx.block<16xf4E2M1FN, f8E4M3FN>",
    "!mx.block<?xi8, f32>",
    "!mx.block<?x?xi8, f32, zero i8>",
    "!mx.block<128xi4, bf16, zero i4>",
    "!mx.block<?x?x!mx.ternary, f32>",
    f"!mx.mixed<{NVFP4}, !mx.block<?x?xf8E4M3FN, f32>>",
    f"!mx.mixed<{NVFP4}, f8E4M3FN>",
    "!mx.mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>",
]


@pytest.mark.parametrize("text", [*TEXTS, *(instance.text for instance in INSTANCES.values())])
def test_text_is_a_fixed_point(text: str) -> None:
    assert str(parse_format(text)) == text
    assert parse_format(str(parse_format(text))) == parse_format(text)


def test_the_ocp_scale_is_left_out_of_the_text() -> None:
    assert str(parse_format("!mx.block<32xf4E2M1FN, f8E8M0FNU>")) == "!mx.block<32xf4E2M1FN>"


def test_a_type_can_be_spelled_without_its_prefix() -> None:
    assert parse_format("fixed<8,4>") == FixedType(8, 4)
    assert parse_format("block<32xf4E2M1FN>") == BlockType.of([32], f4E2M1FN)
    assert parse_format("float<3,1>") == MinifloatType(3, 1)


DIMS = st.lists(st.one_of(st.integers(1, 4096), st.just(DYNAMIC_INDEX)), min_size=1, max_size=4)
NUMBERS = st.one_of(
    st.sampled_from([f4E2M1FN, f8E4M3FN, bf16, TernaryType()]),
    st.integers(2, 32).map(IntegerType),
    st.builds(FixedType, st.integers(2, 32), st.integers(-64, 64)),
    st.builds(MinifloatType, st.integers(1, 7), st.integers(0, 8)),
)


@given(
    DIMS, NUMBERS, st.sampled_from([(f8E8M0FNU, None), (f32, None), (bf16, None), (f8E4M3FN, None), (f8E4M3FN, f32)])
)
def test_any_block_type_survives_its_text(
    dims: list[int], element: TypeAttribute, scales: tuple[TypeAttribute, TypeAttribute | None]
) -> None:
    block = BlockType.of(dims, element, *scales)
    assert parse_format(str(block)) == block
    if isinstance(element, IntegerType) and scales == (f32, None):
        affine = BlockType.of(dims, element, f32, None, element)
        assert parse_format(str(affine)) == affine
        assert affine.bits >= block.bits


REFUSED = {
    "!mx.fixed<1, 0>": "a fixed-point format has 2 to 32 bits, a sign among them, got 1",
    "!mx.fixed<40, 0>": "a fixed-point format has 2 to 32 bits, a sign among them, got 40",
    "!mx.fixed<8, 100>": "the point of a fixed-point format lies within 64 bits, got 100",
    "!mx.float<0, 3>": "a minifloat has 1 to 7 exponent bits, got 0",
    "!mx.float<7, 9>": "a minifloat has at most 16 bits in all, got 1 \\+ 7 \\+ 9",
    "!mx.block<0xf4E2M1FN>": r"a block has positive dimensions or \?, got \[0\]",
    "!mx.block<f4E2M1FN>": r"a block has positive dimensions or \?, got \[\]",
    "!mx.block<32x!mx.block<4xi8>>": "a block of blocks is not a format: an element is one number",
    "!mx.block<32xf32>": "an element is an integer, a float of at most 19 bits, .* got f32",
    "!mx.block<32xf8E8M0FNU>": "an element is an integer, .* got f8E8M0FNU",
    "!mx.block<32xui4>": "an integer element is signed and has 2 to 32 bits, got ui4",
    "!mx.block<32xi1>": "an integer element is signed and has 2 to 32 bits, got i1",
    "!mx.block<32xi4, i8>": "a scale is one of f8E8M0FNU, f8E4M3FN, f8E5M2, bf16, f16, f32, got i8",
    "!mx.block<32xi4, f64>": "a scale is one of .* got f64",
    "!mx.block<32xi4, bf16, f32>": "a tensor scale is f32 and stands over .* got f32 over bf16",
    "!mx.block<32xi4, f8E4M3FN, bf16>": "a tensor scale is f32 and stands over .* got bf16 over f8E4M3FN",
    "!mx.block<32xi4, f8E4M3FN, f32, f32>": "a block has a scale and a tensor scale, got 3 scales",
    "!mx.block<32xi4, f32, zero i8>": "a zero point is an integer like the elements, got i8 for i4",
    "!mx.block<32xf4E2M1FN, f32, zero i4>": "a zero point is an integer like the elements, got i4 for f4E2M1FN",
    "!mx.block<32xi4, zero i4>": "a zero point needs one float scale per block, got f8E8M0FNU",
    "!mx.mixed<f8E4M3FN, f32>": "the low format of a mixed format has blocks of a stated size, got f8E4M3FN",
    "!mx.mixed<!mx.block<?xi8, f32>, f8E4M3FN>": "the low format of a mixed format has blocks of a stated size",
    f"!mx.mixed<{NVFP4}, bf16>": "the high format of a mixed format is a block or a narrow number, got bf16",
    f"!mx.mixed<{NVFP4}, !mx.block<32xf8E4M3FN>>": "both formats of a mixed format have the same blocks",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_format_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[text]) as refusal:
        parse_format(text)
    assert text in str(refusal.value)


# algorithms B.1, A.4, field case C2, Meta BitNet
BITS = {
    "mxfp8_e4m3": 8.25, "mxfp8_e5m2": 8.25, "mxfp6_e2m3": 6.25, "mxfp6_e3m2": 6.25, "mxfp4": 4.25,
    "mxint8": 8.25, "mxint6": 6.25, "mxint4": 4.25, "mxint3": 3.25, "mxint2": 2.25,
    "nvfp4": 4.5, "nvint4": 4.5, "bfp16": 9.0,
    "int8_tensor": 8.0, "int8_channel": 8.0, "int8_affine": 8.0, "int4_channel": 4.0,
    "int4_g32": 4.5, "int4_g128": 4.125, "int4_g128_affine": 4.15625, "int2_g64": 2.25,
    "fp8_e4m3_tensor": 8.0, "fp8_e5m2_tensor": 8.0, "ternary": 1.6, "bf16": 16.0, "f16": 16.0, "f32": 32.0,
}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_bits(name: str) -> None:
    assert INSTANCES[name].bits == bits(format_of(name)) == BITS[name]


@pytest.mark.parametrize("name", INSTANCES)
def test_storage_tends_to_bits(name: str) -> None:
    assert storage_bits(format_of(name), (4096, 4096)) / 4096**2 == pytest.approx(bits(format_of(name)), rel=3e-3)


def test_storage_of_small_tensors() -> None:
    assert storage_bits(format_of("int8_channel"), (3, 10)) == 3 * 10 * 8 + 3 * 32
    assert storage_bits(format_of("int8_affine"), (3, 10)) == 3 * 10 * 8 + 32 + 8
    assert storage_bits(format_of("nvfp4"), (3, 20)) == 3 * 2 * (16 * 4 + 8) + 32
    assert storage_bits(format_of("ternary"), (3, 4)) == 3 * 8 + 32
    assert storage_bits(format_of("mxfp4", dims=(-2,)), (40, 3)) == 2 * 3 * (32 * 4 + 8)
    assert storage_bits(format_of("fixed<5,0>"), (7,)) == 35
    assert storage_bits(i64, (7,)) == 448
    assert storage_bits(format_of("f16"), ()) == 16


def test_mixed_costs_at_most_its_dearer_format() -> None:
    mixed = parse_format(f"!mx.mixed<{NVFP4}, !mx.block<?x?xf8E4M3FN, f32>>")
    assert isinstance(mixed, MixedType)
    metadata = 1 / 16 + 32 / (1024 * 16)  # one bit a block, one offset of 32 bits for 1024 blocks
    assert mixed.bits_at(1.0) == 4.5 + metadata
    assert mixed.bits_at(0.7) == pytest.approx(0.7 * 4.5 + 0.3 * 8 + metadata)
    assert bits(mixed) == mixed.bits_at(0.0) == 8 + metadata
    assert storage_bits(mixed, (4, 64)) == 4 * 64 * 8 + 16 + 32 + 32 + 32


RULES = {
    "mxfp4": "even",
    "mxfp8_e5m2": "even",
    "mxint8": "floor",
    "bfp16": "floor",
    "nvfp4": "absmax",
    "ternary": "absmean",
}


@pytest.mark.parametrize("name", RULES)
def test_default_scale_rule(name: str) -> None:
    assert default_scale_rule(format_of(name)) == INSTANCES[name].default_scale_rule == RULES[name]


def test_formats_without_a_scale_have_no_rule() -> None:
    for name in ("fixed<8,6>", "bf16", "f32", "f8E4M3FN"):
        assert default_scale_rule(format_of(name)) is None


def test_what_is_wide() -> None:
    assert all(is_wide(fmt) for fmt in (f64, f32, f16, bf16, i1, i8, i32, i64, IndexType()))
    assert not any(is_wide(fmt) for fmt in (f8E4M3FN, f4E2M1FN, FixedType(8, 6), format_of("mxfp4")))


def test_a_block_needs_as_many_dimensions_as_it_has() -> None:
    block = format_of("mxfp4", dims=(-2,))
    verify_tensor(TensorType(block, [4, 4]))
    verify_tensor(TensorType(block, [DYNAMIC_INDEX, 3]))
    with pytest.raises(
        VerifyException, match=r"a block of 2 dimensions does not lie on a tensor of 1: .*32x1xf4E2M1FN"
    ):
        verify_tensor(TensorType(block, [32]))
    mixed = parse_format(f"!mx.mixed<{NVFP4}, !mx.block<?x?xf8E4M3FN, f32>>")
    with pytest.raises(VerifyException, match="a block of 2 dimensions"):
        verify_tensor(TensorType(mixed, [32]))


def test_a_scale_type_is_no_format_of_values() -> None:
    with pytest.raises(VerifyException, match="f8E8M0FNU has neither sign nor zero"):
        verify_tensor(TensorType(f8E8M0FNU, [4]))
    for wide in (f32, i64, i1, IndexType(), f8E4M3FN):
        verify_tensor(TensorType(wide, [4]))


LAYOUTS: list[tuple[str, int, tuple[int, ...], str]] = [
    ("mxfp4", 2, (-1,), "!mx.block<32xf4E2M1FN>"),
    ("mxfp4", 2, (-2,), "!mx.block<32x1xf4E2M1FN>"),
    ("mxfp4", 2, (0,), "!mx.block<32x1xf4E2M1FN>"),
    ("mxfp4", 4, (-3, -2, -1), "!mx.block<32x1x1xf4E2M1FN>"),
    ("nvfp4", 3, (-2,), "!mx.block<16x1xf4E2M1FN, f8E4M3FN, f32>"),
    ("int8_channel", 2, (-1,), "!mx.block<?xi8, f32>"),
    ("int8_channel", 2, (-2,), "!mx.block<?x1xi8, f32>"),
    ("int8_channel", 4, (-3, -2, -1), "!mx.block<1x?x?x?xi8, f32>"),
    ("int8_tensor", 3, (-1,), "!mx.block<?x?x?xi8, f32>"),
    ("ternary", 4, (-1,), "!mx.block<?x?x?x?x!mx.ternary, f32>"),
    ("int4_g128_affine", 2, (-2,), "!mx.block<128x1xi4, bf16, zero i4>"),
    ("block<8xi6, f32>", 2, (-2,), "!mx.block<8x1xi6, f32>"),
    ("block<4x4xi6, f32>", 3, (-2,), "!mx.block<4x4xi6, f32>"),
    ("bf16", 4, (-1,), "bf16"),
    (f"mixed<{NVFP4}, f8E4M3FN>", 2, (-2,), "!mx.mixed<!mx.block<16x1xf4E2M1FN, f8E4M3FN, f32>, f8E4M3FN>"),
]


@pytest.mark.parametrize(("text", "rank", "dims", "laid_out"), LAYOUTS)
def test_layout(text: str, rank: int, dims: tuple[int, ...], laid_out: str) -> None:
    assert str(format_of(text, rank=rank, dims=dims)) == laid_out


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize(("rank", "dims"), [(2, (-1,)), (2, (-2,)), (3, (-1,)), (4, (-3, -2, -1)), (4, (-2,))])
def test_the_name_is_the_same_whatever_the_layout(name: str, rank: int, dims: tuple[int, ...]) -> None:
    assert name_of(format_of(name, rank=rank, dims=dims)) == name


def test_the_name_of_what_has_none_is_its_text() -> None:
    assert name_of(parse_format("block<8xi6, f32>")) == "!mx.block<8xi6, f32>"
    assert name_of(parse_format("fixed<12,3>")) == "fixed<12,3>"
    assert name_of(i64) == "i64"


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("mxfp5", "mxfp4"),
        ("nvfp", "nvfp4"),
        ("int2_g46", "int2_g64"),
        ("int8_chanel", "int8_channel"),
        ("mxint_8", "mxint8"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(text: str, near: str) -> None:
    with pytest.raises(UsageError, match=f'unknown format .* \\(did you mean "{near}'):
        format_of(text)


@pytest.mark.parametrize(
    "text",
    [
        "zzz",
        "",
        "mxfp4) -> (f32",
        "!mx.block<32xf4E2M1FN",
        "!mx.nothing<3>",
        "f32, f32",
        "() -> ()",
        "f32) -> (f32",
        "index<",
        "complex<f32>",
        "f128",
    ],
)
def test_any_other_text_is_refused_in_words(text: str) -> None:
    with pytest.raises(UsageError):
        format_of(text)


def test_dimensions_must_exist() -> None:
    with pytest.raises(UsageError, match=r"dimensions \[-3\] do not lie in a tensor of 2"):
        format_of("mxfp4", rank=2, dims=(-3,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "nearest"}, "unknown rounding 'nearest'"),
        ({"scale_rule": "evn"}, r'unknown scale rule \'evn\' \(did you mean "even"'),
        ({"clip": 0.0}, r"clip is the part of the largest magnitude that is kept, in \(0, 1\], got 0.0"),
        ({"clip": 1.5}, "got 1.5"),
    ],
)
def test_rounding_refuses_what_it_does_not_know(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Rounding(**options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("fmt", [i64, IndexType(), f8E8M0FNU])
def test_nothing_is_rounded_into_a_counted_type(fmt: Attribute) -> None:
    import torch

    from mxloom.dialects.formats import quantize

    with pytest.raises(MxloomError, match=r"nothing is rounded into|neither sign nor zero"):
        quantize(torch.ones(3), fmt)


def test_the_families_are_found_by_their_files() -> None:
    assert set(FAMILIES) == {BlockType, FixedType, MinifloatType, MixedType, TernaryType}


def test_formats_do_not_load_torch() -> None:
    program = "import sys, mxloom.dialects.numbers as n; str(n.formats()); sys.exit('torch' in sys.modules)"
    path = next(entry for entry in sys.path if entry.endswith(".links"))
    assert subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": path}).returncode == 0


@pytest.mark.parametrize("number", ["8", "", "8,", "8.5,2", "8,6,2", "a,b", "8;6", "<"])
@pytest.mark.parametrize("prefix", ["", "!mx."])
def test_a_text_of_a_family_that_is_wrong_shows_its_form(number: str, prefix: str) -> None:
    """The names of the parameters are those under which the family's documentation speaks of them."""
    forms = {
        "fixed": "fixed<width,fraction>",
        "float": "float<exponent,mantissa>",
        "mixed": "mixed<low,high>",
        "block": "block<sizes x element, scale, scale of the tensor>, such as block<32xf4E2M1FN>",
    }
    for family, form in forms.items():
        with pytest.raises(UsageError) as caught:
            parse_format(f"{prefix}{family}<{number}>")
        assert f"; the form is {form}" in str(caught.value)
    with pytest.raises(UsageError, match=r"the form is mxfp4 alone$"):
        parse_format(f"mxfp4<{number}>")


def test_the_forms_inside_a_form_are_shown_too() -> None:
    with pytest.raises(UsageError, match=r"the form is block<.* or block<\?xi8, f32>, and fixed<width,fraction>$"):
        parse_format("block<32x!mx.fixed<8>>")
    examples = re.findall(r"block<[?0-9][^>]*>", BLOCK_FORM)
    assert [type(parse_format(example)) for example in examples] == [BlockType, BlockType]
