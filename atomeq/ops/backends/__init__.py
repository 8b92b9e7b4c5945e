"""Implementations of the operations of atomeq.ops; reference.py is the truth."""
