"""The page of a report: one self-contained HTML file."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from distopt.job.drawing import COLORS
from distopt.report.colors import styles
from distopt.report.comparison import Row, draw, read_comparison
from distopt.report.curves import AXES, loss, norms
from distopt.report.figure import Figure
from distopt.report.find import Finder
from distopt.report.grouping import DataSet, by_data
from distopt.report.layers import layers
from distopt.report.rates import by_lr
from distopt.report.search import draw as search_picture
from distopt.report.search import read_search
from distopt.report.table import all_runs, results

NAME = "report.html"


def write_report(folders: Path | Sequence[Path], out: Path) -> Path:
    """Write the page of all runs at or below some folders.

    Args:
        folders: A run, a sweep, or a folder of them; or several.
        out: The folder to write, which is created.

    Returns:
        The path of the page.

    Raises:
        ValueError: If there is no run.
    """
    finder = Finder([folders] if isinstance(folders, Path) else list(folders))
    return write_page(finder, out)


def write_page(finder: Finder, out: Path, every: float | None = None) -> Path:
    """Write the page of the runs that are found; a page that is open meanwhile is never a torn one.

    Args:
        finder: Finds the runs.
        out: The folder to write, which is created.
        every: The seconds after which an open page loads itself again; None for a page that stays as it is.

    Raises:
        NoRuns: If there is no run yet.
        ValueError: If there is no such folder, or only runs that are damaged.
    """
    runs = finder.find()
    comparisons, damaged = _comparisons(finder.folders)
    searches, more = _searches(finder.folders)
    damaged = [*finder.damaged, *damaged, *more]
    datasets = by_data(runs)
    sections, figures = _sections(datasets)
    for comparison in comparisons:
        comparison["figure"] = len(figures)
        figures.append(draw(comparison["rows"]))
    for search in searches:
        search["figure"] = len(figures)
        figures.append(search_picture(search["search"]))
    out.mkdir(parents=True, exist_ok=True)
    text = _render(
        title=", ".join(folder.resolve().name for folder in finder.folders),
        runs=runs,
        groups=sum(len(dataset.groups) for dataset in datasets),
        sections=sections,
        comparisons=comparisons,
        searches=searches,
        figures=figures,
        damaged=damaged,
        table_of_runs=all_runs(runs, out),
        axes=AXES,
        packed={"plotly": _plotly(), "figures": _packed(_json([asdict(figure) for figure in figures]))},
        every=every,
    )
    page, aside = out / NAME, out / f".{NAME}"
    aside.write_bytes(text.encode(errors="replace"))  # the name of a folder may be no text
    aside.replace(page)
    return page


def _sections(datasets: Sequence[DataSet]) -> tuple[list[dict[str, Any]], list[Figure]]:
    """What the page shows of each data set, and its pictures, to which the sections refer by number."""
    optimizers = sorted({run.optimizer for dataset in datasets for run in dataset.runs})
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(optimizers)}
    sections: list[dict[str, Any]] = []
    figures: list[Figure] = []
    for dataset in datasets:
        style = styles(dataset, optimizers)
        drawn = [loss(dataset, style), by_lr(dataset, style, colors), norms(dataset, style)]
        begin = len(figures)
        figures += [figure for figure in drawn if figure]
        middle = len(figures)
        figures += layers(dataset.groups)
        sections.append(
            {
                "title": dataset.title,
                "table": results(dataset),
                "styles": [style[group] for group in dataset.groups],
                "figures": range(begin, middle),
                "layers": range(middle, len(figures)),
            }
        )
    return sections, figures


def _comparisons(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The comparisons in the folders, and a line about each that is damaged."""
    found: list[dict[str, Any]] = []
    damaged = []
    for folder in folders:
        try:
            rows: list[Row] = read_comparison(folder)
        except ValueError as error:
            damaged.append(str(error))
        else:
            found += [{"title": folder.resolve().name, "rows": rows}] if rows else []
    return found, damaged


def _searches(folders: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """The searches in the folders, and a line about each that is damaged."""
    found: list[dict[str, Any]] = []
    damaged = []
    for folder in folders:
        try:
            search = read_search(folder)
        except ValueError as error:
            damaged.append(str(error))
        else:
            found += [{"title": folder.resolve().name, "search": search}] if search else []
    return found, damaged


def _render(**values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.filters["loss"] = lambda value: "" if math.isnan(value) else f"{value:.4f}"
    return environment.get_template("page.html").render(**values)


@functools.cache
def _plotly() -> str:
    """The source of plotly.js, packed."""
    from plotly.offline import get_plotlyjs

    return _packed(str(get_plotlyjs()))


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _packed(text: str) -> str:
    """Text for a script tag: it is a third as long, and nothing in it can end the tag."""
    return base64.b64encode(gzip.compress(text.encode(errors="replace"), 6, mtime=0)).decode()
