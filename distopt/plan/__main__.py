"""The entry point of `python -m distopt.plan`."""

from __future__ import annotations

import sys

from distopt.job import cli
from distopt.job.check import check
from distopt.job.config import Config
from distopt.job.errors import one_line_errors
from distopt.job.loading import loading


@cli.program("plan")
def planned(cfg: Config) -> None:
    """Print the plan of the command line's configuration."""
    with one_line_errors():
        check(cfg, "plan")
        loading()
        from distopt.plan.plan import format_plan, make_plan, verdict  # what is mistyped does not wait for torch

        plan = make_plan(cfg)
        print(format_plan(plan))
        print(verdict(plan))


def main() -> None:
    """Runs the command line of `python -m distopt.plan`."""
    sys.argv[1:] = cli.model_words(sys.argv[1:])
    with one_line_errors(), cli.explained():
        planned()


if __name__ == "__main__":
    main()
