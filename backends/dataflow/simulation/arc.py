"""The simulator without a C++ compiler: CIRCT's arc model as LLVM IR, compiled in this process."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....dialects.errors import MxloomError
from ..circt import ArcModel, arc_model
from ..packages import needed
from .traffic import NO_STALLS, RESET_CYCLES, TAIL_CYCLES, Phase, Run, Stalls, check_streams, phase_beats, word_bytes

_CYCLE, _RANDOM, _VIOLATIONS, _SURPLUS, _STREAMS = 0, 1, 2, 3, 4
_POSITION, _HELD, _COUNT, _DATA, _CYCLES, _FIELDS = 0, 1, 2, 3, 4, 5


@dataclass(frozen=True)
class _Stream:
    name: str
    width: int
    output: bool
    index: int


class ArcSimulator:
    """A design that is stepped from Python (`poke`, `peek`, `cycle`), or run whole at native speed (`run`).

    `inputs` and `outputs` give the streams and their widths in bits.
    """

    def __init__(self, text: str, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
        """Raises MxloomError where CIRCT refuses the design, or where its ports are not those of the streams."""
        self.model = arc_model(text)
        check_streams({name: width for name, (_, width) in self.model.ports.items()}, inputs, outputs)
        named = [(name, width, False) for name, width in inputs.items()]
        named += [(name, width, True) for name, width in outputs.items()]
        self._streams = [_Stream(*each, index) for index, each in enumerate(named)]
        self._compile(_driver(self.model, self._streams))
        self.storage = np.zeros(self.model.bytes + 64, np.uint8)
        self._view = self.storage.data
        self.reset()

    def _compile(self, driver: str) -> None:
        llvm = needed("llvmlite.binding", "designs are compiled in this process by")
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = llvm.parse_assembly(self.model.llvm + driver)
        module.verify()
        target = llvm.Target.from_default_triple().create_target_machine(
            opt=2, cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten()
        )
        builder = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=1))
        builder.getModulePassManager().run(module, builder)
        self._engine = llvm.create_mcjit_compiler(module, target)
        self._engine.finalize_object()
        one = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self._eval = one(self._engine.get_function_address(f"{self.model.top}_eval"))
        self._drive = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(self._engine.get_function_address("drive"))

    def poke(self, port: str, number: int) -> None:
        """Set an input port."""
        offset, width = self._port(port)
        size = word_bytes(width)
        self._view[offset : offset + size] = (number & ((1 << width) - 1)).to_bytes(size, "little")

    def peek(self, port: str) -> int:
        """What a port carries; after `settle` for what depends on inputs at once."""
        offset, width = self._port(port)
        return int.from_bytes(self._view[offset : offset + word_bytes(width)], "little") & ((1 << width) - 1)

    def settle(self) -> None:
        """Let inputs reach the outputs."""
        self._eval(self.storage.ctypes.data)

    def cycle(self) -> None:
        """One edge of the clock."""
        self.poke("clk", 1)
        self.settle()
        self.poke("clk", 0)
        self.settle()

    def reset(self) -> None:
        """As after power-up and reset; memories keep what they hold."""
        for stream in self._streams:
            self.poke(f"{stream.name}_{'ready' if stream.output else 'valid'}", 0)
        self.poke("rst", 1)
        for _ in range(RESET_CYCLES):
            self.cycle()
        self.poke("rst", 0)
        self.settle()

    def run(self, phases: Sequence[Phase], stalls: Stalls = NO_STALLS, limit: int = 10_000_000) -> Run:
        """Run the phases one after the other from a reset. `limit` is the number of cycles at which it gives up."""
        self.reset()
        control = np.zeros(_STREAMS + _FIELDS * len(self._streams), np.int64)
        control[_RANDOM] = stalls.seed
        buffers: dict[str, list[np.ndarray]] = {stream.name: [] for stream in self._streams}
        times: dict[str, list[np.ndarray]] = {stream.name: [] for stream in self._streams}
        for phase in phases:
            keep = self._start(phase, control, buffers, times)
            given = np.array([limit, stalls.inputs, stalls.outputs, *stalls.window, TAIL_CYCLES], np.int64)
            self._drive(self.storage.ctypes.data, control.ctypes.data, given.ctypes.data)
            del keep
            self._cut(control, buffers, times)
            if control[_CYCLE] >= limit:
                break
        outputs = {s.name: _joined(buffers[s.name], word_bytes(s.width)) for s in self._streams if s.output}
        flat = {name: np.concatenate(found) if found else np.zeros(0, np.int64) for name, found in times.items()}
        return Run(
            outputs,
            {s.name: flat[s.name] for s in self._streams if not s.output},
            {s.name: flat[s.name] for s in self._streams if s.output},
            int(control[_CYCLE]),
            int(control[_VIOLATIONS]),
            int(control[_SURPLUS]),
        )

    def _start(
        self,
        phase: Phase,
        control: np.ndarray,
        buffers: dict[str, list[np.ndarray]],
        times: dict[str, list[np.ndarray]],
    ) -> list[np.ndarray]:
        """Point the driver at the phase's beats; returns what must stay alive meanwhile."""
        inputs = {stream.name: stream.width for stream in self._streams if not stream.output}
        outputs = {stream.name: stream.width for stream in self._streams if stream.output}
        given = phase_beats(phase, inputs, outputs)
        keep: list[np.ndarray] = []
        for stream in self._streams:
            size = word_bytes(stream.width)
            if stream.output:
                data = np.zeros((phase.outputs.get(stream.name, 0), size), np.uint8)
                buffers[stream.name].append(data)
            else:
                data = given[stream.name]
            cycles = np.zeros(len(data), np.int64)
            times[stream.name].append(cycles)
            keep += [data, cycles]
            base = _STREAMS + _FIELDS * stream.index
            control[base : base + _FIELDS] = [0, 0, len(data), data.ctypes.data, cycles.ctypes.data]
        return keep

    def _cut(
        self, control: np.ndarray, buffers: dict[str, list[np.ndarray]], times: dict[str, list[np.ndarray]]
    ) -> None:
        """Leave out what did not come before the limit."""
        for stream in self._streams:
            count = int(control[_STREAMS + _FIELDS * stream.index + _POSITION])
            times[stream.name][-1] = times[stream.name][-1][:count]
            if stream.output:
                buffers[stream.name][-1] = buffers[stream.name][-1][:count]

    def _port(self, name: str) -> tuple[int, int]:
        if name not in self.model.ports:
            raise MxloomError(f'the design has no port "{name}"; it has {", ".join(self.model.ports)}')
        return self.model.ports[name]


