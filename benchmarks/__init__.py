"""Measurements: `python -m benchmarks loop`. Every comparison alternates its sides in one run."""
