"""What a design costs, from its numbers alone: area, FPGA resources, memory, energy."""

from . import windows  # noqa: F401  (adds its features)
