"""`legalize-hardware`: formats by range, meanings in integers, what stays on the host, what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn
from xdsl.dialects.builtin import TensorType

import mxloom
from mxloom.backends.reference import Interpreter, body
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import MxloomError, UsageError
from mxloom.dialects.formats import FixedType, is_wide
from mxloom.dialects.mx import parse_module
from mxloom.dialects.operations._operation import Operation
from mxloom.dialects.operations._shapes import element_of
from mxloom.dialects.operations.attention import RopeOp
from mxloom.dialects.operations.cast import CastOp
from mxloom.dialects.operations.contraction import LinearOp
from mxloom.dialects.operations.parameter import ParameterOp
from mxloom.passes._context import CompileContext
from mxloom.passes.legalize_hardware import LegalizeHardware


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def legalized(**options: object) -> mxloom.Compiled:
    passes = ",".join(f"{key}={value}" for key, value in options.items()).replace(",", " ")
    recipe = {
        "version": 1,
        "quantize": [{"weights": "mxint8", "activations": "mxint8"}],
        "passes": [f"legalize-hardware{{{passes}}}" if passes else "legalize-hardware"],
    }
    return mxloom.compile(Mlp().eval(), recipe, example={"x": random(4, 64)})


def test_every_value_of_an_mlp_is_fixed_point_and_near_what_it_was() -> None:
    compiled = legalized()
    for op in body(compiled.module).ops:
        if isinstance(op, Operation) and not isinstance(op, ParameterOp):
            assert all(not is_wide(element_of(result)) for result in op.results)
    assert isinstance(element_of(body(compiled.module).args[0]), FixedType)
    wide = mxloom.compile(Mlp().eval(), weights="mxint8", activations="mxint8", example={"x": random(4, 64)})
    x = random(4, 64)
    assert (compiled(x) - wide(x)).abs().max() <= 2e-2 * float(wide(x).abs().max())
    assert torch.equal(compiled(x), Interpreter(compiled.module, compiled.weights)(x)[0])


def test_the_point_lies_where_twice_the_largest_magnitude_fits() -> None:
    """F = width - 1 - n, n the smallest with 2 x amax <= 2^n, of what the module computed before."""
    wide = mxloom.compile(Mlp().eval(), weights="mxint8", activations="mxint8", example={"x": random(4, 64)})
    largest: dict[str, float] = {}

    def observe(value: object, tensor: Tensor) -> None:
        largest[value.name_hint] = float(tensor.abs().max())  # type: ignore[attr-defined]

    Interpreter(wide.module, wide.weights)(random(4, 64), observe=observe)
    checked = 0
    for op in body(legalized(width=20).module).ops:
        for result in op.results:
            assert isinstance(result.type, TensorType)
            format = result.type.element_type
            if isinstance(format, FixedType) and not isinstance(op, CastOp | ParameterOp):
                n = math.ceil(math.log2(2 * largest[result.name_hint or ""]))
                assert (format.width.data, format.fraction.data) == (20, 19 - n)
                checked += 1
    assert checked == 5


def test_windows_reach_8_bits_below_their_result() -> None:
    layers = [op for op in body(legalized(window=40).module).ops if isinstance(op, LinearOp)]
    assert len(layers) == 2
    for layer in layers:
        format = element_of(layer.result)
        assert isinstance(format, FixedType) and layer.window is not None
        assert (layer.window.width.data, layer.window.lsb.data) == (40, -(format.fraction.data + 8))


def test_a_window_that_what_was_seen_leaves_is_an_error_that_offers_the_width() -> None:
    with pytest.raises(MxloomError, match=r"needs \d+ bits, window=\d+") as error:
        legalized(window=16)
    assert str(error.value).count("\n") == 2  # both layers at once
    assert "up: " in str(error.value) and "down: " in str(error.value)


def test_options_out_of_range_and_missing_inputs_are_told() -> None:
    with pytest.raises(UsageError, match="width is a whole number from 8 to 24, got 32"):
        LegalizeHardware(width=32)
    module = parse_module("func.func @f(%x: tensor<4xf32>) -> tensor<4xf32> { func.return %x : tensor<4xf32> }")
    with pytest.raises(UsageError, match="there are no inputs to run the model on"):
        LegalizeHardware().apply(CompileContext(weights=WeightStore()), module)


def apply(text: str, inputs: Sequence[Tensor], weights: dict[str, Tensor] | None = None, **options: object) -> str:
    module, store = parse_module(text), WeightStore.from_state_dict(weights or {})
    context = CompileContext(weights=store, calibration=lambda samples: [list(inputs)])
    LegalizeHardware(**options).apply(context, module)  # type: ignore[arg-type]
    module.verify()
    return str(module)


def test_one_plus_weight_becomes_a_weight() -> None:
    text = apply(
        """func.func @f(%x: tensor<2x8xf32>) -> tensor<2x8xf32> {
          %w = mx.parameter "norm" : tensor<8xf32>
          %y = mx.rms_norm %x, %w, eps = 1.0e-06, unit_offset : (tensor<2x8xf32>, tensor<8xf32>) -> tensor<2x8xf32>
          func.return %y : tensor<2x8xf32>
        }""",
        [random(2, 8)],
        {"norm": torch.full((8,), 0.75)},
    )
    assert 'mx.parameter "norm.plus_one"' in text and '"norm"' not in text and "unit_offset" not in text
    assert "tensor<8x!mx.fixed<16, 14>>" in text  # 1.75 < 2


def test_sensitivities_of_computed_values_have_few_bits_and_those_of_weights_stay() -> None:
    """12 bits, the largest (0.75) just within; hardware meets the weights' own before it is built."""
    mixed = "!mx.mixed<!mx.block<16xf4E2M1FN>, !mx.block<16xf8E4M3FN>>"
    text = apply(
        f"""func.func @f(%x: tensor<2x16xf32>) -> tensor<2x8xf32> {{
          %s = mx.parameter "s" : tensor<16xf32>
          %a = mx.cast %x, sensitivity %s {{threshold = 0.5 : f64}}
            : tensor<2x16xf32>, tensor<16xf32> to tensor<2x16x{mixed}>
          %w = mx.parameter "w" : tensor<8x16xf32>
          %b = mx.cast %w, sensitivity %s {{threshold = 0.5 : f64}}
            : tensor<8x16xf32>, tensor<16xf32> to tensor<8x16x{mixed}>
          %y = mx.linear %a, %b : (tensor<2x16x{mixed}>, tensor<8x16x{mixed}>) -> tensor<2x8xf32>
          func.return %y : tensor<2x8xf32>
        }}""",
        [random(2, 16)],
        {"s": torch.linspace(0, 0.75, 16), "w": random(8, 16)},
    )
    assert f"tensor<16x!mx.fixed<12, 11>> to tensor<2x16x{mixed}>" in text
    assert f"tensor<16xf32> to tensor<8x16x{mixed}>" in text


