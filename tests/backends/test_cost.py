"""The cost model against counts by hand, and bits against the field case of honest bits (C2)."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import pytest
import torch

import mxloom
from mxloom.backends.cost import Cost, cost
from mxloom.backends.coverage import coverage
from mxloom.backends.stored_tensors import sized
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.formats import encode_tensor
from mxloom.dialects.instances import format_of
from mxloom.dialects.mx import context, parse_module, parse_type
from mxloom.passes._context import CompileContext
from mxloom.passes.pack import Pack
from mxloom.passes.quantize import Quantize

LINEAR = """
func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x32xf32> {
  %a.weight = mx.parameter "a.weight" : tensor<64x64xf32>
  %a = mx.linear %x, %a.weight : (tensor<?x64xf32>, tensor<64x64xf32>) -> tensor<?x64xf32>
  %b.weight = mx.parameter "b.weight" : tensor<32x64xf32>
  %b = mx.linear %a, %b.weight : (tensor<?x64xf32>, tensor<32x64xf32>) -> tensor<?x32xf32>
  func.return %b : tensor<?x32xf32>
}
"""


def weights(dtype: torch.dtype = torch.float32) -> WeightStore:
    return WeightStore.from_state_dict(
        {"a.weight": torch.ones(64, 64, dtype=dtype), "b.weight": torch.ones(32, 64, dtype=dtype)}
    )


def quantized(**options) -> object:
    module = parse_module(LINEAR)
    Quantize(**options).apply(context(), module)
    return module


def test_macs_bits_and_traffic_by_hand():
    total = cost(quantized(match="a", weights="mxfp4", activations="mxint8"), weights(torch.bfloat16), [(5, 64)])
    assert total.macs == 5 * 64 * 64 + 5 * 64 * 32
    assert total.parameters == 64 * 64 + 32 * 64
    assert total.weight_bits == pytest.approx((4096 * 4.25 + 2048 * 16) / 6144, abs=1e-12)
    assert total.quantized_weight_bits == pytest.approx(4.25)
    assert total.activation_bits == pytest.approx((320 * 8.25 + 320 * 32) / 640)
    assert total.bytes == 4096 * 4.25 / 8 + 2048 * 2
    a, b = total.contractions
    assert a.traffic_bytes == 320 * 8.25 / 8 + 4096 * 4.25 / 8 + 320 * 4
    assert b.traffic_bytes == 320 * 4 + 2048 * 4 + 160 * 4


def test_stored_mixed_blocks_count_what_they_are():
    """Of 256 blocks of 16, 64 are high: NVFP4 with a scale each, FP8, a bit a block, one offset, two tensor scales."""
    fgmp = "!mx.mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, !mx.block<?x?xf8E4M3FN, f32>>"
    text = LINEAR.replace("64x64xf32>\n", f"64x64x{fgmp}>\n", 1).replace("tensor<64x64xf32>)", f"tensor<64x64x{fgmp}>)")
    store, choice = weights(torch.bfloat16), torch.zeros(64, 4, dtype=torch.uint8)
    choice[:, 2] = 1
    store.put_encoded("a.weight", encode_tensor(store.wide("a.weight"), parse_type(fgmp), choice=choice))
    total = cost(parse_module(text), store, [(5, 64)])
    needed = 192 * (16 * 4 + 8) + 64 * 16 * 8 + 256 + 32 + 2 * 32
    (a, b) = total.tensors
    assert (a.name, a.bits, b.bits) == ("a.weight", needed, 2048 * 16)
    assert a.own_bits == pytest.approx(4096 * (0.75 * 4.5 + 0.25 * 8 + (1 + 1 / 32) / 16))
    assert total.bytes == (needed + 2048 * 16) / 8
    assert total.contractions[0].traffic_bytes == 320 * 4 + needed // 8 + 320 * 4


def test_mixed_blocks_that_a_threshold_will_decide_count_the_most_they_can_take():
    fgmp = "mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, !mx.block<?x?xf8E4M3FN, f32>>"
    module, store = quantized(match="a", weights=fgmp, weight_threshold=1e9), weights()
    before = cost(module, store, [(5, 64)]).tensors[0]
    Pack().apply(CompileContext(weights=store), module)
    after = cost(module, store, [(5, 64)]).tensors[0]
    assert before.bits - after.bits == 256 * (16 * 8 - 16 * 4 - 8)


def test_a_wide_parameter_counts_as_the_checkpoint_stores_it():
    module = parse_module(LINEAR)
    assert cost(module, weights(torch.bfloat16), [(1, 64)]).weight_bits == 16
    assert cost(module, weights(torch.float32), [(1, 64)]).weight_bits == 32


def test_coverage_lists_what_stayed_wide_and_why():
    share = coverage(quantized(match="a", weights="mxfp4"), weights(), [(5, 64)])
    assert share.macs == {"mxfp4 x f32": pytest.approx(2 / 3), "f32": pytest.approx(1 / 3)}
    assert share.quantized_macs == 0
    assert share.weights_only_macs == pytest.approx(2 / 3)
    assert [(name, why) for name, _, why in share.wide] == [
        ("a.input", "rule 1 gives it no format"),
        ("b.input", "no rule matches it"),
        ("b.weight", "no rule matches it"),
    ]
    assert share.elements == {"mxfp4": pytest.approx(2 / 3), "f32": pytest.approx(1 / 3)}


def test_honest_bits_of_the_field_case():
    """600 000 weights MXFP4, 300 000 NVFP4 in three tensors, 100 000 bf16: 5.5 bits and three tensor scales."""
    names = [("a", 600_000, "mxfp4"), *((f"b{i}", 100_000, "nvfp4") for i in range(3)), ("c", 100_000, None)]
    lines, tensors = [], {}
    for name, count, _ in names:
        rows = count // 32
        lines.append(f'%{name}.weight = mx.parameter "{name}.weight" : tensor<{rows}x32xf32>')
        types = f"(tensor<1x32xf32>, tensor<{rows}x32xf32>) -> tensor<1x{rows}xf32>"
        lines.append(f"%{name} = mx.linear %x, %{name}.weight : {types}")
        tensors[f"{name}.weight"] = torch.ones(rows, 32, dtype=torch.bfloat16)
    text = "func.func @forward(%x: tensor<1x32xf32>) -> tensor<1x3125xf32> {\n" + "\n".join(lines)
    module = parse_module(text + "\nfunc.return %c : tensor<1x3125xf32>\n}")
    for name, _, format in names:
        if format:
            Quantize(match=name, weights=format).apply(context(), module)
    store = WeightStore.from_state_dict(tensors)
    total = cost(module, store, [(1, 32)])
    assert total.parameters == 1_000_000
    assert total.weight_bits == pytest.approx(5.5 + 96 / 1e6, abs=1e-9)
    packed = store.copy()
    Pack().apply(CompileContext(weights=packed), module)
    module.verify()
    stored = sum(packed[n].numel() * packed[n].element_size() for n in packed)
    assert abs(8 * stored / total.parameters - total.weight_bits) < 0.01
    assert cost(module, packed, [(1, 32)]).weight_bits == total.weight_bits, "one function before and after packing"


def test_a_weight_kept_in_another_wide_type_is_stored_and_counted_once():
    """A tied table that one reader takes in bf16 and another as it is, lies in the file once."""
    module = parse_module(LINEAR)
    Quantize(match="a", keep="bf16").apply(context(), module)
    total = cost(module, weights(torch.bfloat16), [(1, 64)])
    assert total.parameters == 64 * 64 + 32 * 64
    assert total.bytes == 2 * total.parameters


def test_the_summary_of_coverage_names_the_largest_first_and_counts_nothing_twice():
    share = coverage(quantized(match="b", weights="mxfp4", activations="mxint8"), weights(), [(5, 64)])
    assert share.summary().splitlines() == [
        "33.3% of MACs with every operand quantized: f32 66.7%, mxfp4 x mxint8 33.3%",
        "kept wide: a (input, weight; 66.7% of MACs: no rule matches it)",
    ]


def few_channels(**formats: str) -> Cost:
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3))
    return mxloom.compile(conv, example={"input": torch.randn(2, 3, 8, 8)}, **formats).cost()


def test_tensors_that_padding_more_than_doubles_are_named():
    """32 x 3 x 3 blocks of 32 elements of 4 bits and a scale of 8, for 3 channels each; f32 has 32 bits for each."""
    blocks = 32 * 3 * 3
    total = few_channels(weights="mxfp4", activations="mxint8")
    assert total.bytes == blocks * (32 * 4 + 8) // 8 + 32 * 4 > few_channels().bytes == (blocks * 3 + 32) * 4
    weight, activation = total.padded
    assert (weight.name, weight.bits, weight.own_bits) == ("0.weight", blocks * 136, blocks * 3 * 4.25)
    assert (activation.name, activation.bits) == ("0.input", 8 * 8 * (32 * 8 + 8))
    said = total.summary().splitlines()[1]
    assert f"0.weight {136 / 3:.4g} bits an element, not the 4.25 of mxfp4 ({1 - 4.25 * 3 / 136:.0%} added)" in said
    assert f"0.input {264 / 3:.4g} bits an element, not the 8.25 of mxint8" in said


@pytest.mark.parametrize("formats", [{}, {"weights": "bf16"}, {"weights": "int8_channel"}, {"weights": "fixed<8,6>"}])
def test_formats_that_need_no_padding_have_no_such_line(formats):
    """A scale of 32 bits for each 27 weights of 8 is no doubling."""
    assert few_channels(**formats).padded == ()
    assert len(few_channels(**formats).summary().splitlines()) == 1


def test_many_padded_tensors_are_counted():
    tensors = tuple(sized(f"{i}.weight", format_of("mxfp4"), (32, i + 1)) for i in range(8))
    said = Cost((), tensors, ()).summary().splitlines()[1]
    assert said.count("bits an element") == 5
    assert said.endswith(", and 3 more")
