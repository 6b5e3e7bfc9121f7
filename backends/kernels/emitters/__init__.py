"""The block function written out in other languages than LLVM's: torch operations, and Triton for GPUs."""
