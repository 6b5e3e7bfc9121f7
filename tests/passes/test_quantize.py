"""`quantize`: first match wins, one cast for each value and format, nothing without effect."""

# Operations are looked up by name, so their fields are not known to the type checker.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportIndexIssue=false

import pytest

from mxloom.dialects.errors import UsageError
from mxloom.dialects.mx import context, parse_module
from mxloom.passes._sites import sites
from mxloom.passes.quantize import Quantize, RuleError

MODEL = """
func.func @forward(%x: tensor<?x?x64xf32>, %ids: tensor<?x?xi64>) -> tensor<?x?x32xf32> {
  %embed.weight = mx.parameter "embed.weight" : tensor<100x64xf32>
  %embed = mx.embedding %embed.weight, %ids : (tensor<100x64xf32>, tensor<?x?xi64>) -> tensor<?x?x64xf32>
  %q.weight = mx.parameter "layers.0.q.weight" : tensor<64x64xf32>
  %k.weight = mx.parameter "layers.0.k.weight" : tensor<64x64xf32>
  %layers.0.q = mx.linear %x, %q.weight : (tensor<?x?x64xf32>, tensor<64x64xf32>) -> tensor<?x?x64xf32>
  %layers.0.k = mx.linear %x, %k.weight : (tensor<?x?x64xf32>, tensor<64x64xf32>) -> tensor<?x?x64xf32>
  %sum = mx.add %layers.0.q, %layers.0.k : (tensor<?x?x64xf32>, tensor<?x?x64xf32>) -> tensor<?x?x64xf32>
  %head.weight = mx.parameter "head.weight" : tensor<32x64xf32>
  %language_model.lm_head = mx.linear %sum, %head.weight : (tensor<?x?x64xf32>, tensor<32x64xf32>) -> tensor<?x?x32xf32>
  func.return %language_model.lm_head : tensor<?x?x32xf32>
}
"""

ATTENTION = """
!query = tensor<1x4x?x32xf32>
!key = tensor<1x2x?x32xf32>
func.func @forward(%q: !query, %k: !key, %v: !key) -> !query {
  %attn = mx.attention %q, %k, %v, scale = 0.25, causal : (!query, !key, !key) -> !query
  func.return %attn : !query
}
"""

MIXED = "mixed<!mx.block<32xf4E2M1FN>, !mx.block<32xf8E4M3FN>>"


def run(module, *rules: Quantize):
    for rule in rules:
        rule.apply(context(), module)
    module.verify()
    return module


def formats(module) -> dict[str, str]:
    return {site.name: str(site.format) for site in sites(module) if not site.is_wide}


def casts(module) -> list[str]:
    return [str(op) for op in module.walk() if op.name == "mx.cast"]


def test_weights_and_activations_of_every_contraction_but_no_look_up():
    module = run(parse_module(MODEL), Quantize(weights="mxfp4", activations="mxint8"))
    mxfp4, mxint8 = "!mx.block<32xf4E2M1FN>", "!mx.block<32x!mx.fixed<8, 6>>"
    assert formats(module) == {
        "layers.0.q.input": mxint8,
        "layers.0.q.weight": mxfp4,
        "layers.0.k.input": mxint8,
        "layers.0.k.weight": mxfp4,
        "language_model.lm_head.input": mxint8,
        "language_model.lm_head.weight": mxfp4,
    }


def test_readers_of_one_value_share_one_cast():
    module = run(parse_module(MODEL), Quantize(weights="mxfp4", activations="mxint8"))
    assert len(casts(module)) == 3 + 2, "three weights; one cast for q and k, one for the head"


def test_the_cast_states_scale_rule_and_rounding():
    module = run(parse_module(MODEL), Quantize(weights="mxfp4", activations="mxint8", rounding="rna"))
    rules = {(op.scale_rule.data, op.rounding.data) for op in module.walk() if op.name == "mx.cast"}
    assert rules == {("even", "rna"), ("floor", "rna")}


def test_first_match_wins_and_keep_leaves_wide():
    head = Quantize(match="*.lm_head", keep="f32")
    module = run(parse_module(MODEL), head, Quantize(match="re:q$", weights="mxint8"), Quantize(weights="mxfp4"))
    assert formats(module) == {
        "layers.0.q.weight": "!mx.block<32x!mx.fixed<8, 6>>",
        "layers.0.k.weight": "!mx.block<32xf4E2M1FN>",
    }
    assert [site.rule for site in sites(module) if site.role == "weight"] == [None, 2, 3, 1]


