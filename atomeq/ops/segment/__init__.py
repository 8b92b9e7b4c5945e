"""Sums, means and softmax over the members of segments: edges of an atom, atoms of a graph."""
