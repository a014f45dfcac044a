"""The entry point of `distopt report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from distopt.job.errors import one_line_errors


def main() -> None:
    """Write the report and print its path."""
    parser = argparse.ArgumentParser(
        prog="distopt report", description="Write a page about runs, of a sweep or any others: one HTML file."
    )
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUNS", default=[Path("runs")], help="runs, sweeps, or folders of them"
    )
    parser.add_argument("--out", type=Path, help="the folder to write (default: report in the first of RUNS)")
    parser.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=15.0,
        metavar="SECONDS",
        help="write it again when a run changes, and look so often (default: 15); the open page loads itself again",
    )
    args = parser.parse_intermixed_args()  # options may stand between RUNS
    with one_line_errors():
        from distopt.report.find import Finder  # `--help` does not wait for NumPy
        from distopt.report.page import write_page
        from distopt.report.watch import watch

        finder, out = Finder(args.runs), args.out or args.runs[0] / "report"
        page = write_page(finder, out) if args.watch is None else watch(finder, out, args.watch)
        if page:
            print(f"report: {page}")


if __name__ == "__main__":
    main()
