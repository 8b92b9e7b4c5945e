"""Batched relaxation and molecular dynamics: many different structures move at once."""
