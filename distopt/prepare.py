"""Tokenize the text of a run before it starts: `distopt prepare [--processes N] data=... data.path=...`.

It takes the words of `distopt.train`, and no process group. Interrupted, it resumes where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from distopt.job import cli
from distopt.job.check import check
from distopt.job.config import Config, instantiate, named
from distopt.job.errors import one_line_errors
from distopt.job.loading import loading

_processes = os.cpu_count() or 1


@cli.program("train")
def prepared(cfg: Config) -> None:
    """Tokenizes the data of a configuration."""
    with one_line_errors():
        check(cfg, "train")
        loading()
        # What is mistyped, and `--help`, do not wait for what these import.
        from distopt.job.protocols import Data

        data, start = instantiate(cfg, "data", Data), time.monotonic()
        if getattr(data, "is_stream", False):
            raise ValueError("data=stream is tokenized while it trains, and has nothing to prepare; data=text has")
        with named("data"):
            corpus = data.build(_processes)
    splits = " and ".join(f"{size:,} {split}" for split, size in corpus.sizes.items())
    print(f"{corpus.source}: {splits} tokens, in {time.monotonic() - start:.0f} s by {_processes} processes")


def main() -> None:
    """Runs the command line of `python -m distopt.prepare`."""
    global _processes
    parser = argparse.ArgumentParser(prog="distopt prepare", add_help=False)
    parser.add_argument("--processes", type=int, default=_processes)
    options, words = parser.parse_known_args()
    with one_line_errors(), cli.explained():
        if options.processes < 1:
            raise ValueError(f"--processes must be an integer >= 1, got {options.processes}")
        _processes = options.processes
        sys.argv[1:] = [*cli.model_words(words), "hydra.run.dir=."]
        prepared()


if __name__ == "__main__":
    main()
