"""Check a checkpoint for damage: `distopt verify CHECKPOINT`."""

from __future__ import annotations

import argparse
from pathlib import Path

from distopt.job.errors import one_line_errors
from distopt.job.loading import loading


def main() -> None:
    """Run the command line: one line and exit code 0 for an intact checkpoint, the damage and exit code 1 otherwise."""
    parser = argparse.ArgumentParser(prog="distopt verify", description=__doc__)
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint's folder or URL, or a run, whose newest one it is"
    )
    path = parser.parse_args().checkpoint
    with one_line_errors():
        if "://" not in path and not Path(path).is_dir():
            raise ValueError(f"{path}: no such folder; give a checkpoint, as runs/book/checkpoints/step_00001000")
        loading()
        from distopt.checkpoint import verify  # `--help` does not wait for torch
        from distopt.checkpoint.folder import newest_checkpoint, open_checkpoint

        path = path if "://" in path else str(newest_checkpoint(Path(path)))
        found, content = verify(path), open_checkpoint(path)
        size = sum(size for size, *_ in content["files"].values()) / 1e6
        checked = "intact" if content["format"] > 1 else "complete (its format has no checksums)"
        print(f"{path} is {checked}: {len(content['files'])} files, {size:,.2f} MB, fingerprint {found.total}")


if __name__ == "__main__":
    main()
