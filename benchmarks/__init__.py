"""The benchmarks: `python -m benchmarks step`. Every comparison alternates its sides in one run."""
