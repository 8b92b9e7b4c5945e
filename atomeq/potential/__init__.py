"""From a model to energy, forces and stress, and from there to disk and back.

Derivatives, references, additive terms, committees, checkpoints, published files, compiled
libraries. No training, no motion, and no units or conventions of other codes.
"""
