"""Screening: a pile of structures in, a ranked and explained table out; the plug may be pulled."""
