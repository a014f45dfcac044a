"""A report of runs, as one HTML page: `distopt report RUNS`."""

from distopt.report.page import write_report

__all__ = ["write_report"]
