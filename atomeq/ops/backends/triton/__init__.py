"""Kernels in Triton for CUDA, one source for every degree; imported only when asked for."""
