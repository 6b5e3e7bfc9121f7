"""How operations become stages: every file adds the kinds that it knows."""

from . import contraction, pointwise, rows, shapes  # noqa: F401
