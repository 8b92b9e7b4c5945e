"""The tensor-product backend: parameter-free functions on [*, (lmax + 1)**2, channels] tensors."""
