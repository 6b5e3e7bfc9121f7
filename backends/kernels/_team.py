"""How many threads work on a tensor."""

from __future__ import annotations

SERIAL_BELOW = 1 << 17
"""Values under which no team of threads is woken: where other processes hold the cores, that can take milliseconds."""


def team_size(count: int) -> int:
    """The threads that work on so many values."""
    import torch

    return 1 if count < SERIAL_BELOW else torch.get_num_threads()
