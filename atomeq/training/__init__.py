"""Losses, metrics, callbacks and the Lightning task."""
