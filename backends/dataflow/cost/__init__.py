"""What a design costs, from its numbers alone: area, FPGA resources, memory, energy."""
