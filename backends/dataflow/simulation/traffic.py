"""What a simulation is given and gives: streams of beats, how they stall, and what came out in which cycle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
