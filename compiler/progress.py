"""Progress for people: a live line on a terminal, plain lines elsewhere; on stderr, for stdout holds results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

Report = Callable[[str, str], None]
"""Takes the name of a step that is done and a line about it."""

Tick = Callable[[int, int], None]
"""Takes how much of a step is done, and how much there is."""


class Progress:
    """Prints each finished step with the seconds it took, and shows on a terminal that and how far work goes on."""

    def __init__(self, stream: IO[str] | None = None):
        from rich.console import Console

        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._since = time.monotonic()

    def report(self, step: str, line: str) -> None:
        """Print a finished step; its time is the time since the step before."""
        now = time.monotonic()
        self._console.print(f"  {step:10} {line}  {now - self._since:.1f} s", markup=False)
        self._since = now

    @contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """While inside, a terminal shows a moving mark beside `what`; yields `report`."""
        self._since = time.monotonic()
        if not self._console.is_terminal:
            yield self.report
            return
        with self._console.status(what):
            yield self.report

    @contextmanager
    def counting(self, what: str) -> Iterator[Tick]:
        """While inside, a terminal shows a bar; yields what to call with (done, total)."""
        self._since = time.monotonic()
        if not self._console.is_terminal:
            yield lambda done, total: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=self._console, transient=True) as bars:
            bar = bars.add_task(what, total=None)
            yield lambda done, total: bars.update(bar, completed=done, total=total)