def test_everything_without_a_meaning_is_listed_at_once() -> None:
    text = """func.func @f(%x: tensor<2x8xf32>, %m: tensor<2x8xf32>) -> tensor<2x8xf32> {
      %a = mx.div %x, %m : (tensor<2x8xf32>, tensor<2x8xf32>) -> tensor<2x8xf32>
      %b = mx.softplus %a : (tensor<2x8xf32>) -> tensor<2x8xf32>
      %c = mx.matmul %b, %w : (tensor<2x8xf32>, tensor<8x8xf32>) -> tensor<2x8xf32>
      func.return %c : tensor<2x8xf32>
    }""".replace("%a = mx.div", '%w = mx.parameter "w" : tensor<8x8xf32>\n%a = mx.div')
    with pytest.raises(MxloomError) as error:
        apply(text, [random(2, 8), random(2, 8).abs() + 1], {"w": random(8, 8)})
    lines = str(error.value).splitlines()
    assert lines[0].startswith("3 operations have no meaning")
    assert "a: mx.div" in lines[1] and "b: mx.softplus" in lines[2] and "quantize it before" in lines[3]


def test_only_the_part_that_is_named_is_legalized() -> None:
    text = """func.func @f(%x: tensor<2x8xf32>) -> tensor<2x8xf32> {
      %one.act = mx.silu %x : (tensor<2x8xf32>) -> tensor<2x8xf32>
      %two.act = mx.silu %one.act : (tensor<2x8xf32>) -> tensor<2x8xf32>
      func.return %two.act : tensor<2x8xf32>
    }"""
    lines = apply(text, [random(2, 8)], part=("two",)).splitlines()
    (one,), (two,) = ([line for line in lines if f"%{name}.act = " in line] for name in ("one", "two"))
    assert "integer" not in one and "integer = #mx.integer<8>" in two
    with pytest.raises(UsageError, match="no operation computes"):
        apply(text, [random(2, 8)], part=("three",))


def normalized(weight: float, bias: float) -> nn.Module:
    norm = nn.LayerNorm(64)
    with torch.no_grad():
        norm.weight.fill_(weight)
        norm.bias.fill_(bias)
    return nn.Sequential(norm, nn.Linear(64, 8))


