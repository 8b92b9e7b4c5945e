"""Structure to graph: AtomGraph, its builders and the neighbour lists under them."""
