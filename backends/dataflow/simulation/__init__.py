"""Two simulators of emitted hardware that take the same vectors: arc (in this process) and Verilator."""
