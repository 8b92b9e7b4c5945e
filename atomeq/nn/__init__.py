"""Blocks that own weights, of which models are made; they take tensors, never a graph.

What has no weights is an operation (ops/); a block that one model alone has stands in its file.
"""
