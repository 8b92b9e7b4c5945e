"""Blocks that own weights and take tensors; they never see a graph."""
