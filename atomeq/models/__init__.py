"""One file a paper: the model with its blocks, and registry.py, which finds them by name.

A published form is an option or a small class beside the model where a user needs it: for weights
that exist, or an experiment of configs/. Forms that only golden cases need stand beside those.
Blocks of several models are in nn/, derivatives and units in potential/, graphs in graph/.
"""
