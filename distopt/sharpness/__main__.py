"""The entry point of `python -m distopt.sharpness`."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from distopt.bounds import integer, number
from distopt.job.errors import one_line_errors
from distopt.job.loading import loading
from distopt.job.process import end_of_process, end_on_interrupt


def main() -> None:
    """Runs the command line and ends the process."""
    end_on_interrupt()
    with end_of_process():
        options = _parser().parse_args()
        with one_line_errors():
            _check(options)
            loading()
            _run(options)


def _run(options: argparse.Namespace) -> None:
    from transformers.utils.logging import disable_progress_bar

    from distopt import collective
    from distopt.data.batch import next_token_loss
    from distopt.job.reopen import reopen
    from distopt.sharpness.objective import Objective
    from distopt.sharpness.pictures import draw
    from distopt.sharpness.report import measure, table

    disable_progress_bar()
    logging.disable(logging.CRITICAL)  # torch logs tracebacks of damaged files, which the error states already
    opened = reopen(options.checkpoint, options.engine, options.batches)
    objective = Objective(opened.model, next_token_loss, opened.batches)
    found = measure(objective, options, opened.accelerator.is_main_process)
    found |= {"checkpoint": opened.checkpoint.name, "batches": options.batches, "seed": options.seed}

    def write() -> str:
        file, picture = opened.folder / "sharpness.json", opened.folder / "sharpness.png"
        file.write_text(json.dumps(found, indent=1) + "\n")
        lines = found["line"]
        title = f"{opened.folder.name}, {opened.checkpoint.name}"
        draw(picture, title, lines["factors"], lines["losses"], found["plane"])
        return f"{table(found)}\n{'values':24} {file}\n{'picture':24} {picture}"

    written = collective.on_first(write)
    if opened.accelerator.is_main_process:
        print(written)
    opened.accelerator.wait_for_everyone()  # gloo may abort a process that still talks to one which has ended


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m distopt.sharpness",
        description="Measure the sharpness of a checkpoint on its training batches: worst and noisy losses, the "
        "largest eigenvalues and the trace of the Hessian, and the loss landscape. Writes sharpness.json and "
        "sharpness.png into the run's folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a run, whose newest one is taken, or a checkpoint",
    )
    add("--engine", help="an engine of conf/engine (default: that of the run)", default=argparse.SUPPRESS)
    add("--batches", type=int, default=1, help="global training batches, the first of the run's order")
    add("--rho", type=float, default=0.05, help="radius of the ball, in units of the 2-norm of all weights")
    add("--steps", type=int, default=10, help="ascent steps in the ball")
    add("--eigenvalues", type=int, default=3, metavar="K", help="largest eigenvalues of the Hessian")
    add("--iterations", type=int, default=30, help="most Hessian-vector products for them")
    add("--draws", type=int, default=10, help="random vectors for the trace, and for the noise")
    add("--noise", type=float, default=0.1, help="noise on each parameter, relative to its norm")
    add("--points", type=int, default=21, help="points of the landscape's lines, an odd number")
    add("--plane", type=int, default=0, help="points of each axis of the landscape's plane, an odd number; 0: no plane")
    add("--width", type=float, default=0.5, help="reach of the landscape, in units of the filters' norms")
    add("--seed", type=int, default=0, help="seed of all random vectors")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError for an option out of its bounds, before the model is built."""
    options.engine = getattr(options, "engine", None)
    for name, bound in {
        "batches": integer(1),
        "rho": number(0, above=True),
        "steps": integer(1),
        "eigenvalues": integer(1),
        "iterations": integer(options.eigenvalues),
        "draws": integer(2),
        "noise": number(0, above=True),
        "points": integer(3),
        "plane": integer(0),
        "width": number(0, above=True),
        "seed": integer(0),
    }.items():
        bound.check(f"--{name}", getattr(options, name))
    for name, value in {"points": options.points, "plane": options.plane}.items():
        if value and (value % 2 == 0 or value < 3):
            raise ValueError(f"--{name} must be an odd number >= 3, with the weights in the middle, got {value}")


if __name__ == "__main__":
    main()
