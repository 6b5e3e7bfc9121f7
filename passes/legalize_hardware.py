"""`legalize-hardware`: every value fixed point or of a narrow format, every operation one that hardware computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import frexp, ldexp
from typing import TYPE_CHECKING, cast

from xdsl.context import Context
from xdsl.dialects.builtin import ArrayAttr, FloatAttr, ModuleOp, StringAttr, TensorType
from xdsl.dialects.func import FuncOp, ReturnOp
from xdsl.ir import Attribute, Block, SSAValue
from xdsl.passes import ModulePass
from xdsl.rewriter import InsertPoint, Rewriter
from xdsl.utils.exceptions import VerifyException

from ..backends.reference import body
from ..dialects.accumulator import AccumulatorAttr
from ..dialects.errors import MxloomError, UsageError
from ..dialects.formats import FixedType, MixedType, Rounding, default_scale_rule, is_wide
from ..dialects.instances import format_of, name_of
from ..dialects.integer_attribute import FEWEST, MOST, IntegerMeaningAttr
from ..dialects.operations._operation import Operation
from ..dialects.operations._shapes import element_of, shape_of
from ..dialects.operations._values import hint_of, path_of
from ..dialects.operations.attention import AttentionOp, RopeOp
from ..dialects.operations.cast import CastOp
from ..dialects.operations.contraction import (
    Contraction,
    ConvOp,
    EmbeddingOp,
    LinearOp,
    MatmulOp,
    why_no_accumulator,
)
from ..dialects.operations.movement import ConcatOp, Movement
from ..dialects.operations.normalization import LayerNormOp, RMSNormOp, SoftmaxOp
from ..dialects.operations.parameter import ParameterOp
from ..dialects.operations.pointwise import (
    AddOp,
    Binary,
    ClampOp,
    Curve,
    DivOp,
    ExpOp,
    MulOp,
    NegOp,
    ReluOp,
    SubOp,
)
from ..dialects.operations.reduction import AveragePoolOp, MaxPoolOp, MeanOp, SumOp, WindowPoolOp
from ..dialects.operations.size import SizeOp
from ..dialects.windows import WIDEST as WIDEST_WINDOW
from ..dialects.windows import WindowAttr, needed_bits, scale_digits, why_no_window_operand
from ._context import calibration_of, weights_of
from ._convolutions import unfold_convolutions, why_no_patches
from ._curves import name_curves
from ._ranges import FINEST, UNSEEN, Ranges, fixed_for, observed
from ._shared_layers import share_ranges
from ._sites import module_name, root, rounding_properties, set_probabilities
from ._tensor_factors import fold_tensor_factors
from .extract import belongs

if TYPE_CHECKING:
    from ..backends.weight_store import WeightStore

_PLAIN = (AddOp, SubOp, MulOp, DivOp, NegOp, ReluOp, ClampOp, SumOp, MaxPoolOp, ConcatOp)
"""Computed in f64 on fixed point, which is exact, and rounded once."""

_INTEGER = (RMSNormOp, LayerNormOp, SoftmaxOp, ExpOp, Curve, MeanOp, WindowPoolOp, AveragePoolOp)
"""Computed by functions of `dialects.integer`."""

_WEIGHT_BITS, _BIAS_BITS, _ANGLES = 16, 24, FixedType(16, 14)  # pyright: ignore[reportArgumentType]
_NUMBER_DIGITS = 24
"""Binary digits that are kept of a number which is added to all values, or which they are multiplied by."""
_SENSITIVITY_BITS = 12
"""So many that f64 holds the impact of a block (`stages._impact`)."""

MOST_PARTIALS = 64
_ROOM = 8
"""Bits of a window below the last one of its result."""


@dataclass(frozen=True)
class LegalizeHardware(ModulePass):
    """Give every computed value a fixed-point format by its range, every operation its meaning in integers.

    Runs the model on `samples` inputs and types each value `!mx.fixed<width, F>`, F such that twice the largest
    magnitude fits. Products are summed in windows of `window` bits (`width` + 12 where it is left out) that reach 8
    bits below their result; with `accumulator` f32 linear layers add up in f32 instead, in `partials` sums where
    they state no accumulator of their own. Functions are read from tables of 2^`table` entries. `part` keeps it to
    modules whose names are or begin with these. What goes before (token look-up, rotary angles, masks) stays in float:
    the function's attribute `host` lists it, and `host_macs` says what share of the multiply-accumulates it has.
    `share` names lists of layers (model.layers) whose every place gets one format, the widest of all layers, so that
    one layer's hardware can serve them all (`mxloom emit --reuse`).
    Contractions need operands in formats: run `quantize` before. Raises MxloomError that lists everything that has no
    meaning in integers; the module is then unusable.
    """

    name = "legalize-hardware"

    width: int = 24
    table: int = 8
    window: int | None = None
    accumulator: str = "window"
    partials: int = 1
    samples: int = 8
    part: tuple[str, ...] = ()
    share: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        limits = {"width": (8, 24), "table": (FEWEST, MOST), "window": (8, WIDEST_WINDOW), "samples": (1, 4096),
                  "partials": (1, MOST_PARTIALS)}  # fmt: skip
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{self.name}: {name} is a whole number from {low} to {high}, got {value}")

        if self.accumulator not in ("window", "f32"):
            raise UsageError(f'{self.name}: accumulator is "window" or "f32", got "{self.accumulator}"')

    def apply(self, ctx: Context, op: ModuleOp) -> None:
        weights = weights_of(ctx, self.name)
        ranges = observed(op, weights, calibration_of(ctx, self.name, self.samples))
        if self.share:
            share_ranges(chip_operations(body(op), self.part), ranges, self.share, weights)
        _Legalization(self, op, weights, ranges).run()


@dataclass
class _Legalization:
    """One run over one module."""

    options: LegalizeHardware
    module: ModuleOp
    weights: WeightStore
    ranges: Ranges
    problems: list[str] = field(default_factory=list)

    def run(self) -> None:
        block = body(self.module)
        function = cast(FuncOp, block.parent_op())
        name_curves(block, self.ranges)
        unfold_convolutions(chip_operations(block, self.options.part), self.ranges, self.weights)
        fold_tensor_factors(chip_operations(block, self.options.part), self.ranges, self.weights)
        chip = chip_operations(block, self.options.part)
        if not chip:
            raise UsageError(f"{self.options.name}: no operation computes on values of {self.options.part or 'inputs'}")
        self.default = _usual_format(chip)
        host = _host(block, chip)
        self._type_inputs(block, chip)
        for op in chip:
            try:
                self._legalize(op)
                op.verify_()
            except (VerifyException, _UnfitError) as error:
                self.problems.append(f"{module_name(op)}: {error}")
        if self.problems:
            listed = "\n".join(f"  {problem}" for problem in self.problems)
            raise MxloomError(f"{len(self.problems)} operations have no meaning in hardware integers:\n{listed}")
        function.update_function_type()
        self._note(function, chip, host)

    def _note(self, function: FuncOp, chip: list[Operation], host: list[Operation]) -> None:
        macs = [sum(op.macs(self.ranges.shape) for op in ops if isinstance(op, Contraction)) for ops in (chip, host)]
        share = macs[1] / max(sum(macs), 1)
        function.attributes["host"] = ArrayAttr([StringAttr(module_name(op)) for op in host])
        function.attributes["host_macs"] = FloatAttr(share, 64)
        computed = [value for op in chip for value in op.results if not isinstance(op, CastOp | Movement)]
        coarse = [path_of(v) for v in computed if self.ranges.largest.get(v, FINEST) < FINEST]
        if coarse:
            function.attributes["coarse"] = ArrayAttr([StringAttr(name) for name in dict.fromkeys(coarse)])

    def _type_inputs(self, block: Block, chip: list[Operation]) -> None:
        """Float inputs that only hardware reads are fixed point themselves; a whole model may return them, too."""
        for argument in tuple(block.args):
            users = {use.operation for use in argument.uses}
            if not self.options.part:
                users = {user for user in users if not isinstance(user, ReturnOp)}
            if not _is_wide_float(argument) or not users or not users <= {*chip}:
                continue
            try:
                if self._largest(argument) == 0:
                    raise _UnfitError("is 0 in every calibration input, which gives no range: give real inputs")
                self._retype(argument, self._format(argument))
            except _UnfitError as error:
                self.problems.append(f"input {argument.name_hint}: {error}")

    def _legalize(self, op: Operation) -> None:
        match op:
            case CastOp():
                if op.sensitivity is not None:
                    format = fixed_for(self._largest(op.sensitivity), _SENSITIVITY_BITS, headroom=1.0)
                    self._cast_operand(op, op.sensitivity, format)
                self._fixed_operands(op)
                if is_wide(element_of(op.result)):
                    raise _UnfitError(
                        f"rounds into {element_of(op.result)}, and hardware holds no float between operations"
                    )
            case LinearOp() | MatmulOp():
                self._contraction(op)
            case AttentionOp():
                self._attention(op)
            case RopeOp():
                largest = max(self._largest(op.cos), self._largest(op.sin))
                angles = _ANGLES if largest < 2 else fixed_for(largest, _ANGLES.width.data, headroom=1.0)
                self._cast_operand(op, op.cos, angles)
                self._cast_operand(op, op.sin, angles)
                self._fixed_operands(op)
                self._fixed_result(op)
            case ConvOp():
                raise _UnfitError(why_no_patches(op) or op.name)
            case Movement() if not isinstance(op, ConcatOp):
                self._movement(op)
            case _ if isinstance(op, _INTEGER):
                self._integer(op)
            case _ if isinstance(op, _PLAIN):
                self._plain(op)
            case _:
                raise _UnfitError(f"{op.name} has no meaning in integers")

    def _movement(self, op: Operation) -> None:
        self._fixed_operands(op)
        kept = element_of(op.operands[0])
        for result in op.results:
            if element_of(result) != kept:
                self._retype(result, kept)

    def _plain(self, op: Operation) -> None:
        if isinstance(op, DivOp):
            divisor = op.scalar.value.data if op.scalar is not None else 0
            if not divisor or abs(frexp(divisor)[0]) != 0.5:
                raise _UnfitError("mx.div: hardware divides by powers of two alone; multiply by the reciprocal")
        if isinstance(op, Binary):
            masks = [value for value in op.operands if value in self.ranges.masks]
            if masks:
                raise _UnfitError("a mask of the lowest numbers is added to it: let mx.attention carry the mask")
            if isinstance(op.scalar, FloatAttr):
                op.properties["scalar"] = FloatAttr(_with_digits(op.scalar.value.data, _NUMBER_DIGITS), op.scalar.type)
        self._fixed_operands(op)
        self._fixed_result(op)

    def _integer(self, op: Operation) -> None:
        if isinstance(op, RMSNormOp) and op.unit_offset is not None:
            self._fold_offset(op)
        for name, bits in (("weight", _WEIGHT_BITS), ("bias", _BIAS_BITS)):
            value = getattr(op, name, None)
            if isinstance(value, SSAValue):
                self._cast_operand(op, value, fixed_for(self._largest(value), bits, headroom=1.0))
        self._fixed_operands(op)
        self._fixed_result(op)
        op.properties["integer"] = self._meaning()

    def _fold_offset(self, op: RMSNormOp) -> None:
        """1 + weight, as a parameter of its own in the place of the weight."""
        old = op.weight
        if old is None or not isinstance(old.owner, ParameterOp):
            raise _UnfitError("the weight beside 1 is computed, and no parameter")
        source = f"{old.owner.source.data}.plus_one"
        if source not in self.weights:
            self.weights.put(source, self.weights.wide(old.owner.source.data) + 1.0)
        new = ParameterOp.build(result_types=[old.type], properties={"source": StringAttr(source)})
        new.result.name_hint = hint_of(source)
        Rewriter.insert_op(new, InsertPoint.after(old.owner))
        self.ranges.largest[new.result] = float(self.weights.wide(source).abs().max())
        op.operands[list(op.operands).index(old)] = new.result
        del op.properties["unit_offset"]
        _drop_unused(old)

    def _contraction(self, op: LinearOp | MatmulOp) -> None:
        for name in op.reduced():
            value = getattr(op, name)
            if is_wide(element_of(value)):
                raise _UnfitError(f"{op.name}: its {name} is {element_of(value)}: quantize it before")
        bias = op.bias if isinstance(op, LinearOp) else None
        largest = [self._largest(op.result)]
        if bias is not None:
            self._cast_operand(op, bias, fixed_for(self._largest(bias), _BIAS_BITS, headroom=1.0))
            largest.append(self._largest(bias))
        self._fixed_result(op)
        if isinstance(op, LinearOp):
            if self.options.accumulator == "f32":
                self._accumulator(op)
                return
            op.properties.pop("acc", None)
        op.properties["window"] = self._window(_fixed(op.result), max(largest))

    def _accumulator(self, op: LinearOp) -> None:
        """The accumulator that it states, or one as the options say. Raises `_UnfitError` where hardware has none."""
        if (reason := why_no_accumulator(op)) is not None:
            raise _UnfitError(f"no accumulator: {reason}")
        for format in (element_of(op.input), element_of(op.weight)):
            if scale_digits(format):
                raise _UnfitError(f"no accumulator in f32: the scales of {format} are no powers of two")
        op.acc = op.acc or AccumulatorAttr.of("f32", "rne", self.options.partials)
        if op.acc.format != "f32":
            raise _UnfitError(f"it adds up in {op.acc.label}, and hardware in f32 or in windows")

    def _window(self, result: FixedType, largest: float) -> WindowAttr:
        """The window of a sum whose result is of a format. Raises `_UnfitError` where what was seen leaves it."""
        bits = self.options.window or min(self.options.width + 12, WIDEST_WINDOW)
        window = WindowAttr(bits, -(result.fraction.data + _ROOM))  # pyright: ignore[reportArgumentType]
        needed = needed_bits(largest, window)
        if needed > bits:
            steps = window.label.split()[-1]
            raise _UnfitError(f"a window of {bits} bits does not hold {largest:.4g} at steps of {steps}: "
                         f"it needs {needed} bits, window={needed}")  # fmt: skip
        return window

    def _attention(self, op: AttentionOp) -> None:
        for name in ("softcap", "bias", "sinks", "wide_key", "wide_value"):
            if getattr(op, name) is not None:
                raise _UnfitError(f"mx.attention has no {name} in integers")
        for name in ("query", "key"):
            value = getattr(op, name)
            if is_wide(element_of(value)) or not _is_taken(element_of(value)):
                self._set(op, value, self._cast_of(root(value), format_of(self.default, rank=4, dims=(-1,))))
        if op.probabilities is None:
            format = format_of(name_of(element_of(op.query)), rank=4, dims=(-1,))
            set_probabilities(op, format, Rounding(scale_rule=default_scale_rule(format)))
        self._fixed_value(op)
        for value in (op.query, op.key, op.value):
            if isinstance(value.owner, CastOp):
                self._fixed_operands(value.owner)
        self._fixed_result(op)
        scores = fixed_for(self.ranges.scores[op], self.options.width)
        op.properties |= {
            "integer": self._meaning(),
            "scores": scores,
            "score_window": self._window(scores, self.ranges.scores[op]),
            "value_window": self._window(_fixed(op.result), self._largest(op.result)),
        }

    def _fixed_value(self, op: AttentionOp) -> None:
        """The value in 8 bits of one scale: blocks along its width would change scale at every position."""
        below = root(op.value)
        if isinstance(element_of(op.value), FixedType) and op.value is not below:
            return
        self._set(op, op.value, self._cast_of(below, fixed_for(self._largest(below), 8, headroom=1.0)))

    def _meaning(self) -> IntegerMeaningAttr:
        return IntegerMeaningAttr(self.options.table)  # pyright: ignore[reportArgumentType]

    def _largest(self, value: SSAValue) -> float:
        """The largest magnitude that was seen; that of a cast is what it was given."""
        value = value if value in self.ranges.largest else root(value)
        if value in self.ranges.masks:
            raise _UnfitError(f"{path_of(value)} reaches {UNSEEN:g} or more, and no fixed point holds that")
        return self.ranges.largest.get(value, 0.0)

    def _format(self, value: SSAValue) -> FixedType:
        return fixed_for(self._largest(value), self.options.width)

    def _fixed_result(self, op: Operation) -> None:
        for result in op.results:
            self._retype(result, self._format(result))

    def _retype(self, value: SSAValue, format: Attribute) -> None:
        """The value in a format, in place; what is known of it stays known."""
        if _is_wide_float(value) or isinstance(element_of(value), FixedType):
            new = Rewriter.replace_value_with_new_type(value, TensorType(format, shape_of(value)))
            self.ranges.moved(value, new)

    def _fixed_operands(self, op: Operation) -> None:
        """What comes from the host, and parameters, become fixed point on the way in."""
        for value in tuple(op.operands):
            if _is_wide_float(value):
                self._cast_operand(op, value, self._format(value))

    def _cast_operand(self, op: Operation, value: SSAValue, format: Attribute) -> None:
        if _is_wide_float(value):
            self._set(op, value, self._cast_of(value, format))

    def _set(self, op: Operation, old: SSAValue, new: SSAValue) -> None:
        for index, operand in enumerate(op.operands):
            if operand is old:
                op.operands[index] = new
        _drop_unused(old)

    def _cast_of(self, value: SSAValue, format: Attribute) -> SSAValue:
        """The value in another format: by the cast that stands there already, or by a new one right behind it."""
        how = Rounding(scale_rule=default_scale_rule(format))
        for use in value.uses:
            reader = use.operation
            if (
                isinstance(reader, CastOp)
                and element_of(reader.result) == format
                and reader.how() == how
                and reader.sensitivity is None
            ):
                return reader.result
        type = TensorType(format, shape_of(value))
        new = CastOp.build(operands=[value, None], result_types=[type], properties=rounding_properties(how))
        new.result.name_hint = hint_of(f"{path_of(value)}.{_suffix(format)}") if value.name_hint else None
        where = InsertPoint.at_start(value.owner) if isinstance(value.owner, Block) else InsertPoint.after(value.owner)
        Rewriter.insert_op(new, where)
        self.ranges.largest[new.result] = self._largest(value)
        return new.result


class _UnfitError(Exception):
    """Why an operation cannot be legalized."""


def chip_operations(block: Block, part: tuple[str, ...] = ()) -> list[Operation]:
    """The operations that compute on data: on float inputs, on looked-up rows, or on what follows from these.

    Token look-up itself, rotary angles and masks follow from tokens and positions alone, and are the host's. With
    `part` those of other modules are, too, but for casts that the part reads: their name is that of the value that
    comes in.
    """
    data: set[SSAValue] = {argument for argument in block.args if _is_wide_float(argument)}
    found: list[Operation] = []
    for op in block.ops:
        if isinstance(op, ReturnOp) or not isinstance(op, Operation):
            continue
        if isinstance(op, EmbeddingOp):
            data.update(op.results)
        elif any(operand in data for operand in op.operands) and not isinstance(op, SizeOp):
            data.update(op.results)
            found.append(op)
    if not part:
        return found
    kept = {op for op in found if belongs(module_name(op), part)}
    for op in reversed(found):
        if isinstance(op, CastOp) and any(use.operation in kept for use in op.result.uses):
            kept.add(op)
    return [op for op in found if op in kept]


def _host(block: Block, chip: list[Operation]) -> list[Operation]:
    """What is left to the host: neither on the chip nor stored there (parameters and casts of them)."""
    on_chip, stored, found = set(chip), set[Operation](), list[Operation]()
    for op in block.ops:
        if not isinstance(op, Operation) or op in on_chip:
            continue
        if isinstance(op, ParameterOp) or (op.operands and all(operand.owner in stored for operand in op.operands)):
            stored.add(op)
        elif op.results and isinstance(op.results[0].type, TensorType):
            found.append(op)
    return found


def _usual_format(chip: list[Operation]) -> str:
    """The format in which most linear layers read their input, where attention takes it; else mxint8."""
    counted = Counter(name_of(element_of(op.input)) for op in chip if isinstance(op, LinearOp) and _taken_input(op))
    return counted.most_common(1)[0][0] if counted else "mxint8"


def _taken_input(op: LinearOp) -> bool:
    return isinstance(op.input.owner, CastOp) and _is_taken(element_of(op.input))


def _is_taken(fmt: Attribute) -> bool:
    """Whether attention in integers takes operands of a format; of mixed ones nothing says above which threshold."""
    return why_no_window_operand(fmt) is None and not scale_digits(fmt) and not isinstance(fmt, MixedType)


def _is_wide_float(value: SSAValue) -> bool:
    if not isinstance(value.type, TensorType):
        return False
    return str(value.type.element_type) in ("f32", "bf16", "f16", "f64")


def _with_digits(number: float, digits: int) -> float:
    """A number rounded to so many binary digits."""
    mantissa, exponent = frexp(number)
    return ldexp(round(ldexp(mantissa, digits)), exponent - digits)


def _fixed(value: SSAValue) -> FixedType:
    found = element_of(value)
    assert isinstance(found, FixedType)
    return found


def _suffix(format: Attribute) -> str:
    return f"fixed{format.width.data}" if isinstance(format, FixedType) else name_of(format)


def _drop_unused(value: SSAValue) -> None:
    while isinstance(value.owner, CastOp | ParameterOp) and not value.uses:
        unused = value.owner
        value = unused.input if isinstance(unused, CastOp) else value
        Rewriter.erase_op(unused)
        if isinstance(unused, ParameterOp):
            return
