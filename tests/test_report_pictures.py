"""The pictures of a report, and what a run's own picture shares with them: values, colors, smoothing, limits, marks."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from distopt.job.drawing import COLORS, beyond, limits, smoothed
from distopt.report import curves, layers, rates
from distopt.report.colors import GRAY, styles
from distopt.report.comparison import Row, draw
from distopt.report.figure import Figure, apart, numbers, thinned
from distopt.report.find import Finder
from distopt.report.grouping import DataSet, by_data
from distopt.report.page import write_report
from distopt.report.search import Search, read_search
from distopt.report.search import draw as search_figure
from tests.harness.run_folders import write_rows, write_run

NAN, INF = math.nan, math.inf


def test_smoothing_neither_lags_nor_moves_a_line() -> None:
    """An exponential mean showed a spike of step 10 at step 11, and a validation loss far below the training's."""
    line = np.linspace(5.0, 1.0, 400)
    assert smoothed(line) == pytest.approx(line, abs=1e-12)  # at both ends, too
    spike = np.ones(400)
    spike[200] = 22.0
    raised = np.flatnonzero(smoothed(spike) > 1.5)
    assert raised.tolist() == list(range(190, 211))  # 5 % of the run, around its step
    assert smoothed(spike)[200] == pytest.approx(2.0)
    assert smoothed(steep := np.exp(-np.arange(200) / 3)).max() <= steep.max()  # no line runs out of its values
    noise = np.random.default_rng(0).normal(size=4000)
    assert smoothed(noise).std() < 0.1 and abs(smoothed(noise)[-1]) < 0.3


@pytest.mark.parametrize("n", [0, 1, 2, 3, 39, 40, 41])
def test_short_runs_are_smoothed_little(n: int) -> None:
    values = [float(i**2) for i in range(n)]
    assert smoothed(values).shape == (n,)
    if n < 40:
        assert smoothed(values) == pytest.approx(values)


def test_gaps_are_bridged_but_a_curve_ends_where_its_values_end() -> None:
    values = [NAN, 2.0, INF, 2.0, NAN]
    assert smoothed(values)[1] == 2.0 and np.isnan(smoothed(values)[[0, 2, 4]]).tolist() == [True, True, True]
    long = np.full(100, 3.0)
    long[[0, 50, 98, 99]] = NAN
    assert smoothed(long)[50] == 3.0 and np.isnan(smoothed(long)).nonzero()[0].tolist() == [0, 98, 99]
    assert smoothed([3e38, 1e308, 1.7e308])[2] == pytest.approx(1.7e308)
    assert smoothed([1e30] + [2.0] * 99)[-1] == pytest.approx(2.0)


def test_limits_leave_out_only_what_would_flatten_the_rest() -> None:
    """Of up to 51 points the second largest was the limit, so that the worst always left the picture."""
    assert limits([[2.0, 3.0, 4.0, 4.7]]) == (2.0, 4.7)
    assert limits([]) == limits([[NAN, INF]]) == (0.0, 1.0)
    assert limits([[3.0]])[0] == 3.0 < limits([[3.0]])[1]
    decays = 2.0 + 4 * np.exp(-np.arange(1000) / 20)
    low, high = limits([decays])
    assert low == pytest.approx(2.0) and high < 3.0
    assert limits([decays, decays, [1e30] * 9])[1] == high
    assert limits([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]], behind=[[0.5, 9.0, NAN]]) == (0.5, 4.0)


def test_each_part_above_an_axis_has_a_mark() -> None:
    assert beyond([5.0, 6.0, 1.0, 1.0, 9.0, 1.0], 4.0) == [1, 4]
    assert beyond([1.0, 9.0, 5.0], 4.0) == [1, 2]  # the curve ends there
    assert beyond([1.0, NAN, INF], 4.0) == [2] and beyond([], 4.0) == []


def test_thinning_keeps_the_peaks() -> None:
    values = np.zeros(10_000)
    values[[1234, 8000]] = 5.0, -7.0
    values[50] = NAN
    kept = thinned(values, 100)
    assert len(kept) <= 100 and {0, 1234, 8000, 9999} <= {*kept.tolist()} and (np.diff(kept) > 0).all()
    assert thinned(values[:100], 100).tolist() == list(range(100))


