"""Potentials as ASE calculators, and the laws any calculator must keep."""
