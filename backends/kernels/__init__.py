"""Generated kernels: the exact numerics of formats at the speed of memory, made for the processor at hand."""
