"""The C kernels of the CPU and the builder that compiles them where they are used."""