def test_keep_bf16_rounds_the_operands_to_bf16():
    module = run(parse_module(MODEL), Quantize(match="*.lm_head", keep="bf16"))
    assert casts(module) and all("to tensor<" in c and "xbf16>" in c for c in casts(module))


def test_an_embedding_is_reached_by_its_kind():
    module = run(parse_module(MODEL), Quantize(kind=("embedding",), weights="int8_channel"))
    assert formats(module) == {"embed.weight": "!mx.block<?xi8, f32>"}


def test_mixed_formats_have_a_threshold_for_weights_and_one_for_activations():
    rule = Quantize(match="re:q$", weights=MIXED, activations=MIXED, weight_threshold=0.25, activation_threshold=0.5)
    found = {
        cast.input.name_hint: cast.how().threshold
        for cast in run(parse_module(MODEL), rule).walk()
        if cast.name == "mx.cast"
    }
    assert found == {"q.weight": 0.25, "x": 0.5}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Quantize(match="lm_head", keep="bf16"),
            "rule 1: 'lm_head' matches 0 of 3 modules (did you mean \"language_model.lm_head\"?)",
        ),
        (
            Quantize(match="embed", weights="mxfp4"),
            "rule 1: 'embed' matches 0 of 3 modules; embed is of kind embedding: name it with kind=embedding",
        ),
        (
            Quantize(attention="mxint8"),
            "rule 1: attention='mxint8' has no effect: none of the modules that '*' matches has such an operand",
        ),
        (
            Quantize(kind=("conv",), weights="mxfp4"),
            "rule 1: the model has no module of kind conv; its kinds are embedding (1), linear (3)",
        ),
        (
            Quantize(kind=("attention", "matmul"), match="head", attention="mxint8"),
            "rule 1: the model has no module of kind attention or matmul; its kinds are embedding (1), linear (3)",
        ),
        (Quantize(), "rule 1: the rule names no format; give weights=, activations=, attention=, cache= or keep="),
        (
            Quantize(keep="bf16", weights="mxfp4"),
            "rule 1: keep= and formats contradict each other; give one or the other",
        ),
        (Quantize(keep="mxfp4"), "rule 1: keep='mxfp4': a rule keeps f32, bf16 or f16"),
        (
            Quantize(weights="mxfp4", activation_threshold=0.1),
            "rule 1: activation_threshold has no effect: activations= is no mixed format",
        ),
        (Quantize(kind=("liner",), weights="mxfp4"), "rule 1: unknown kind 'liner' (did you mean \"linear\"?)"),
    ],
)
def test_a_rule_without_effect_is_an_error(rule: Quantize, message: str):
    with pytest.raises(RuleError) as caught:
        run(parse_module(MODEL), rule)
    assert str(caught.value) == message
    assert caught.value.exit_status == 2


OPAQUE = """
!heads = tensor<1x4x?x32xf32>
func.func @forward(%q: !heads, %x: tensor<?x32xf32>) -> (!heads, tensor<?x32xf32>) {
  %attn.sdpa = mx.aten "aten.scaled_dot_product_attention.default"(%q, %q, %q) {query, key, value}
    : (!heads, !heads, !heads) -> !heads
  %w = mx.parameter "w" : tensor<32x32xf32>
  %out = mx.linear %x, %w : (tensor<?x32xf32>, tensor<32x32xf32>) -> tensor<?x32xf32>
  func.return %attn.sdpa, %out : !heads, tensor<?x32xf32>
}
"""
KEPT = (
    "; attn.sdpa (aten.scaled_dot_product_attention.default): kept as torch has it, an operator that carries no format"
)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Quantize(kind=("attention",), attention="mxint8"),
            "rule 1: the model has no module of kind attention; its kinds are linear (1)" + KEPT,
        ),
        (
            Quantize(attention="mxint8"),
            "rule 1: attention='mxint8' has no effect: none of the modules that '*' matches has such an operand" + KEPT,
        ),
        (
            Quantize(kind=("conv",), weights="mxint8"),
            "rule 1: the model has no module of kind conv; its kinds are linear (1)",
        ),
    ],
)
def test_attention_that_stays_torchs_is_named_where_a_rule_asks_for_it(rule: Quantize, message: str):
    with pytest.raises(RuleError) as caught:
        run(parse_module(OPAQUE), rule)
    assert str(caught.value) == message


