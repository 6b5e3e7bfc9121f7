"""`pack`: the stored parameter decodes to what the cast computed, once for each format in which it is read."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import pytest
import torch

import mxloom
from mxloom.backends.reference import Interpreter
from mxloom.backends.weight_store import WeightStore
from mxloom.dialects.errors import UsageError
from mxloom.dialects.mx import context, parse_module, parse_type
from mxloom.passes._context import CompileContext
from mxloom.passes.pack import Pack
from mxloom.passes.quantize import Quantize

TIED = """
func.func @forward(%ids: tensor<?x?xi64>) -> tensor<?x?x50xf32> {
  %embed.weight = mx.parameter "embed.weight" : tensor<50x40xf32>
  %embed = mx.embedding %embed.weight, %ids : (tensor<50x40xf32>, tensor<?x?xi64>) -> tensor<?x?x40xf32>
  %lm_head = mx.linear %embed, %embed.weight : (tensor<?x?x40xf32>, tensor<50x40xf32>) -> tensor<?x?x50xf32>
  func.return %lm_head : tensor<?x?x50xf32>
}
"""


def tied() -> WeightStore:
    store = WeightStore.from_state_dict(
        {"embed.weight": torch.randn(50, 40, generator=torch.Generator().manual_seed(0))}
    )
    store.alias("lm_head.weight", "embed.weight")
    return store


def pack(*rules: Quantize):
    module, store = parse_module(TIED), tied()
    for rule in rules:
        rule.apply(context(), module)
    ids = torch.arange(6).view(2, 3)
    before = Interpreter(module, store)(ids)[0]
    packed = store.copy()
    Pack().apply(CompileContext(weights=packed), module)
    module.verify()
    assert torch.equal(Interpreter(module, packed)(ids)[0], before), "packing changes no bit of the result"
    return module, packed


def test_head_alone_quantized_leaves_the_embedding_bit_equal_and_stores_two_tensors():
    """Field case E2 (a)."""
    module, packed = pack(Quantize(match="lm_head", weights="int8_channel"))
    names = sorted(op.source.data for op in module.walk() if op.name == "mx.parameter")
    assert names == ["embed.weight", "lm_head.weight"]
    assert torch.equal(packed["embed.weight"], tied()["embed.weight"])
    assert packed.parts("lm_head.weight").keys() == {"codes", "scales"}


def test_both_uses_in_one_format_are_stored_once():
    """Field case E2 (b)."""
    module, packed = pack(Quantize(kind=("embedding", "linear"), weights="int8_channel"))
    assert [op.source.data for op in module.walk() if op.name == "mx.parameter"] == ["embed.weight"]
    assert packed.parts("embed.weight").keys() == {"codes", "scales"}


def test_nothing_to_fold_changes_nothing():
    module, _ = pack(Quantize(match="lm_head", activations="mxint8"))
    assert [op.source.data for op in module.walk() if op.name == "mx.parameter"] == ["embed.weight"]


def test_without_weights_the_pass_says_so():
    with pytest.raises(UsageError, match="the pass 'pack' reads weights, and there are none here"):
        Pack().apply(context(), parse_module(TIED))


FGMP = "!mx.mixed<!mx.block<16xf4E2M1FN, f8E4M3FN, f32>, !mx.block<?x?xf8E4M3FN, f32>>"
WEIGHED = f"""
func.func @forward(%x: tensor<3x40xf32>) -> tensor<3x8xf32> {{
  %w = mx.parameter "w" : tensor<8x40xf32>
  %g = mx.parameter "g" : tensor<8x40xf32>
  %c = mx.parameter "c" : tensor<40xf32>
  %wf = mx.cast %w, sensitivity %g {{threshold = 0.1 : f64}}
    : tensor<8x40xf32>, tensor<8x40xf32> to tensor<8x40x{FGMP}>
  %xf = mx.cast %x, sensitivity %c {{threshold = 0.1 : f64}}
    : tensor<3x40xf32>, tensor<40xf32> to tensor<3x40x{FGMP}>
  %y = mx.linear %xf, %wf : (tensor<3x40x{FGMP}>, tensor<8x40x{FGMP}>) -> tensor<3x8xf32>
  func.return %y : tensor<3x8xf32>
}}"""


def test_mixed_blocks_are_stored_as_their_sensitivity_decides():
    module, generator = parse_module(WEIGHED), torch.Generator().manual_seed(0)
    w, g, c, x = (torch.randn(*shape, generator=generator) for shape in ((8, 40), (8, 40), (40,), (3, 40)))
    store = WeightStore.from_state_dict({"w": w, "g": g.square(), "c": c.square()})
    before = Interpreter(module, store)(x)[0]
    Pack().apply(CompileContext(weights=store), module)
    module.verify()
    assert torch.equal(Interpreter(module, store)(x)[0], before)
    names = {op.source.data for op in module.walk() if op.name == "mx.parameter"}
    assert names == {"w", "c"}, "an activation's sensitivity is read wide, a weight's is needed no more"
    low, high = (mxloom.fake_quantize(w, format) for format in ("nvfp4", "fp8_e4m3_tensor"))
    impact = torch.nn.functional.pad(g.square() * (low - high).square(), (0, 8)).reshape(8, 3, 16).sum(-1)
    choice = store.encoded("w", parse_type(FGMP), (8, 40)).choice
    assert torch.equal(choice.bool(), impact > 0.1) and 0 < int(choice.sum()) < 24
