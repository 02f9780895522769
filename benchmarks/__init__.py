"""Studies and measurements: programs whose results are in `benchmarks/results`."""
