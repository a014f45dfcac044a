"""A report of finished runs, as one HTML page: `python -m distopt.report RUNS`."""

from distopt.report.page import write_report
from distopt.report.runs import Group, Run, find_runs, grouped

__all__ = ["Group", "Run", "find_runs", "grouped", "write_report"]
