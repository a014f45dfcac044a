"""Export a checkpoint as a Hugging Face folder: `distopt export CKPT OUT [--dtype DTYPE] [--adapter] [--average]`."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from distopt.bounds import DTYPES
from distopt.job.errors import one_line_errors
from distopt.job.loading import loading


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="distopt export", description=__doc__)
    parser.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, or a run, whose newest one is exported")
    parser.add_argument("out", metavar="OUT", help="the folder to write: a new or an empty one")
    parser.add_argument("--adapter", action="store_true", help="export the adapter of a LoRA run without merging it")
    parser.add_argument("--average", action="store_true", help="export the average of the weights (average=ema, lawa)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights (default: float32)")
    args = parser.parse_args()
    with one_line_errors():
        if not Path(args.checkpoint).expanduser().is_dir():
            raise ValueError(f"{args.checkpoint}: no such folder; give a run, as runs/book, or a checkpoint in one")
        loading()
        import torch  # `--help` does not wait for it
        from transformers.utils.logging import disable_progress_bar

        from distopt.models.export import export

        disable_progress_bar()
        logging.disable(logging.CRITICAL)  # torch logs tracebacks of damaged files, which the error states already
        try:
            print(export(args.checkpoint, args.out, getattr(torch, args.dtype), args.adapter, args.average))
        except OSError as error:  # such as a full disk or a missing permission
            raise ValueError(str(error)) from error


if __name__ == "__main__":
    main()
