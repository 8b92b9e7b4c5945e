"""Functions on the sphere: grids, pointwise functions, Gaunt products."""
