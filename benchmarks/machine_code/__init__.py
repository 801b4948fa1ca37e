"""Reads the machine code of the Triton kernels, which are compiled without a GPU."""
