"""Attention as one operation, and the rotary embedding that goes before it."""

from __future__ import annotations

from typing import Any, ClassVar

from xdsl.dialects.builtin import FloatAttr, IntegerAttr, StringAttr, TensorType, UnitAttr, f64
from xdsl.ir import Attribute, SSAValue, TypeAttribute
from xdsl.irdl import (
    AttrSizedOperandSegments,
    irdl_op_definition,
    operand_def,
    opt_operand_def,
    opt_prop_def,
    prop_def,
    result_def,
)
from xdsl.utils.exceptions import VerifyException

from .. import formats
from ..errors import UsageError
from ..formats import BlockType, FixedType
from ..integer import WIDEST
from ..integer_attribute import IntegerMeaningAttr
from ..windows import WindowAttr, common_segment, scale_digits, why_no_window_operand
from ._integer_meaning import require_exponential, require_fixed
from ._operation import Call
from ._shapes import UNKNOWN, Shape, ShapeOf, element_of, fits, same, shape_of, text
from ._torch_operation import Aten, TorchOperation
from .cast import CastOp, check_rule
from .contraction import Contraction, Reduced

Pair = tuple[tuple[Attribute, int], tuple[Attribute, int]]


@irdl_op_definition
class AttentionOp(Contraction):
    """softmax(query · keyᵀ · scale + masks) · value, with grouped heads.

    query [B, H, Q, D], key [B, G, K, D], value [B, G, K, Dv], padding [B, K] bool, bias broadcast to [B, H, Q, K],
    sinks [H] -> [B, H, Q, Dv]. `causal` and `window` say who sees whom, `softcap` bounds the scores. Where
    `probabilities` is a format, the softmax is rounded into it (by `scale_rule` and `rounding`) before it meets value.
    Where `wide_key` is given, a query reads from it, and not from `key`, which is the same value rounded, the newest
    `key_wide` positions that it sees, and those of a step of `key_step` positions that are not yet complete behind
    them; so it is with `wide_value` (`torch_operators.narrowed` states the rule; a step that padding is in stays
    wide). Each pair counts once in `macs`.
    With `integer`, `scores` (a fixed-point format), `score_window` and `value_window` it is
    `integer_attention.attention`: all four or none.
    """

    name = "mx.attention"
    ATEN: ClassVar = (Aten("mxloom.attention.default"),)

    irdl_options = (AttrSizedOperandSegments(as_property=True),)

    query = operand_def(TensorType)
    key = operand_def(TensorType)
    value = operand_def(TensorType)
    padding = opt_operand_def(TensorType)
    bias = opt_operand_def(TensorType)
    sinks = opt_operand_def(TensorType)
    wide_key = opt_operand_def(TensorType)
    wide_value = opt_operand_def(TensorType)
    scale = prop_def(FloatAttr)
    causal = opt_prop_def(UnitAttr)
    window = opt_prop_def(IntegerAttr)
    softcap = opt_prop_def(FloatAttr)
    probabilities = opt_prop_def(TypeAttribute)
    scale_rule = opt_prop_def(StringAttr)
    rounding = opt_prop_def(StringAttr)
    key_wide = opt_prop_def(IntegerAttr)
    key_step = opt_prop_def(IntegerAttr)
    value_wide = opt_prop_def(IntegerAttr)
    value_step = opt_prop_def(IntegerAttr)
    integer = opt_prop_def(IntegerMeaningAttr)
    scores = opt_prop_def(FixedType)
    score_window = opt_prop_def(WindowAttr)
    value_window = opt_prop_def(WindowAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        query, key, value = shape_of(self.query), shape_of(self.key), shape_of(self.value)
        for role, shape in (("query", query), ("key", key), ("value", value)):
            self.require(len(shape) == 4, f"{role} must be [batch, heads, positions, width], got {text(shape)}")
        self.require(
            same(query[3], key[3]), f"query {text(query)} and key {text(key)} must have one width, the last dimension"
        )
        self.require(
            fits(key[:3], value[:3]),
            f"key {text(key)} and value {text(value)} must agree in batch, heads and positions",
        )
        self.require(
            key[1] > 0 and query[1] % key[1] == 0,
            f"{query[1]} query heads do not share {key[1]} key heads evenly",
        )
        if self.padding is not None:
            expected, got = (query[0], key[2]), shape_of(self.padding)
            self.require(
                fits(expected, got), f"padding must be [batch, key positions] {text(expected)}, got {text(got)}"
            )
        if self.sinks is not None:
            got = shape_of(self.sinks)
            self.require(
                fits(query[1:2], got), f"sinks must hold one number a head {text(query[1:2])}, got {text(got)}"
            )
        for name in ("key", "value"):
            self._check_newest(name)
        self._check_probabilities()
        self._check_integer()

    def _check_newest(self, name: str) -> None:
        """The newest positions of key or value: the same value, in an order of time that the operation states."""
        wide, stated = getattr(self, f"wide_{name}"), [f"{name}_{what}" for what in ("wide", "step")]
        numbers = [number.value.data for what in stated if (number := getattr(self, what)) is not None]
        if wide is None:
            self.require(not numbers, f"{' and '.join(stated)} belong to a wide_{name}, which is missing")
            return
        self.require(len(numbers) == 2, f"with a wide_{name} it states {' and '.join(stated)}")
        kept, step = numbers
        self.require(kept >= 0, f"{stated[0]} is a number of positions, 0 or more, got {kept}")
        self.require(step >= 1, f"{stated[1]} is a number of positions, 1 or more, got {step}")
        self.require(self.causal is not None, f"a wide_{name} holds the newest positions: it must be causal")
        rounded = getattr(self, name)
        self.require(
            _under_casts(wide) is _under_casts(rounded),
            f"the wide_{name} and the {name} must be one value, under casts alone",
        )

    def fields(self) -> dict[str, Any]:
        """The format of the probabilities goes to torch by its text."""
        found = super().fields()
        return found if self.probabilities is None else {**found, "probabilities": str(self.probabilities)}

    def _check_probabilities(self) -> None:
        rule = self.scale_rule.data if self.scale_rule is not None else None
        try:
            formats.Rounding(scale_rule=rule, rounding=self.rounding.data if self.rounding is not None else "rne")
        except UsageError as error:
            raise VerifyException(f"{self.name}: {error}") from None
        if self.probabilities is not None:
            check_rule(self, self.probabilities, rule)
            rows = (*shape_of(self.query)[:3], shape_of(self.key)[2])
            formats.verify_tensor(TensorType(self.probabilities, rows))

    def _check_integer(self) -> None:
        stated = {name: self.properties.get(name) for name in ("integer", "scores", "score_window", "value_window")}
        missing = [name for name, value in stated.items() if value is None]
        if len(missing) == len(stated):
            return
        self.require(not missing, f"computed in integers, it states {', '.join(stated)}; {missing[:1]} is missing")
        self.require(self.probabilities is not None, "computed in integers, it states the format of its probabilities")
        for name in ("softcap", "bias", "sinks", "wide_key", "wide_value"):
            self.require(getattr(self, name) is None, f"computed in integers, it takes no {name}")
        require_fixed(self, {"result": self.result})
        assert self.scores is not None and self.probabilities is not None
        width, fraction = self.scores.width.data, self.scores.fraction.data
        self.require(width <= WIDEST, f"computed in integers, its scores have at most {WIDEST} bits, got {width}")
        require_exponential(self, (width, fraction), self.scale.value.data)
        operands = {name: element_of(getattr(self, name)) for name in ("query", "key", "value")}
        for name, fmt in {**operands, "probabilities": self.probabilities}.items():
            reason = why_no_window_operand(fmt) or (
                f"scales of {fmt} are no powers of two" if scale_digits(fmt) else None
            )
            self.require(reason is None, f"computed in integers, no window: the {name}: {reason}")
        self.require(
            not isinstance(operands["value"], BlockType) or common_segment(*self._pairs()[1], UNKNOWN) > 1,
            "computed in integers, the value has no blocks along its width, each position with a scale of its own: "
            "let them run along its positions, or use a fixed-point format",
        )

    def _pairs(self) -> tuple[Pair, Pair]:
        """The formats of both products, each with the dimension that is summed over."""
        assert self.probabilities is not None
        query, key, value = (element_of(operand) for operand in (self.query, self.key, self.value))
        return ((query, -1), (key, -1)), ((self.probabilities, -1), (value, -2))

    def call(self) -> Call:
        if self.integer is None:
            return super().call()
        from ..integer_attention import attention

        assert self.scores is not None and self.score_window is not None and self.value_window is not None
        windows = zip(
            (self.score_window, self.value_window),
            self._pairs(),
            (shape_of(self.query)[3], shape_of(self.key)[2]),
            strict=True,
        )
        products = tuple((w.width.data, w.lsb.data, common_segment(*pair, size)) for w, pair, size in windows)
        return Call(
            attention,
            (
                self.query,
                self.key,
                self.value,
                self.padding,
                self.scale.value.data,
                self.causal is not None,
                None if self.window is None else self.window.value.data,
                self.integer.table_bits.data,
                (self.scores.width.data, self.scores.fraction.data),
                str(self.probabilities),
                None if self.scale_rule is None else self.scale_rule.data,
                "rne" if self.rounding is None else self.rounding.data,
                products,
            ),
            {},
            f64,
        )

    def shape_call(self) -> Call:
        return super().call()

    def result_shape(self) -> Shape:
        return (*shape_of(self.query)[:3], shape_of(self.value)[3])

    def macs(self, shapes: ShapeOf = shape_of) -> int:
        """Both products over all pairs of positions; what a mask excludes is counted too."""
        batch, heads, rows, width = shapes(self.query)
        *_, columns, value_width = shapes(self.value)
        return batch * heads * rows * columns * (width + value_width)

    def reduced(self) -> Reduced:
        """Where blocks run. Those of the value run along its width, for a cache grows by whole positions."""
        return {"query": (-1,), "key": (-1,), "value": (-1,), "probabilities": (-1,)}


def _under_casts(value: SSAValue) -> SSAValue:
    while isinstance(value.owner, CastOp):
        value = value.owner.input
    return value


@irdl_op_definition
class RopeOp(TorchOperation):
    """Rotary position embedding: input · cos + rotate_half(input) · sin.

    input [..., D], cos and sin broadcast to it; with `halves` they have D / 2 columns (gpt_oss).
    """

    name = "mx.rope"
    ATEN: ClassVar = (Aten("mxloom.rope.default"),)

    input = operand_def(TensorType)
    cos = operand_def(TensorType)
    sin = operand_def(TensorType)
    halves = opt_prop_def(UnitAttr)
    result = result_def(TensorType)

    def check(self) -> None:
        cos, sin = shape_of(self.cos), shape_of(self.sin)
        self.require(fits(cos, sin), f"cos {text(cos)} and sin {text(sin)} must have one shape")
        width = shape_of(self.input)[-1]
        expected = width // 2 if self.halves is not None else width
        self.require(
            bool(cos) and same(cos[-1], expected),
            f"an input of width {width} needs cos and sin of width {expected}, got {text(cos)}",
        )

    def result_shape(self) -> Shape:
        return shape_of(self.input)
