"""The entry point of `python -m distopt.report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from distopt.job.errors import one_line_errors
from distopt.report.page import write_report


def main() -> None:
    """Write the report and print its path."""
    parser = argparse.ArgumentParser(
        prog="distopt report", description="Write a page with pictures of a sweep, or of any folder of runs."
    )
    parser.add_argument("runs", type=Path, metavar="RUNS", help="a run, a sweep, or a folder of them (runs/)")
    parser.add_argument("--out", type=Path, help="the folder to write (default: RUNS/report)")
    args = parser.parse_args()
    with one_line_errors():
        print(f"report: {write_report(args.runs, args.out or args.runs / 'report')}")


if __name__ == "__main__":
    main()
