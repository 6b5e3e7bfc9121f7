"""What a design costs, from its numbers alone: area, FPGA resources, memory, energy."""

from . import float_sums, routes, windows  # noqa: F401  (they add their features)
