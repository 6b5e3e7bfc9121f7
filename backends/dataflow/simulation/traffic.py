"""What a simulation is given and gives: streams of beats, how they stall, and what came out in which cycle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ....dialects.errors import MxloomError

if TYPE_CHECKING:
    from numpy import ndarray

RESET_CYCLES = 4
TAIL_CYCLES = 32
"""Cycles that follow the last expected beat: a design that then gives one more is wrong."""

SEED = 88172645463325252


@dataclass(frozen=True)
class Stalls:
    """How often streams wait: in `inputs` and `outputs` of 256 cycles at random, or in stated cycles of the outputs."""

    inputs: int = 0
    outputs: int = 0
    window: tuple[int, int] = (0, 0)
    seed: int = SEED

    @classmethod
    def random(cls, share: float, seed: int = SEED) -> Stalls:
        """Both sides wait in this share of the cycles."""
        return cls(round(share * 256), round(share * 256), seed=seed)


NO_STALLS = Stalls()
READY_LOW = Stalls(window=(3, 8))
"""The outputs' ready is low in cycles 3 to 7."""


@dataclass(frozen=True)
class Run:
    """What a simulation found.

    `outputs`: beats of each output, uint8 [count, bytes]; `taken` and `given`: the cycle of each beat of each input and
    output. `violations` counts cycles in which a beat that nobody had taken was gone or changed, `surplus` the beats
    beyond those that were expected.
    """

    outputs: dict[str, ndarray]
    taken: dict[str, ndarray]
    given: dict[str, ndarray]
    cycles: int
    violations: int
    surplus: int

    def numbers(self, stream: str, *, signed_bits: int | None = None) -> list[int]:
        """The beats of an output as whole numbers."""
        return words_to_numbers(self.outputs[stream], signed_bits=signed_bits)


@dataclass
class Phase:
    """Beats for some inputs (uint8 [count, bytes]) and how many each output gives; a later phase waits for it."""

    inputs: Mapping[str, ndarray]
    outputs: Mapping[str, int] = field(default_factory=dict)


def word_bytes(width: int) -> int:
    """Bytes of a beat of `width` bits."""
    return -(-width // 8)


def words(numbers: Iterable[int], width: int) -> ndarray:
    """Numbers (negative ones in two's complement) as beats of `width` bits, the lowest byte first."""
    import numpy as np

    size, mask = word_bytes(width), (1 << width) - 1
    data = b"".join((int(number) & mask).to_bytes(size, "little") for number in numbers)
    return np.frombuffer(data, np.uint8).reshape(-1, size)


def words_to_numbers(beats: ndarray, *, signed_bits: int | None = None) -> list[int]:
    """Beats as numbers; as two's complement ones where their bits are stated."""
    found = [int.from_bytes(beat.tobytes(), "little") for beat in beats]
    if signed_bits is None:
        return found
    half = 1 << (signed_bits - 1)
    return [number - (half << 1) if number >= half else number for number in found]


def check_streams(ports: Mapping[str, int], inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
    """Raises MxloomError unless `ports` (widths in bits) are those of a clock, a reset and these streams."""
    if both := {*inputs} & {*outputs}:
        raise MxloomError(f"{', '.join(sorted(both))} cannot be both an input and an output")
    wanted = {"clk": 1, "rst": 1}
    for name, width in {**inputs, **outputs}.items():
        wanted |= {name: width, f"{name}_valid": 1, f"{name}_ready": 1}
    for port, width in wanted.items():
        if port not in ports:
            raise MxloomError(f'the design has no port "{port}"; it has {", ".join(ports)}')
        if ports[port] != width:
            raise MxloomError(f'the design\'s port "{port}" has {ports[port]} bits, not {width}')


def phase_beats(phase: Phase, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> dict[str, ndarray]:
    """The beats of every input, uint8 [count, bytes], none where the phase has none.

    Raises MxloomError for a stream that the design has not, and for beats of another form than their stream's.
    """
    import numpy as np

    unknown = sorted(({*phase.inputs} - {*inputs}) | ({*phase.outputs} - {*outputs}))
    if unknown:
        known = f"inputs are {', '.join(inputs)}, outputs {', '.join(outputs)}"
        raise MxloomError(f"the design has no stream {', '.join(unknown)} on that side; {known}")
    found: dict[str, ndarray] = {}
    for name, width in inputs.items():
        size = word_bytes(width)
        beats = np.ascontiguousarray(phase.inputs.get(name, np.zeros((0, size), np.uint8)))
        if beats.dtype != np.uint8 or beats.shape[1:] != (size,):
            raise MxloomError(f"beats of {name} are uint8 [count, {size}], got {beats.dtype} {list(beats.shape)}")
        if width % 8 and (beats[:, -1] >> (width % 8)).any():
            raise MxloomError(f"beats of {name} have {width} bits; bits above them must be 0")
        found[name] = beats
    return found
