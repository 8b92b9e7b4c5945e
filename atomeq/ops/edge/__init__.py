"""Rotations into the frames of edges, SO(2) maps there, and whole eSCN layers."""