def test_names_do_not_overlap() -> None:
    heights = apart([(9, 1.0), (9, 1.01), (9, 1.0), (9, 2.0), (3, 1.0), (9, NAN)], 0.0, 2.0)
    there = sorted(heights[:4])
    assert min(np.diff(there)) >= 2.0 * 15 / 340 - 1e-9 and there[-1] == 2.0
    assert heights[4] == 1.0 and math.isnan(heights[5])  # another place; no end
    assert max(apart([(1, 9.0)] * 5, 0.0, 2.0)) == 2.0
    assert apart([(1, 0.0)] * 3, 0.0, 340.0) == [0.0, 15.0, 30.0]


def dataset(folder: Path) -> DataSet:
    (only,) = by_data(Finder([folder]).find())
    return only


def style_of(data: DataSet) -> dict[str, Any]:
    return styles(data, sorted({run.optimizer for run in data.runs}))


def valid(figure: Figure) -> Figure:
    """Plotly knows every option of it."""
    go.Figure(data=figure.data, layout=figure.layout)
    return figure


@pytest.fixture
def several(tmp_path: Path) -> DataSet:
    """Two optimizers with two learning rates each, one of them with three seeds; one run diverged."""
    finals = {("adamw", 0.1): (3.0, 2.0, 2.5), ("adamw", 0.2): (4.0,), ("lamb", 0.3): (1.0,), ("lamb", 0.1): (NAN,)}
    for (optimizer, lr), of_seeds in finals.items():
        for seed, final in enumerate(of_seeds):
            write_run(tmp_path / f"{optimizer}-{lr}-{seed}", optimizer, lr, seed, final)
    return dataset(tmp_path)


def test_the_color_is_the_optimizer_and_the_dash_the_rate(several: DataSet) -> None:
    found = {group.label: (style.color, style.dash) for group, style in style_of(several).items()}
    dashes = {name: dash for name, (_, dash) in found.items()}
    assert {name: color for name, (color, _) in found.items()} == {
        "lamb, lr=0.3": COLORS[1],
        "adamw, lr=0.1": COLORS[0],
        "adamw, lr=0.2": COLORS[0],
        "lamb, lr=0.1": COLORS[1],
    }
    assert dashes["adamw, lr=0.1"] == dashes["lamb, lr=0.1"] == "solid" and len({*dashes.values()}) == 3


def of(figure: Figure, group: str, mode: str) -> list[dict[str, Any]]:
    return [trace for trace in figure.data if trace["legendgroup"] == group and trace["mode"] == mode]


def test_curves_are_the_losses(several: DataSet) -> None:
    figure = valid(curves.loss(several, style_of(several)))
    raw, smooth = of(figure, "adamw, lr=0.2", "lines")
    assert raw["y"] == smooth["y"] == [5.0, 4.0, 3.0] and raw["opacity"] < 1  # too few steps to smooth
    (points,) = of(figure, "adamw, lr=0.2", "markers")
    assert (points["x"], points["y"]) == ([0, 3], [6.0, 4.0])
    assert len(of(figure, "adamw, lr=0.1", "lines")) == 2 * 3  # of each seed
    place = figure.data.index(points)
    assert {by: axis["x"][place] for by, axis in figure.axes.items()} == {
        "step": [0.0, 3.0],
        "tokens": [0.0, 30.0],
        "seconds": [0.0, pytest.approx(0.3)],
    }
    names = [trace["text"][0].strip() for trace in figure.data if trace["mode"] == "text"]
    assert names == [group.label for group in several.groups]


def test_a_run_that_diverged_has_a_cross_and_its_name_at_the_top(several: DataSet) -> None:
    figure = curves.loss(several, style_of(several))
    validation, cross = of(figure, "lamb, lr=0.1", "markers")
    assert (cross["marker"]["symbol"], cross["x"], cross["y"]) == ("x", [3.0], [3.0])
    assert (validation["x"], validation["y"]) == ([0.0], [6.0])  # it was not evaluated again


