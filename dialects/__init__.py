"""Types, operations, verification and text form of the `mx` dialect. Nothing here imports torch at module level."""
