"""The fixtures of a fit in seconds."""

from copper_experiment import copper_file, experiment  # noqa: F401
