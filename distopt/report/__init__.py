"""A report of runs, as one HTML page: `distopt report RUNS`."""