def _joined(parts: list[np.ndarray], size: int) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, size), np.uint8)


class _Text:
    """LLVM IR in the making: fresh names, and what loads and stores look like."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._count = 0

    def name(self) -> str:
        self._count += 1
        return f"%v{self._count}"

    def do(self, text: str) -> str:
        found = self.name()
        self.lines.append(f"  {found} = {text}")
        return found

    def say(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def label(self, text: str) -> None:
        self.lines.append(f"{text}:")

    def at(self, base: str, offset: int | str) -> str:
        return self.do(f"getelementptr i8, ptr {base}, i64 {offset}")

    def load(self, base: str, offset: int, type: str = "i64") -> str:
        return self.do(f"load {type}, ptr {self.at(base, offset)}")

    def store(self, base: str, offset: int, value: str, type: str = "i64") -> None:
        self.say(f"store {type} {value}, ptr {self.at(base, offset)}")


def _driver(model: ArcModel, streams: Sequence[_Stream]) -> str:
    """`drive(storage, control, given)`: cycles until every stream has had its beats, or `given` is exhausted."""
    return _Driver(model, streams).text()


class _Driver:
    def __init__(self, model: ArcModel, streams: Sequence[_Stream]) -> None:
        self.model, self.streams, self.t = model, streams, _Text()

    def text(self) -> str:
        t = self.t
        for stream in self.streams:
            if stream.output:
                size = word_bytes(stream.width)
                t.lines.insert(0, f"@last{stream.index} = internal global [{size} x i8] zeroinitializer")
                t.lines.insert(0, f"@waits{stream.index} = internal global i1 false")
        if " @llvm.memcpy.p0.p0.i64" not in self.model.llvm:
            t.lines.append("declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)")
        t.lines.append("define void @drive(ptr %s, ptr %c, ptr %g) {")
        t.label("entry")
        for stream in self.streams:
            if stream.output:
                t.say(f"store i1 false, ptr @waits{stream.index}")
        t.say("br label %loop")
        t.label("loop")
        t.say("%tail = phi i64 [0, %entry], [%tail_next, %next]")
        self._cycle()
        t.say("ret void")
        t.lines.append("}")
        return "\n" + "\n".join(t.lines) + "\n"

    def _offset(self, stream: _Stream, what: str = "") -> int:
        return self.model.ports[f"{stream.name}{what}"][0]

    def _field(self, stream: _Stream, field: int) -> int:
        return 8 * (_STREAMS + _FIELDS * stream.index + field)

    def _random(self) -> str:
        """The next of a xorshift generator's numbers, its lowest byte."""
        t = self.t
        x = t.load("%c", 8 * _RANDOM)
        for kind, places in (("shl", 13), ("lshr", 7), ("shl", 17)):
            moved = t.do(f"{kind} i64 {x}, {places}")
            x = t.do(f"xor i64 {x}, {moved}")
        t.store("%c", 8 * _RANDOM, x)
        byte = t.do(f"lshr i64 {x}, 24")
        return t.do(f"and i64 {byte}, 255")

    def _cycle(self) -> None:
        t = self.t
        for stream in self.streams:
            self._offer(stream) if not stream.output else self._listen(stream)
        t.say(f"call void @{self.model.top}_eval(ptr %s)")
        done = "true"
        for stream in self.streams:
            self._take(stream) if not stream.output else self._receive(stream)
            position, count = (t.load("%c", self._field(stream, f)) for f in (_POSITION, _COUNT))
            finished = t.do(f"icmp sge i64 {position}, {count}")
            done = t.do(f"and i1 {done}, {finished}")
        t.store("%s", self.model.ports["clk"][0], "1", "i8")
        t.say(f"call void @{self.model.top}_eval(ptr %s)")
        t.store("%s", self.model.ports["clk"][0], "0", "i8")
        cycle = t.do(f"add i64 {t.load('%c', 8 * _CYCLE)}, 1")
        t.store("%c", 8 * _CYCLE, cycle)
        step = t.do(f"zext i1 {done} to i64")
        t.say(f"%tail_next = add i64 %tail, {step}")
        over = t.do(f"icmp sge i64 {cycle}, {t.load('%g', 0)}")
        enough = t.do(f"icmp sge i64 %tail_next, {t.load('%g', 40)}")
        stop = t.do(f"or i1 {over}, {enough}")
        t.say("br label %next")
        t.label("next")
        t.say(f"br i1 {stop}, label %exit, label %loop")
        t.label("exit")

    def _offer(self, stream: _Stream) -> None:
        """Offer the next beat unless the stream waits; what was offered stays."""
        t, i = self.t, stream.index
        random = self._random()
        held = t.load("%c", self._field(stream, _HELD))
        position, count = (t.load("%c", self._field(stream, f)) for f in (_POSITION, _COUNT))
        free = t.do(f"icmp eq i64 {held}, 0")
        more = t.do(f"icmp slt i64 {position}, {count}")
        willing = t.do(f"icmp sge i64 {random}, {t.load('%g', 8)}")
        begin = t.do(f"and i1 {t.do(f'and i1 {free}, {more}')}, {willing}")
        t.say(f"br i1 {begin}, label %offer{i}, label %offered{i}")
        t.label(f"offer{i}")
        size = word_bytes(stream.width)
        source = t.do(f"inttoptr i64 {t.load('%c', self._field(stream, _DATA))} to ptr")
        word = t.at(source, t.do(f"mul i64 {position}, {size}"))
        target = t.at("%s", self._offset(stream))
        t.say(f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {word}, i64 {size}, i1 false)")
        t.store("%c", self._field(stream, _HELD), "1")
        t.say(f"br label %offered{i}")
        t.label(f"offered{i}")
        valid = t.do(f"trunc i64 {t.load('%c', self._field(stream, _HELD))} to i8")
        t.store("%s", self._offset(stream, "_valid"), valid, "i8")

    def _listen(self, stream: _Stream) -> None:
        """Whether the output is ready in this cycle."""
        t = self.t
        random = self._random()
        cycle = t.load("%c", 8 * _CYCLE)
        willing = t.do(f"icmp sge i64 {random}, {t.load('%g', 16)}")
        before = t.do(f"icmp slt i64 {cycle}, {t.load('%g', 24)}")
        behind = t.do(f"icmp sge i64 {cycle}, {t.load('%g', 32)}")
        outside = t.do(f"or i1 {before}, {behind}")
        ready = t.do(f"zext i1 {t.do(f'and i1 {willing}, {outside}')} to i8")
        t.store("%s", self._offset(stream, "_ready"), ready, "i8")

    def _bit(self, offset: int) -> str:
        return self.t.do(f"trunc i8 {self.t.load('%s', offset, 'i8')} to i1")

    def _take(self, stream: _Stream) -> None:
        """Go on to the next beat where this one was taken."""
        t, i = self.t, stream.index
        held = t.do(f"icmp ne i64 {t.load('%c', self._field(stream, _HELD))}, 0")
        taken = t.do(f"and i1 {held}, {self._bit(self._offset(stream, '_ready'))}")
        t.say(f"br i1 {taken}, label %take{i}, label %taken{i}")
        t.label(f"take{i}")
        t.store("%c", self._field(stream, _HELD), "0")
        self._count(stream)
        t.say(f"br label %taken{i}")
        t.label(f"taken{i}")

    def _count(self, stream: _Stream) -> str:
        """Note the cycle of a beat; returns its number."""
        t = self.t
        position = t.load("%c", self._field(stream, _POSITION))
        times = t.do(f"inttoptr i64 {t.load('%c', self._field(stream, _CYCLES))} to ptr")
        place = t.do(f"getelementptr i64, ptr {times}, i64 {position}")
        t.say(f"store i64 {t.load('%c', 8 * _CYCLE)}, ptr {place}")
        t.store("%c", self._field(stream, _POSITION), t.do(f"add i64 {position}, 1"))
        return position

    def _receive(self, stream: _Stream) -> None:
        """Check that a beat that waits stays as it is, and keep it where it passes."""
        t, i, size = self.t, stream.index, word_bytes(stream.width)
        valid, ready = self._bit(self._offset(stream, "_valid")), self._bit(self._offset(stream, "_ready"))
        waits = t.do(f"load i1, ptr @waits{i}")
        word = f"i{8 * size}"
        data = t.do(f"load {word}, ptr {t.at('%s', self._offset(stream))}, align 1")
        before = t.do(f"load {word}, ptr @last{i}, align 1")
        changed = t.do(f"icmp ne {word} {data}, {before}")
        gone = t.do(f"xor i1 {valid}, true")
        wrong = t.do(f"and i1 {waits}, {t.do(f'or i1 {changed}, {gone}')}")
        more = t.do(f"add i64 {t.load('%c', 8 * _VIOLATIONS)}, {t.do(f'zext i1 {wrong} to i64')}")
        t.store("%c", 8 * _VIOLATIONS, more)
        idle = t.do(f"xor i1 {ready}, true")
        t.say(f"store i1 {t.do(f'and i1 {valid}, {idle}')}, ptr @waits{i}")
        t.say(f"store {word} {data}, ptr @last{i}, align 1")
        passes = t.do(f"and i1 {valid}, {ready}")
        position, count = (t.load("%c", self._field(stream, f)) for f in (_POSITION, _COUNT))
        wanted = t.do(f"icmp slt i64 {position}, {count}")
        t.say(f"br i1 {passes}, label %pass{i}, label %passed{i}")
        t.label(f"pass{i}")
        t.say(f"br i1 {wanted}, label %keep{i}, label %surplus{i}")
        t.label(f"keep{i}")
        number = self._count(stream)
        target = t.do(f"inttoptr i64 {t.load('%c', self._field(stream, _DATA))} to ptr")
        place = t.at(target, t.do(f"mul i64 {number}, {size}"))
        t.say(f"store {word} {data}, ptr {place}, align 1")
        t.say(f"br label %passed{i}")
        t.label(f"surplus{i}")
        t.store("%c", 8 * _SURPLUS, t.do(f"add i64 {t.load('%c', 8 * _SURPLUS)}, 1"))
        t.say(f"br label %passed{i}")
        t.label(f"passed{i}")