def test_a_rule_behind_one_that_took_everything_is_an_error():
    with pytest.raises(RuleError, match="rule 2: every module that 're:head' matches was decided by an earlier rule"):
        run(parse_module(MODEL), Quantize(weights="mxfp4"), Quantize(match="re:head", weights="mxint8"))


def test_a_regular_expression_that_matches_says_nothing():
    assert formats(run(parse_module(MODEL), Quantize(match="re:.*head", weights="mxfp4")))


def test_attention_operands_run_along_the_head_and_probabilities_along_the_keys():
    module = run(parse_module(ATTENTION), Quantize(attention="mxint8"))
    block = "!mx.block<32x!mx.fixed<8, 6>>"
    assert formats(module) == {f"attn.{name}": block for name in ("query", "key", "value", "probabilities")}


def test_the_cache_is_rounded_before_attention_reads_it():
    module = run(parse_module(ATTENTION), Quantize(attention="mxint8", cache="mxfp8_e4m3"))
    attention = next(op for op in module.walk() if op.name == "mx.attention")
    outer = attention.key.owner
    assert outer.name == "mx.cast" and "cache" not in outer.attributes
    inner = outer.input.owner
    assert inner.name == "mx.cast" and "cache" in inner.attributes
    assert str(inner.result.type.element_type) == "!mx.block<32xf8E4M3FN>"
    assert attention.query.owner.input is module.body.block.first_op.body.block.args[0]


def test_the_cache_alone_leaves_the_query_wide():
    module = run(parse_module(ATTENTION), Quantize(cache="mxfp8_e4m3"))
    assert len(casts(module)) == 2


def test_what_the_pass_writes_is_read_again():
    module = run(parse_module(MODEL), Quantize(weights="nvfp4", activations="nvfp4"))
    assert str(parse_module(str(module))) == str(module)


def test_retyping_again_leaves_no_cast_behind():
    module = run(parse_module(MODEL), Quantize(weights="mxfp4", activations="mxint8"))
    for site in sites(module, kind="linear"):
        site.retype("mxint4")
    assert len(casts(module)) == 5
    assert set(formats(module).values()) == {"!mx.block<32x!mx.fixed<4, 2>>"}


STORED = """
func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x64xf32> {
  %a.weight = mx.parameter "a.weight" : tensor<64x64x!mx.block<32xf4E2M1FN>>
  %a = mx.linear %x, %a.weight : (tensor<?x64xf32>, tensor<64x64x!mx.block<32xf4E2M1FN>>) -> tensor<?x64xf32>
  func.return %a : tensor<?x64xf32>
}
"""

YIELDED = """
func.func @forward(%x: tensor<?x64xf32>) -> tensor<?x64xf32> {
  %w = mx.parameter "w" : tensor<64x64xf32>
  %a = mx.linear %x, %w : (tensor<?x64xf32>, tensor<64x64xf32>) -> tensor<?x64x!mx.fixed<8, 4>>
  %b = mx.linear %a, %w : (tensor<?x64x!mx.fixed<8, 4>>, tensor<64x64xf32>) -> tensor<?x64xf32>
  func.return %b : tensor<?x64xf32>
}
"""


@pytest.mark.parametrize("format", ["mxint6", "mxfp4", "bf16", "f32", "mxint2"])
def test_what_is_stored_or_yielded_in_a_format_is_not_rounded_again(format):
    """Rounding twice can only lose: no cast is put behind a value whose wide form is gone, by whatever pass."""
    for text, name, had in ((STORED, "a.weight", "mxfp4"), (YIELDED, "b.input", "fixed<8,4>")):
        module = parse_module(text)
        site = next(site for site in sites(module) if site.name == name)
        with pytest.raises(UsageError, match=f"^{name} is {had} already, and no wide values stand behind it"):
            site.retype(format)
        with pytest.raises(RuleError, match=f"{name} is {had} already"):
            run(module, Quantize(weights=format, activations=format))
        assert str(module) == str(parse_module(text))


def test_a_stored_weight_does_not_keep_its_operation_from_other_formats():
    module = run(parse_module(STORED), Quantize(activations="mxint8"))
    assert formats(module)["a.input"] == "!mx.block<32x!mx.fixed<8, 6>>"


def test_a_cast_is_replaced_and_not_stacked():
    module = run(parse_module(MODEL), Quantize(weights="mxfp4"))
    for site in sites(module):
        if site.role == "weight" and not site.is_wide:
            site.retype("mxint6")
    assert all("mxfp4" not in cast for cast in casts(module))
    assert len(casts(module)) == 3
