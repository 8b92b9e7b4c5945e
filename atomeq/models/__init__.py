"""One file per paper; every model is an AtomisticModel."""
