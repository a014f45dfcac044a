"""A checkpoint as a Hugging Face folder: `python -m distopt.export CKPT OUT [--dtype bfloat16] [--adapter]`."""

from __future__ import annotations

import argparse
import logging

from distopt.job.errors import one_line_errors
from distopt.models.export import DTYPES, export


def main() -> None:
    """The entry point of the command line."""
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser(prog="python -m distopt.export", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run, of which the newest is taken")
    parser.add_argument("out", metavar="OUT", help="the folder to write, new or empty")
    parser.add_argument("--adapter", action="store_true", help="of a LoRA run: the adapter alone, not merged")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    args = parser.parse_args()
    disable_progress_bar()
    logging.disable(logging.CRITICAL)  # what torch logs of a damaged file, with tracebacks, is in the error too
    with one_line_errors():
        try:
            print(export(args.checkpoint, args.out, DTYPES[args.dtype], args.adapter))
        except OSError as error:  # no space, no permission
            raise ValueError(str(error)) from error


if __name__ == "__main__":
    main()
