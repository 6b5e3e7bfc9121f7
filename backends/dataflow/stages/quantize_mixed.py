"""The post-processing unit of mixed blocks: both kinds of every block are made, and the kind is decided at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ....dialects.errors import MxloomError
from ....dialects.integer import Point
from ..arithmetic import product, product_unsigned
from ..codes import ElementCode
from ..multiplier import decoded
from ..rtl import Module, Signal, join
from ._blocks import Blocks, BlockStage, gathered
from ._impact import Impact
from ._rounding import rounded, scale_byte
from ._stream import Memory, Pipe, StreamModule


@dataclass(frozen=True)
class QuantizeMixed(BlockStage):
    """Blocks of the low kind, or of the high one where the sum over the block of s (low - high)^2 exceeds `threshold`.

    FGMP (arXiv 2504.14152), section 4: a beat is a whole block, beside it its scale and, on top, a 1 for the low kind.
    Each kind has the scale rule that is its own: even for minifloats, floor for fixed point. s is 1, or, with
    `sensitivity` as its format, a number of each place in a row, none of them negative, that is loaded.
    """

    threshold: float = 0.0
    rounding: str = "rne"
    sensitivity: Point | None = None

    def __post_init__(self) -> None:
        if self.lanes != self.block:
            raise MxloomError(
                f"blocks of {self.block} numbers in beats of {self.lanes}: the kind of a block is known at its end; "
                "let both operands have blocks of one length that rows are not shorter than"
            )
        if (reason := self.impact.why_not()) is not None:
            raise MxloomError(f"{self.code.name}: {reason}")

    @property
    def kinds(self) -> tuple[ElementCode, ElementCode]:
        """(low, high)."""
        low, high = self.code.elements
        return low, high

    @cached_property
    def impact(self) -> Impact:
        return Impact(*self.kinds, self.given, self.block, self.threshold, self.rounding, self.sensitivity)

    @property
    def memories(self) -> tuple[Memory, ...]:
        """A sensitivity for each place in a row, and for what fills its last block."""
        return (Memory(self.blocks * self.block, self.sensitivity.width),) if self.sensitivity else ()

    @property
    def delay(self) -> int:
        return 6 + (self.sensitivity is not None)

    def module(self, name: str) -> Module:
        return _Builder(self, self.start(name)).build()


class _Builder:
    """The steps of the pipeline, in order: read, round, subtract, square, (weigh,) sum, choose."""

    def __init__(self, stage: QuantizeMixed, module: StreamModule) -> None:
        self.stage, self.module, self.impact = stage, module, stage.impact
        self.pipe = Pipe(module, "out")

    def build(self) -> Module:
        stage, module, pipe = self.stage, self.module, self.pipe
        rows = Blocks(module, stage)
        go = rows.available & pipe.enable
        index, ends = rows.elements(go)
        valid = [pipe.flag(rows.available)]
        word = rows.read(index, pipe.enable)
        weight = self._weight(go)
        number = pipe.step(rows.holds(index)).repeated(word.width) & word
        raised = [pipe.step(rows.raised(_rule(element), element)) for element in stage.kinds]
        place, empty, last = (pipe.step(each) for each in (rows.highest(), rows.empty, ends))
        rows.release(go & ends, pipe.enable, valid[0])
        codes = [
            pipe.step(rounded(number, place + up.unsigned(place.width), stage.given, element, stage.rounding))
            for element, up in zip(stage.kinds, raised, strict=True)
        ]
        difference = pipe.step(self._difference(codes, [pipe.step(up) for up in raised]))
        term = pipe.step(product(difference, difference).low(self.impact.square_bits))
        if weight is not None:
            term = pipe.step(product_unsigned(term, self.later(weight, 3)).low(self.impact.term_bits))
        before = stage.delay - 3
        for _ in range(before + 1):
            valid.append(pipe.flag(valid[-1]))
        last, place, empty, *raised = (self.later(each, before) for each in (last, place, empty, *raised))
        total = self._total(term, valid[-2], last)
        is_low = self._is_low(total, place)
        last, place, empty, *raised = (pipe.step(each) for each in (last, place, empty, *raised))
        sides = [
            scale_byte(place + up.unsigned(place.width), empty, stage.given, element)
            for element, up in zip(stage.kinds, raised, strict=True)
        ]
        beats = [self._beat(self.later(code, before), valid[-1]) for code in codes]
        data = join(is_low, is_low.then(*sides), is_low.then(*beats))
        return module.close({"in": rows.ready}, {"out": pipe.end(valid[-1] & last, data)})

    def _weight(self, go: Signal) -> Signal | None:
        """The sensitivity of the number that is read, beside it; without its sign, which is 0."""
        stage, module = self.stage, self.module
        if stage.sensitivity is None:
            return None
        (memory,) = module.loaded(stage.memories)
        channel, _ = module.counter(stage.blocks * stage.block, go, "channel")
        return memory.read(module, channel, self.pipe.enable).low(stage.sensitivity.width - 1)

    def later(self, signal: Signal, steps: int) -> Signal:
        """A signal so many steps later."""
        for _ in range(steps):
            signal = self.pipe.step(signal)
        return signal

    def _difference(self, codes: list[Signal], raised: list[Signal]) -> Signal:
        """Low minus high, in the impact's unit; what does not fit on the way drops out of the difference again."""
        width, found = self.impact.difference_bits, list[Signal]()
        for element, code, up in zip(self.stage.kinds, codes, raised, strict=True):
            value = decoded(element, code).as_integer(element.largest.bit_length() + 1)
            if places := self.impact.lift(element):
                value = join(value, self.module.constant(0, places))
            value = value.resized(width)
            found.append(up.then(join(value.low(width - 1), self.module.constant(0, 1)), value))
        return found[0] - found[1]

    def _total(self, term: Signal, valid: Signal, last: Signal) -> Signal:
        """The sum of a block's terms, whole behind its last element."""
        module, width = self.module, self.impact.sum_bits
        moving = valid & self.pipe.enable
        total, fresh = module.register(width, "impact", initial=None), module.register(1, "fresh", initial=1)
        fresh.set(last, moving)
        wide = term.unsigned(width)
        return total.set(fresh.q.then(wide, total.q + wide), moving)

    def _is_low(self, total: Signal, place: Signal) -> Signal:
        """Whether an impact is no larger than the threshold, which each power of two has in units of its own."""
        if self.impact.threshold < 0:
            return self.module.constant(0, 1)
        bound = self.pipe.step(self.module.table(place, self.impact.bounds(), total.width))
        return ~bound.less(total)

    def _beat(self, code: Signal, valid: Signal) -> Signal:
        """The codes of a block, each in as many bits as the wider kind has."""
        lanes, width = self.stage.lanes, self.stage.code.code_bits
        beat = gathered(self.module, code, lanes, valid & self.pipe.enable)
        if code.width == width:
            return beat
        return join(*(beat.bits(lane * code.width, code.width).unsigned(width) for lane in reversed(range(lanes))))


def _rule(element: ElementCode) -> str:
    return "floor" if element.is_fixed else "even"
