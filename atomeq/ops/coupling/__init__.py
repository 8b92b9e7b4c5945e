"""Clebsch-Gordan products and convolutions, and symmetric contractions."""
