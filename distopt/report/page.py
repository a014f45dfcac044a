"""The page of a report: one self-contained HTML file, with the pictures next to it."""

from __future__ import annotations

import base64
import json
import math
import statistics
from pathlib import Path
from typing import Any

from distopt.report.pictures import draw
from distopt.report.runs import differing, find_runs, grouped


def write_report(folder: Path, out: Path) -> Path:
    """Write `report.html` and its pictures for all runs at or below a folder.

    Args:
        folder: A run, a sweep, or a folder of them.
        out: The folder to write, which is created.

    Returns:
        The path of the page.

    Raises:
        ValueError: If there is no run.
    """
    from jinja2 import Environment

    runs, damaged = find_runs(folder)
    groups = grouped(runs)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(out, groups)
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("page.html").read_text()
    )
    compared = folder / "comparison.json"  # of hydra/sweeper=coordinate
    if compared.is_file():
        pictures = {"Comparison": folder / "comparison.png", **pictures}
    page = out / "report.html"
    page.write_text(
        template.render(
            title=f"distopt: {folder.resolve().name}",
            runs=runs,
            groups=groups,
            damaged=damaged,
            compared=_compared(json.loads(compared.read_text())) if compared.is_file() else [],
            keys=differing([run.config for run in runs]),
            diverged=sum(run.diverged for run in runs),
            unfinished=sum(run.unfinished for run in runs),
            pictures={name: base64.b64encode(file.read_bytes()).decode() for name, file in pictures.items()},
            number=lambda value: "" if math.isnan(value) else f"{value:.4f}",
        )
    )
    return page


def _compared(rows: list[dict[str, Any]]) -> list[tuple[str, float, float, str]]:
    """Return the name, mean, standard deviation (nan if there is none) and settings of each row of a comparison."""
    return [
        (
            row["name"],
            statistics.fmean(row["losses"]),
            statistics.stdev(row["losses"])
            if len(row["losses"]) > 1 and all(map(math.isfinite, row["losses"]))
            else math.nan,
            ", ".join(f"{key}={value}" for key, value in row["settings"].items()),
        )
        for row in rows
    ]
