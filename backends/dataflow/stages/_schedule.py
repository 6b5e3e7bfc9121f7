"""When a stage takes and gives its beats: what the prediction of cycles knows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One go through what stands in a stage's banks.

    It begins once a bank of `takes[stream]` words is full for every stream that it names, lasts `steps` cycles, and
    gives a beat behind every `every` of them; then the banks of the streams in `frees` are given back. `repeat` such
    turns follow each other. A stage that keeps more than two banks may take and return another number than one.
    """

    takes: Mapping[str, int]
    frees: tuple[str, ...]
    steps: int
    every: int = 1
    repeat: int = 1
    banks: int = 1
    returned: int = 1


@dataclass(frozen=True)
class Schedule:
    """The turns of a stage, again and again; none where every beat passes on its own.

    `delay`: cycles from a step to the beat that it gives. `lead`: cycles of a turn before its first step. `rests`: a
    turn begins only after the last one's bank was given back. `shared`: (units, columns) where so many units give
    their beats together, the last of the columns fewer, and they leave one by one. `passes`: (count, range) where of
    every so many beats only those in the range are given. `kept`: banks of a stream; `held`: cycles from a turn's end
    until its banks can be written over.
    """

    delay: int
    turns: tuple[Turn, ...] = ()
    lead: int = 0
    rests: bool = False
    shared: tuple[int, int] | None = None
    passes: tuple[int, range] | None = None
    kept: int = 2
    held: int = 1


def in_turns(delay: int, *turns: Turn, lead: int = 0, rests: bool = False) -> Schedule:
    """The schedule of a stage that keeps one stream in banks."""
    return Schedule(delay, turns, lead, rests)


def bank(stream: str, words: int, steps: int, *, every: int = 1, repeat: int = 1) -> Turn:
    """A turn that takes one bank and gives it back."""
    return Turn({stream: words}, (stream,), steps, every, repeat)