def test_what_is_above_the_axis_has_a_mark_with_its_value(tmp_path: Path) -> None:
    write_run(tmp_path / "a", steps=1)
    row = {"step": 1, "lr": 0.1, "grad_norm": 1.0, "tokens": 1, "tokens_per_second": 1.0}
    losses = [19.0 if step == 200 else 2.0 + math.exp(-step / 40) for step in range(1, 401)]
    rows = [{**row, "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    write_rows(tmp_path / "a" / "metrics.jsonl", rows)
    figure = valid(curves.loss(data := dataset(tmp_path), style_of(data)))
    (mark,) = of(figure, "adamw", "markers+text")
    high = figure.layout["yaxis"]["range"][1]
    assert high < 2.9 and mark["x"] == [200.0, 1.0] and mark["customdata"] == numbers([19.0, 2.0 + math.exp(-1 / 40)])
    assert mark["text"] == ["\u200219"]  # of the highest
    assert mark["marker"]["symbol"] == "triangle-up" and mark["y"][0] < high
    raw = of(figure, "adamw", "lines")[0]["y"]
    assert min(raw) > figure.layout["yaxis"]["range"][0]  # nothing below


def test_of_many_runs_the_best_of_each_optimizer_have_a_name(tmp_path: Path) -> None:
    for i in range(7):
        write_run(tmp_path / f"adamw-{i}", "adamw", 0.1 + i, 0, 3.0 + i)
        write_run(tmp_path / f"lamb-{i}", "lamb", 0.1 + i, 0, 9.5 - i)
    many = dataset(tmp_path)
    figure = valid(curves.loss(many, style_of(many)))
    assert {trace["legendgroup"] for trace in figure.data} == {"others", "adamw, lr=0.1", "lamb, lr=6.1"}
    assert {trace["line"]["color"] for trace in of(figure, "others", "lines")} == {GRAY}
    assert len(of(figure, "others", "lines")) == 12  # without raw lines


def test_gradient_norms_are_those_of_each_step_on_a_logarithmic_axis(several: DataSet) -> None:
    figure = valid(curves.norms(several, style_of(several)))
    raw, _ = of(figure, "adamw, lr=0.2", "lines")
    assert (raw["x"], raw["y"]) == ([1, 2, 3], [0.5, 1.0, 1.5])
    assert figure.layout["yaxis"]["type"] == "log"
    low, high = figure.layout["yaxis"]["range"]
    assert low < math.log10(0.5) and high > math.log10(1.5)
    assert of(figure, "lamb, lr=0.1", "lines")[0]["y"] == [0.5, 1.0, None]


def test_learning_rates_have_the_means_of_their_seeds(several: DataSet) -> None:
    colors = {"adamw": COLORS[0], "lamb": COLORS[1]}
    drawn = rates.by_lr(several, style_of(several), colors)
    assert drawn is not None
    points, above = of(valid(drawn), "lamb", "markers")
    assert (points["x"], points["y"]) == ([0.3], [1.0])
    assert above["x"] == [0.1] and above["customdata"] == [["lamb, lr=0.1", "1 of 1 diverged"]]
    (points,) = of(drawn, "adamw", "markers")
    assert (points["x"], points["y"]) == ([0.1, 0.2], [2.5, 4.0])
    assert points["error_y"]["array"] == [0.5, None] and [n for _, n in points["customdata"]] == [3, 1]
    low, high = drawn.layout["yaxis"]["range"]
    assert low < 1.0 and high > 4.0
    one = DataSet("", [group for group in several.groups if group.label == "adamw, lr=0.1"])
    assert rates.by_lr(one, style_of(one), colors) is None


def test_layers_are_those_of_the_best_run_of_each_optimizer(several: DataSet) -> None:
    (figure,) = layers.layers(several.groups)
    valid(figure)
    assert [trace["name"] for trace in figure.data] == ["lamb, lamb-0.3-0", "adamw, adamw-0.1-1"]
    assert [trace["visible"] for trace in figure.data] == [True, False]
    second = figure.data[1]
    assert second["x"] == ["1", "3"] and second["y"] == ["a", "b"]
    assert second["z"] == [numbers([-1.0, math.log10(0.2)]), numbers([math.log10(2.0), NAN])]
    assert layers.best(several.groups, "trust_ratio") == []


def test_a_comparison_has_every_seed(tmp_path: Path) -> None:
    figure = valid(draw([Row("adamw", "lr=1", [2.0, 2.2]), Row("lamb", "", [3.0, INF])]))
    seeds, average, others, above = figure.data
    assert seeds["x"] == [2.0, 2.2] and average["x"] == [2.1]
    assert average["error_x"]["array"] == [pytest.approx(0.141421)]
    assert others["x"] == [3.0] and above["text"] == ["diverged"]


def trials(folder: Path, directions: list[str], *rows: tuple[str, list[float] | None]) -> Search:
    """What `hydra/sweeper=optuna` writes of a search."""
    written = [
        {"number": i, "state": state, "values": values, "params": {"lr": 0.5 + i, "kind": "<b>"}}
        for i, (state, values) in enumerate(rows)
    ]
    (folder / "trials.json").write_text(json.dumps({"directions": directions, "trials": written}))
    search = read_search(folder)
    assert search is not None
    return search


def test_a_search_has_every_trial_and_the_best_so_far(tmp_path: Path) -> None:
    rows = [("complete", [3.0]), ("complete", [2.0]), ("pruned", [2.5]), ("fail", None), ("complete", [INF])]
    search = trials(tmp_path, ["minimize"], *rows, ("complete", [1.5]), ("running", None))
    assert search.about == ("4 ended, 1 stopped early, 1 failed, 1 running. The best is #5: 1.5 with lr=5.5, kind=<b>")
    done, pruned, best = valid(search_figure(search)).data
    assert (done["x"], done["y"]) == ([0.0, 1.0, 4.0, 5.0], [3.0, 2.0, 3.0, 1.5])
    assert done["marker"]["symbol"] == ["circle", "circle", "triangle-up", "circle"]
    assert done["text"][2] == "#4: inf; lr=4.5, kind=&lt;b&gt;"
    assert (pruned["x"], pruned["y"], best["y"]) == ([2.0], [2.5], [3.0, 2.0, 2.0, 1.5])


def test_a_search_for_two_values_shows_one_by_the_other(tmp_path: Path) -> None:
    search = trials(tmp_path, ["minimize", "maximize"], ("complete", [3.0, 1.0]), ("pruned", None), ("running", None))
    (points,) = valid(search_figure(search)).data
    assert (points["x"], points["y"]) == ([3.0], [1.0]) and search.about == "1 ended, 1 stopped early, 1 running"
    assert valid(search_figure(trials(tmp_path, ["maximize"], ("running", None)))).data[0]["y"] == []
    write_run(tmp_path / "0")
    assert "<p>1 trial: 1 running.</p>" in write_report(tmp_path, tmp_path / "report").read_text()
    with pytest.raises(ValueError, match=r"trials\.json is no search \(.*a trial has no value.*\); remove it"):
        trials(tmp_path, ["minimize"], ("complete", None))


def test_plotly_reads_no_text_of_ours_as_html(tmp_path: Path) -> None:
    write_run(tmp_path / "<b>$x^$ %{y}", config={"optimizer": {"_target_": "a.<i>b</i>", "lr": 1.0}}, about={})
    data = dataset(tmp_path)
    for figure in (curves.loss(data, style_of(data)), *layers.layers(data.groups)):
        assert "<b>" not in str([trace.get("name") for trace in figure.data])
        assert all("<b>" not in trace["meta"]["run"] for trace in figure.data if "meta" in trace)


ODD: dict[str, list[dict[str, float]]] = {
    "one step": [{"loss": 3.0}],
    "no finite loss": [{"loss": NAN, "grad_norm": INF}] * 2,
    "no gradient": [{"loss": 2.0, "grad_norm": 0.0}] * 2,
    "no rate and no time": [{"loss": 2.0, "lr": 0.0, "tokens_per_second": 0.0}] * 3,
    "a rate that is nan": [{"loss": 2.0, "lr": NAN}] * 2,
    "huge losses": [{"loss": 1e30}, {"loss": 1.7e308, "grad_norm": 1e300}, {"loss": -1.7e308}],
    "equal losses": [{"loss": 2.0}] * 50,
}


@pytest.mark.parametrize("rows", ODD.values(), ids=ODD)
def test_whatever_is_in_a_run_is_drawn(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    """Without a warning, which would be an error here."""
    write_run(tmp_path / "b", "lamb", lr=0.3)
    write_run(tmp_path / "a")
    row = {"lr": 0.1, "grad_norm": 1.0, "tokens": 1, "tokens_per_second": 1.0}
    write_rows(tmp_path / "a" / "metrics.jsonl", [{"step": step, **row, **own} for step, own in enumerate(rows, 1)])
    data = dataset(tmp_path)
    lr = rates.by_lr(data, style_of(data), dict.fromkeys(("adamw", "lamb"), GRAY))
    for figure in (curves.loss(data, style_of(data)), curves.norms(data, style_of(data)), lr):
        if figure:
            valid(figure)
            low, high = figure.layout["yaxis"]["range"]
            assert low < high and json.dumps(asdict(figure), allow_nan=False)
