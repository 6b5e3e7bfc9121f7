"""How operations become stages: every file adds the kinds that it knows."""

from . import attention, contraction, convolution, pointwise, rows, shapes  # noqa: F401
