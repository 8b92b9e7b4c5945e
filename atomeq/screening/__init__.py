"""Screening: a pile of structures in, a ranked and explained table out, and the plug may be pulled."""
