"""The page of a report: one self-contained HTML file, with the pictures next to it."""

from __future__ import annotations

import base64
import math
from pathlib import Path

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

    runs = find_runs(folder)
    groups = grouped(runs)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(out, groups)
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("page.html").read_text()
    )
    page = out / "report.html"
    page.write_text(
        template.render(
            title=f"distopt: {folder.resolve().name}",
            runs=runs,
            groups=groups,
            keys=differing([run.config for run in runs]),
            diverged=sum(run.diverged for run in runs),
            unfinished=sum(run.unfinished for run in runs),
            pictures={name: base64.b64encode(file.read_bytes()).decode() for name, file in pictures.items()},
            number=lambda value: "" if math.isnan(value) else f"{value:.4f}",
        )
    )
    return page
