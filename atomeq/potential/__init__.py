"""A model and its references become energies, forces and stresses."""
