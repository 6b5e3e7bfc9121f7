"""The dataflow backend: one streaming hardware stage for each operation, bit for bit what the reference computes."""
