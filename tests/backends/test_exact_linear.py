"""Modules whose linear layers state an accumulator: emulation equals the reference, whatever carries it out."""

from __future__ import annotations

import copy
import gc
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from xdsl.dialects.builtin import ModuleOp
from xdsl.utils.exceptions import ParseError, VerifyException

import mxloom
from mxloom.backends.emulate import Emulate, build
from mxloom.backends.kernels import native
from mxloom.backends.kernels.contraction import exact_layers, exact_linear
from mxloom.backends.kernels.contraction.exact_layers import ExactLayers, Norm, Product
from mxloom.backends.kernels.contraction.exact_linear import ExactLinear
from mxloom.backends.kernels.fake_quantization import reference_only
from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects import contractions
from mxloom.dialects.accumulator import AccumulatorAttr
from mxloom.dialects.contractions import coded, why_no_codes
from mxloom.dialects.formats import Rounding
from mxloom.dialects.instances import INSTANCES, format_of
from mxloom.dialects.mx import context, parse_module
from mxloom.passes.accumulate import Accumulate
from mxloom.passes.quantize import Quantize

MODEL = """
func.func @forward(%x: tensor<?x?x72xf32>) -> (tensor<?x?x24xf32>, tensor<?x?x40xf32>) {
  %a.weight = mx.parameter "a.weight" : tensor<24x72xf32>
  %a.bias = mx.parameter "a.bias" : tensor<24xf32>
  %b.weight = mx.parameter "b.weight" : tensor<72x40xf32>
  %a = mx.linear %x, %a.weight, %a.bias : (tensor<?x?x72xf32>, tensor<24x72xf32>, tensor<24xf32>) -> tensor<?x?x24xf32>
  %b = mx.linear %x, %b.weight, transposed : (tensor<?x?x72xf32>, tensor<72x40xf32>) -> tensor<?x?x40xf32>
  func.return %a, %b : tensor<?x?x24xf32>, tensor<?x?x40xf32>
}
"""
FORMATS = [name for name in INSTANCES if why_no_codes(format_of(name, rank=2)) is None]


def store() -> WeightStore:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (24, 72), "a.bias": (24,), "b.weight": (72, 40)}
    return WeightStore.from_state_dict({n: torch.randn(s, generator=generator) for n, s in shapes.items()})


def exact(weights: str, activations: str, **options: object) -> ModuleOp:
    module = parse_module(MODEL)
    Quantize(weights=weights, activations=activations).apply(context(), module)
    Accumulate(**options).apply(context(), module)  # pyright: ignore[reportArgumentType]
    module.verify()
    return module


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, 72, generator=torch.Generator().manual_seed(1))


def outputs(module: ModuleOp, weights: WeightStore, x: torch.Tensor) -> list[list[torch.Tensor]]:
    """By the reference, by kernels, and by torch alone."""
    emulation = build(module, weights)
    found = [Interpreter(module, weights)(x), list(emulation(x))]
    with reference_only():
        found.append(list(emulation(x)))
    return found


