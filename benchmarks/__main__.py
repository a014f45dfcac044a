"""Run one benchmark: `python -m benchmarks NAME [options]`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

_NAMES = ("depth", "growth", "health", "loop", "mup", "proof", "rounding", "sam", "sharpness", "step", "train", "wire")


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    benchmarks = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    named = [name for name in _NAMES if name in sys.argv[1:2]]
    for name in named or _NAMES:  # only this one, since the imports of others may not be installed
        import_module(f"benchmarks.{name}").add_parser(benchmarks)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
