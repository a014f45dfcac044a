"""Run one benchmark: `python -m benchmarks NAME [options]`."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from typing import NoReturn

_NAMES = (
    *("checkpoint", "depth", "growth", "health", "host", "loop", "mup", "proof"),
    *("rounding", "sam", "sam_phase", "scale", "sharpness", "state", "step", "train", "wire"),
)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = _Parser(prog="python -m benchmarks", description=__doc__)
    benchmarks = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    named = [name for name in _NAMES if name in sys.argv[1:2]]
    for name in named or _NAMES:  # only this one, since the imports of others may not be installed
        import_module(f"benchmarks.{name}").add_parser(benchmarks)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