def all_equal(found: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("format", FORMATS)
def test_emulation_equals_the_reference(format: str) -> None:
    for weights, activations in [(format, "mxint8"), ("mxfp4", format)]:
        assert all_equal(outputs(exact(weights, activations, format="bf16", partials=2), store(), inputs()))


@pytest.mark.parametrize("rounding", ["rna", "rtz"])
def test_the_rounding_of_a_cast_reaches_the_codes(rounding: str) -> None:
    module, weights = parse_module(MODEL), store()
    Quantize(weights="mxfp4", activations="mxfp6_e2m3", scale_rule="ceil", rounding=rounding).apply(context(), module)
    Accumulate().apply(context(), module)
    found = outputs(module, weights, inputs())
    assert all_equal(found)
    assert not torch.equal(found[0][0], outputs(exact("mxfp4", "mxfp6_e2m3"), weights, inputs())[0][0])


def test_accumulators_change_what_they_should() -> None:
    """Few mantissa bits lose what 23 keep, and then the order of the sums matters."""
    results = [
        Interpreter(exact("mxint8", "nvfp4", **options), store())(inputs())[0]
        for options in (
            {},
            {"format": "bf16"},
            {"format": "e8m13", "rounding": "rtz"},
            {"format": "bf16", "partials": 3},
        )
    ]
    wide = results[0].double()
    errors = [float((result.double() - wide).norm() / wide.norm()) for result in results]
    assert errors[0] == 0
    assert 2**-12 < errors[1] < 2**-6
    assert 2**-18 < errors[2] < 2**-11
    assert 2**-12 < errors[3] < 2**-6
    assert not torch.equal(results[1], results[3])


@pytest.mark.parametrize("partials", [2, 9, 40, 10**9])
def test_any_number_of_partial_sums(partials: int) -> None:
    """More than the code spells out one by one, and more than there are blocks, whose sums stay empty."""
    module = exact("int4_g32", "mxint8", format="bf16", partials=partials)
    assert all_equal(outputs(module, store(), inputs()))


def groups(emulation: nn.Module) -> list[ExactLayers]:
    return [module for module in emulation.modules() if isinstance(module, ExactLayers)]


def test_readers_of_one_value_share_its_codes() -> None:
    emulation = build(exact("mxfp4", "mxint8"), store())
    (group,) = groups(emulation)
    assert [layer.columns for layer in group.layers] == [24, 40]
    assert emulation.get_submodule("a_b") is group
    assert "72 -> 24, 72 -> 40" in repr(group)


@pytest.mark.parametrize("weights", ["mxfp4", "int4_channel"])
@pytest.mark.parametrize("activations", ["mxint8", "nvfp4", "int8_channel", "mxfp8_e4m3", "int8_affine"])
@pytest.mark.parametrize("unit_offset", ["", ", unit_offset"])
def test_norms_and_products_on_the_way_to_codes(weights: str, activations: str, unit_offset: str) -> None:
    """One node for RMS norm, rounding and layer, one for product, rounding and layer; the bits are the same."""
    module = parse_module(f"""
      !x = tensor<?x?x64xf32>
      func.func @f(%x: !x) -> !x {{
        %norm.weight = mx.parameter "norm.weight" : tensor<64xf32>
        %up.weight = mx.parameter "up.weight" : tensor<64x64xf32>
        %gate.weight = mx.parameter "gate.weight" : tensor<64x64xf32>
        %down.weight = mx.parameter "down.weight" : tensor<64x64xf32>
        %n = mx.rms_norm %x, %norm.weight, eps = 0.0001{unit_offset} : (!x, tensor<64xf32>) -> !x
        %up = mx.linear %n, %up.weight : (!x, tensor<64x64xf32>) -> !x
        %gate = mx.linear %n, %gate.weight : (!x, tensor<64x64xf32>) -> !x
        %p = mx.mul %up, %gate : (!x, !x) -> !x
        %down = mx.linear %p, %down.weight : (!x, tensor<64x64xf32>) -> !x
        func.return %down : !x
      }}""")
    Quantize(weights=weights, activations=activations).apply(context(), module)
    Accumulate().apply(context(), module)
    generator = torch.Generator().manual_seed(3)
    state = {f"{name}.weight": torch.randn(64, 64, generator=generator) for name in ("up", "gate", "down")}
    held = WeightStore.from_state_dict(state | {"norm.weight": torch.randn(64, generator=generator)})
    x = torch.randn(2, 5, 64, generator=generator)
    special = x.clone()
    special[1, 2, 3], special[0, 0, 0] = torch.nan, torch.inf
    for given in (x, x[:1, :1], x[:, :0], x.transpose(0, 1), special):
        found = outputs(module, held, given)
        assert all(torch.equal(found[0][0].nan_to_num(7.0), other[0].nan_to_num(7.0)) for other in found[1:])
    emulation = build(module, held)
    assert [type(group.source) for group in groups(emulation)] == [Norm, Product]
    assert not [
        node for node in emulation.graph.nodes if node.op == "call_function" and "getitem" not in str(node.target)
    ]


@pytest.mark.parametrize("transposed", ["", ", transposed"])
@pytest.mark.parametrize("format", ["mxint8", "nvfp4", "int8_channel"])
def test_experts_sum_alike(format: str, transposed: str) -> None:
    """Each row by its own expert is that row by a linear layer of the expert's weight."""
    size = "4x64x24" if transposed else "4x24x64"
    module = parse_module(f"""
      func.func @f(%x: tensor<?x64xf32>, %i: tensor<?xi64>) -> tensor<?x24xf32> {{
        %w = mx.parameter "w" : tensor<{size}xf32>
        %b = mx.parameter "b" : tensor<4x24xf32>
        %y = mx.expert_linear %x, %w, %i, %b{transposed}
          : (tensor<?x64xf32>, tensor<{size}xf32>, tensor<?xi64>, tensor<4x24xf32>) -> tensor<?x24xf32>
        func.return %y : tensor<?x24xf32>
      }}""")
    Quantize(weights=format, activations=format).apply(context(), module)
    Accumulate(format="bf16").apply(context(), module)
    generator = torch.Generator().manual_seed(4)
    state = {"w": torch.randn(*map(int, size.split("x")), generator=generator), "b": torch.randn(4, 24)}
    weights, x = WeightStore.from_state_dict(state), torch.randn(9, 64, generator=generator)
    index = torch.tensor([0, 2, 2, 0, 3, 3, 3, 0, 2])  # nobody asks for expert 1
    emulation, reference = build(module, weights), Interpreter(module, weights)
    expected = reference(x, index)[0]
    assert torch.equal(emulation(x, index)[0], expected)
    with reference_only():
        assert torch.equal(emulation(x, index)[0], expected)
    fmt, acc = format_of(format, rank=2), AccumulatorAttr.of("bf16")
    matrices = state["w"].transpose(1, 2) if transposed else state["w"]
    if format != "nvfp4":  # its experts share the scale of the tensor
        each = [
            contractions.linear(
                coded(x, fmt, Rounding("floor") if format == "mxint8" else Rounding()),
                coded(m, fmt, Rounding()),
                b,
                acc,
            )
            for m, b in zip(matrices, state["b"], strict=True)
        ]
        assert torch.equal(torch.stack(each)[index, torch.arange(9)], expected)
    taught = x.clone().requires_grad_()
    emulation(taught, index)[0].sum().backward()
    assert taught.grad is not None
    values = mxloom.fake_quantize(state["w"], format, dim=1 if transposed else 2)
    values = values.transpose(1, 2) if transposed else values
    assert torch.allclose(taught.grad, values[index].sum(1), rtol=1e-5, atol=1e-5)


def test_what_torch_asks_of_modules() -> None:
    """Gradients, copies, fake tensors, export, compilation, vmap: as for any other module."""
    layer = nn.Linear(64, 32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    arguments = {"weights": "nvfp4", "activations": "mxint8", "example": {"input": x}}
    compiled = mxloom.compile(layer, mode="exact", **arguments)
    emulation, expected = compiled.emulation, compiled(x)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    emulation(a)[0].sum().backward()
    mxloom.compile(layer, **arguments).emulation(b)[0].sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.compile(emulation, backend="eager")(x)[0], expected)
    assert torch.equal(torch.export.export(emulation, (x,)).module()(x)[0], expected)
    assert torch.equal(torch.func.vmap(lambda row: emulation(row[None])[0][0])(x), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert emulation(mode.from_tensor(x))[0].shape == (3, 32)


def test_a_copy_outlives_its_original() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    layer = nn.Linear(64, 32)
    compiled = mxloom.compile(layer, weights="mxfp4", activations="mxint8", example={"input": x}, mode="exact")
    expected = compiled(x)
    twin = copy.deepcopy(compiled.emulation)
    del compiled
    gc.collect()
    assert torch.equal(twin(x)[0], expected)
    assert torch.equal(torch.compile(twin, backend="eager")(x)[0], expected)


def test_threads_do_not_share_memory_for_codes() -> None:
    module, weights = exact("mxfp4", "mxint8"), store()
    emulation = build(module, weights)
    given = [torch.randn(1, 64, 72, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = [emulation(x) for x in given]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            found = list(pool.map(emulation, given))
            assert all(
                torch.equal(a, b) for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True)
            )


def test_codes_of_a_stored_weight_are_those_of_the_file(tmp_path: Path) -> None:
    """NVFP4 rounded twice differs, so a saved layer must read its codes, not round its values anew."""
    layer = nn.Linear(64, 32)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    for weights in ("nvfp4", "int4_channel", "int8_affine", "mxfp4"):
        compiled = mxloom.compile(layer, weights=weights, activations="nvfp4", example={"input": x}, mode="exact")
        compiled.save(tmp_path / weights)
        loaded = mxloom.load(tmp_path / weights)
        assert "#mx.accumulator<f32>" in str(loaded.module)
        assert torch.equal(loaded(x), compiled(x))
        assert torch.equal(Interpreter(loaded.module, loaded.weights)(x)[0], compiled(x))


def test_odd_inputs_give_what_the_definition_gives() -> None:
    """Strides, other dtypes, one row, no row, NaN, infinity."""
    module, weights = exact("mxfp4", "mxint8"), store()
    emulation, reference = build(module, weights), Interpreter(module, weights)
    x = inputs()
    special = x.clone()
    special[0, 1, 3], special[1, 2, 70] = torch.nan, torch.inf
    for given in (x[:1, :1], x[:, :0], x.transpose(0, 1), special, x.expand(3, 2, 5, 72)[1]):
        for a, b in zip(emulation(given), reference(given), strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_the_text_of_the_emulation_can_be_read_without_weights() -> None:
    stream = io.StringIO()
    Emulate().emit(context(), exact("mxfp4", "mxint8"), stream)
    assert "self.a_b(x)" in stream.getvalue()


@pytest.mark.parametrize(("weight", "input", "holds"), [("mxint2", "mxint2", True), ("mxint8", "mxint8", False)])
def test_the_certificate(weight: str, input: str, holds: bool) -> None:
    """256 products of one-bit magnitudes in few binades fit 24 digits, of seven-bit ones they do not."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(8, 256, generator=generator) for _ in range(2))
    a, b = coded(x, format_of(input, rank=2), Rounding()), coded(w, format_of(weight, rank=2), Rounding())
    acc = AccumulatorAttr.of()
    assert contractions.holds_every_sum(a, b, acc) == holds
    if holds:
        assert torch.equal(contractions.linear_in_f32(a, b, None), contractions.linear(a, b, None, acc))
        assert not contractions.holds_every_sum(a, b, AccumulatorAttr.of("bf16"))


def test_a_layer_says_why_it_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_linear, "datapath", lambda codes: None)
    fmt = format_of("mxint8", rank=2)
    layer = ExactLinear(coded(torch.randn(4, 64), fmt, Rounding()), None, AccumulatorAttr.of(), fmt)
    assert layer.why_not == "the processor multiplies no codes of i8"


@pytest.mark.parametrize("spread", [2, 30])
def test_elements_of_a_wide_range_are_summed_exactly(spread: int) -> None:
    """E5M2 by E5M2: by a kernel where the numbers at hand fit f64, else by halves; the sums are the same."""
    generator = torch.Generator().manual_seed(spread)
    x, w = (
        torch.randn(4, 64, generator=generator)
        * torch.exp2(torch.randint(-spread, 1, (4, 64), generator=generator).float())
        for _ in range(2)
    )
    fmt, acc = format_of("mxfp8_e5m2", rank=2), AccumulatorAttr.of()
    input, weight = (coded(each, fmt, Rounding()) for each in (x, w))
    layer = ExactLinear(weight, None, acc, fmt)
    assert torch.equal(layer(input), contractions.linear(input, weight, None, acc))
    assert (layer._native(input) is not None) == (spread == 2 and native.why_not() is None)


@pytest.mark.parametrize("missing", ["llvmlite", "instructions"])
def test_machines_without_kernels_sum_alike(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, weights, x = exact("mxfp4", "mxint8"), store(), inputs()
    expected = Interpreter(module, weights)(x)
    if missing == "llvmlite":
        monkeypatch.setattr(exact_linear, "datapath", lambda codes: None)
        monkeypatch.setattr(exact_layers, "_prepared", lambda *arguments: "llvmlite is not installed")
    else:
        monkeypatch.setattr(exact_linear, "datapath", lambda codes: None)
    assert all(torch.equal(a, b) for a, b in zip(build(module, weights)(x), expected, strict=True))


@pytest.mark.skipif(native.why_not() is not None, reason=f"{native.why_not()}; run on x86-64 or 64-bit Arm")
def test_a_layer_runs_on_its_kernel() -> None:
    fmt = format_of("mxint8", rank=2)
    assert ExactLinear(coded(torch.randn(4, 64), fmt, Rounding()), None, AccumulatorAttr.of(), fmt).why_not is None


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("tensor<24x72xf32>", "the weight is f32, not quantized"),
        (
            "tensor<24x72x!mx.mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, f8E4M3FN>>",
            "not made of blocks with one kind",
        ),
    ],
)
def test_operands_without_codes_are_refused(weight: str, message: str) -> None:
    text = f"""
      func.func @f(%x: tensor<2x72x!mx.block<8xi8>>, %w: {weight}) -> tensor<2x24xf32> {{
        %y = mx.linear %x, %w, acc = #mx.accumulator<f32> : (tensor<2x72x!mx.block<8xi8>>, {weight}) -> tensor<2x24xf32>
        func.return %y : tensor<2x24xf32>
      }}"""
    with pytest.raises(VerifyException, match=message):
        parse_module(text)


def test_values_whose_scales_are_lost_are_refused() -> None:
    nvfp4 = "!mx.block<16xf4E2M1FN, f8E4M3FN, f32>"
    text = f"""
      func.func @f(%x: tensor<2x32x{nvfp4}>, %w: tensor<4x32x{nvfp4}>) -> tensor<2x4xf32> {{
        %y = mx.linear %x, %w, acc = #mx.accumulator<f32>
          : (tensor<2x32x{nvfp4}>, tensor<4x32x{nvfp4}>) -> tensor<2x4xf32>
        func.return %y : tensor<2x4xf32>
      }}"""
    with pytest.raises(VerifyException, match="whose scales are not kept"):
        parse_module(text)


@pytest.mark.parametrize(
    ("accumulator", "message"),
    [
        ("e8m99", "an accumulator has 1 to 23 mantissa bits, got 99"),
        ("f16", 'no accumulator is called "f16"'),
        ("e8m13, rna", 'an accumulator rounds "rne" or "rtz", got "rna"'),
        ("e8m13, rtz, 0", "at least one partial sum, got 0"),
    ],
)
def test_a_wrong_accumulator_in_a_text_is_told_with_its_line(accumulator: str, message: str) -> None:
    text = f""""builtin.module"() ({{\n}}) {{a = #mx.accumulator<{accumulator}>}} : () -> ()"""
    with pytest.raises(ParseError) as raised:
        parse_module(text)
    assert message in str(raised.value)
    assert ":2:" in str(raised.value)
