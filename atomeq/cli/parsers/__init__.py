"""Command lines of the verbs: options, helps and early refusals, without torch or ase."""
