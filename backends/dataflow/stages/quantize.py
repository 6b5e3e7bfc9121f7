"""Fixed-point numbers into blocks: the largest magnitude gives the scale, then every element is rounded."""

from __future__ import annotations

from dataclasses import dataclass

from ..rtl import Module, Signal, join
from ._blocks import Blocks, BlockStage, gathered
from ._rounding import rounded, scale_byte
from ._stream import Pipe, StreamModule


@dataclass(frozen=True)
class Quantize(BlockStage):
    """Blocks of one kind. `rule` chooses the power of two, as in `dialects/formats/_scale`."""

    rule: str = "floor"
    rounding: str = "rne"

    @property
    def delay(self) -> int:
        return 3

    def module(self, name: str) -> Module:
        return _Builder(self, self.start(name)).build()


class _Builder:
    def __init__(self, stage: Quantize, module: StreamModule) -> None:
        self.stage, self.module = stage, module
        (self.element,) = stage.code.elements

    def build(self) -> Module:
        stage, module = self.stage, self.module
        pipe = Pipe(module, "out")
        rows = Blocks(module, stage)
        go = rows.available & pipe.enable
        index, last = rows.elements(go)
        valid = pipe.flag(rows.available)
        word = rows.read(index, pipe.enable)
        present = pipe.step(rows.holds(index))
        number = present.repeated(word.width) & word
        position = pipe.step(rows.position(stage.rule, self.element)) if stage.code.scale else None
        rows.release(go & last, pipe.enable, valid)
        code = pipe.step(rounded(number, position, stage.given, self.element, stage.rounding))
        valid = pipe.flag(valid)
        side = None
        if position is not None:
            side = pipe.step(scale_byte(position, pipe.step(rows.empty), stage.given, self.element))
        return self._packed(pipe, rows.ready, valid, code, side)

    def _packed(self, pipe: Pipe, ready: Signal, valid: Signal, code: Signal, side: Signal | None) -> Module:
        """Codes gathered into beats."""
        stage, module = self.stage, self.module
        moving = valid & pipe.enable
        _, full = module.counter(stage.lanes, moving, "lane")
        data = gathered(module, code, stage.lanes, moving)
        if side is not None:
            data = join(side, data)
        return module.close({"in": ready}, {"out": pipe.end(valid & full, data)})
