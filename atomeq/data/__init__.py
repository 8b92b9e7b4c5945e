"""Datasets and their readers: files in, AtomGraph batches out."""
