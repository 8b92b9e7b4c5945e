"""Real spherical harmonics: the angular basis of every model."""
