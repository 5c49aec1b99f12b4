"""Time and bytes of the step kernels: `python -m benchmarks.kernels`."""
