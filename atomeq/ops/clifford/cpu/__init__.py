"""C kernels, and the Python that calls them."""
