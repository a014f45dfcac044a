"""Continue a prompt, or chat, with a checkpoint of a run: `distopt sample RUN "PROMPT"`, or `RUN --chat`."""

from __future__ import annotations

import argparse
import io
import logging
import signal
import sys
from pathlib import Path
from typing import Any

from distopt.bounds import DTYPES, integer, number
from distopt.job.errors import one_line_errors
from distopt.job.loading import loading


def main() -> None:
    """Runs the command line."""
    options = _parser().parse_intermixed_args()  # options may stand between RUN and PROMPT
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may write what the terminal has no character for
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.disable(logging.CRITICAL)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as in `distopt sample RUN | head`
    with one_line_errors():
        _check(options)
        loading()
        from distopt.job.reply import reply  # what is mistyped, and `--help`, do not wait for torch

        reply(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distopt sample", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run, whose newest checkpoint writes, or a checkpoint")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt (default: standard input)")
    parser.add_argument("--chat", action="store_true", help="ask, and go on asking, until the end of the input")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as text, whatever the run was taught")
    parser.add_argument("--step", type=int, help="the step of the run's checkpoint (default: the newest)")
    parser.add_argument("--tokens", type=int, default=200, help="the largest number of tokens (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="how many tokens to sample from; 0: all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the sampling (default: 0)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)")
    return parser


def _check(options: Any) -> None:
    integer(1).check("--tokens", options.tokens)
    number(0).check("--temperature", options.temperature)
    integer(0).check("--top-k", options.top_k)
    integer(0).check("--seed", options.seed)
    if options.chat and options.raw:
        raise ValueError("--chat uses the chat template, and --raw does not: leave out one of them")
    if not Path(options.run).expanduser().is_dir():
        raise ValueError(f"{options.run}: no such folder; give a run, as runs/book, or a checkpoint in one")
    if options.prompt is None and not options.chat:
        if sys.stdin.isatty():
            raise ValueError('there is no prompt: give one, as distopt sample runs/book "Once", or --chat')
        options.prompt = sys.stdin.read().rstrip("\n")


if __name__ == "__main__":
    main()
