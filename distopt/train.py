"""Trains a language model: `distopt train [overrides]`, or `python -m distopt.train` as each process of a launcher."""

from __future__ import annotations

import io
import sys

from distopt.job import cli
from distopt.job.check import check
from distopt.job.config import Config
from distopt.job.errors import end_as_before, one_line_errors
from distopt.job.leftovers import clear, no_leftovers
from distopt.job.process import end_of_process, end_on_interrupt, end_with_launcher


@cli.program("train")
def job(cfg: Config) -> float:
    """Trains as configured and returns the final validation loss in nats per token; a sweep runs it once per job."""
    with one_line_errors(), no_leftovers():
        check(cfg, "train")
        # What is mistyped, and `--help`, do not wait for torch.
        from distopt.job.build import build
        from distopt.job.header import header
        from distopt.job.terminal import Terminal
        from distopt.plan.running import planned_bytes

    with one_line_errors(), no_leftovers(), Terminal() as terminal:
        built = build(cfg, terminal)
        terminal.block(header(built, planned_bytes(built)))
        return built.run()


def main() -> None:
    """Runs the command line of `python -m distopt.train` and ends the process."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sample may contain what the terminal has no character for
        sys.stdout.reconfigure(errors="backslashreplace")
    end_as_before()
    end_with_launcher()
    end_on_interrupt(clear)
    with end_of_process(), one_line_errors(), no_leftovers(), cli.explained():
        sys.argv[1:] = cli.model_words(sys.argv[1:])
        job()


if __name__ == "__main__":
    main()
