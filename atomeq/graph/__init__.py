"""From structures to graphs: AtomGraph, conversion and validation, neighbours, hyperedges.

One fresh search (neighbors.py, device_neighbors.py), one list that follows what moves (moving.py),
builders that a model names. No networks and no operations of them; how atoms move is in dynamics/.
"""
