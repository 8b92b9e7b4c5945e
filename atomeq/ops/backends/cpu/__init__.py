"""The kernels of the ``cpu`` set: cache-sized blocks, few copies."""