def weighted(weight: float, bias: float = 0.0) -> nn.Module:
    linear = nn.Linear(64, 8)
    with torch.no_grad():
        linear.weight.mul_(weight)
        linear.bias.fill_(bias)
    return nn.Sequential(linear, nn.ReLU())


X = random(4, 64)
OUT_OF_RANGE = {
    "a bias beyond its weight": (lambda: normalized(1e-7, 3000.0), X, r"0: .*its bias .* is too large for its weight"),
    "a bias like a mask": (lambda: weighted(1.0, 1e30), X, r"0: .* reaches 1e\+30 or more, and no fixed point holds"),
    "inputs without a range": (lambda: weighted(1.0), 0 * X, "input input: is 0 in every calibration input"),
    "infinite inputs": (lambda: weighted(1.0), X / 0, "calibration input 0: 256 of 256 values of input are NaN or inf"),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_what_has_no_range_in_fixed_point_is_refused(case: str) -> None:
    make, x, message = OUT_OF_RANGE[case]
    recipe = {"quantize": [{"weights": "mxint8", "activations": "mxint8"}], "passes": ["legalize-hardware"]}
    with pytest.raises(MxloomError, match=message):
        mxloom.compile(make().eval(), recipe, example={"input": x})


@pytest.mark.parametrize(("weight", "told"), [(1e-12, True), (0.0, True), (1.0, False)])
def test_values_without_significant_bits_are_told(weight: float, told: bool) -> None:
    recipe = {"quantize": [{"weights": "mxint8", "activations": "mxint8"}], "passes": ["legalize-hardware"]}
    compiled = mxloom.compile(weighted(weight).eval(), recipe, example={"input": X})
    notes = [note for note in compiled.notes() if "significant bits" in note]
    assert bool(notes) is told
    if told:
        assert notes[0].startswith("2 values were 0, or so small")


def test_attention_in_integers_is_said_to_sum_in_a_window() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    recipe = {"quantize": [{"weights": "mxint8", "activations": "mxint8"}], "passes": ["legalize-hardware"]}
    compiled = mxloom.compile(transformers.LlamaForCausalLM(config).eval(), recipe)
    assert compiled.coverage().torch_sums == ()


def test_angles_beyond_2_have_a_point_that_holds_them() -> None:
    """Rotary angles may be scaled (YaRN, arXiv 2309.00071, section 3.4): here by 3, which 14 bits of 16 do not hold."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0, "rope_theta": 10000.0,
                         "original_max_position_embeddings": 32},
    )  # fmt: skip
    torch.manual_seed(0)
    recipe = {"quantize": [{"weights": "mxint8", "activations": "mxint8"}], "passes": ["legalize-hardware"]}
    compiled = mxloom.compile(transformers.LlamaForCausalLM(config).eval(), recipe)
    formats = {
        str(element_of(operand))
        for op in body(compiled.module).ops
        if isinstance(op, RopeOp)
        for operand in (op.cos, op.sin)
    }
    assert formats == {"!mx.fixed<16, 13>"}, "16 bits, 2 of them before the point: up to 4"


def test_what_comes_into_a_part_in_blocks_is_fixed_point_before() -> None:
    """The cast's name is that of the value outside; with it the part has no float of its own to read."""
    block = "tensor<2x8x!mx.block<32x!mx.fixed<8, 6>>>"
    text = f"""func.func @f(%x: tensor<2x8xf32>) -> tensor<2x8xf32> {{
      %one.act = mx.silu %x : (tensor<2x8xf32>) -> tensor<2x8xf32>
      %one.act.mxint8 = mx.cast %one.act {{scale_rule = "floor"}} : tensor<2x8xf32> to {block}
      %w = mx.parameter "w" : tensor<8x8xf32>
      %q = mx.cast %w {{scale_rule = "floor"}} : tensor<8x8xf32> to tensor<8x8x!mx.block<32x!mx.fixed<8, 6>>>
      %two.up = mx.linear %one.act.mxint8, %q
        : ({block}, tensor<8x8x!mx.block<32x!mx.fixed<8, 6>>>) -> tensor<2x8xf32>
      func.return %two.up : tensor<2x8xf32>
    }}"""
    lines = apply(text, [random(2, 8)], {"w": random(8, 8)}, part=("two",)).splitlines()
    readers = [line for line in lines if "mx.cast %one.act {" in line]
    assert len(readers) == 1 and readers[0].split(" to ")[1].startswith("tensor<2x8x!mx.fixed<24, ")
    assert any("mx.cast %one.act.fixed24 " in line and line.endswith(f" to {block}") for line in lines)
