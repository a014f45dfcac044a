"""`python -m distopt.bench NAME [options]`: one measurement each."""

from __future__ import annotations

import argparse

from distopt.bench import loop, optimizers, rounding, sam, sharpness, step


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m distopt.bench", description=__doc__)
    benchmarks = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    loop.add_parser(benchmarks)
    optimizers.add_parser(benchmarks)
    rounding.add_parser(benchmarks)
    sam.add_parser(benchmarks)
    sharpness.add_parser(benchmarks)
    step.add_parser(benchmarks)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
