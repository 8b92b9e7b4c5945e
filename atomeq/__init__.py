"""atomeq: equivariant graph networks for atoms, from structure to forces."""
