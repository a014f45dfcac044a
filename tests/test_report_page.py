"""The page of a report: one file with everything in it, its tables, its links, and a page of runs that still train."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from distopt.report import table, watch
from distopt.report.__main__ import main
from distopt.report.find import Finder
from distopt.report.grouping import by_data
from distopt.report.page import write_report
from tests.harness.run_folders import ABOUT, write_rows, write_run

NAN = math.nan


def packed(page: str, name: str) -> str:
    """What a script tag of the page contains."""
    (data,) = re.findall(f'<script type="application/octet-stream" id="{name}">(.*?)</script>', page)
    return gzip.decompress(base64.b64decode(data)).decode()


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two optimizers, one of them with two seeds and alarms."""
    root = tmp_path_factory.mktemp("grid")
    write_run(root / "0", final=2.0)
    write_run(root / "1", final=3.0, seed=1)
    write_run(root / "2", "lamb", 0.3, final=4.0, steps=2)
    alarm = {"step": 1, "kind": "dead", "layer": "w", "others": 0, "value": 1.0, "bound": 2.0}
    (root / "2" / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    return root


@pytest.fixture(scope="module")
def page(grid: Path) -> str:
    return write_report(grid, grid / "report").read_text()


def test_the_page_needs_no_other_file_and_no_network(page: str, grid: Path) -> None:
    assert [file.name for file in (grid / "report").iterdir()] == ["report.html"]
    assert "<link" not in page and not re.search(r'<script[^>]* src=|src="|@import|url\(', page)
    assert {*re.findall(r'href="(.*?)"', page)} == {"../0/", "../1/", "../2/"}  # the folders of the runs
    assert "Plotly" in packed(page, "plotly")
    assert len(page) < 2_200_000
    figures = json.loads(packed(page, "figures"))
    assert len(figures) == page.count("<figure>") == 4
    assert [axis["title"] for axis in figures[0]["axes"].values()] == ["step", "tokens", "seconds of training"]


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    body = page[page.index(heading) :].partition("<tbody>")[2].partition("</tbody>")[0]
    cells = [re.findall("<td.*?>(.*?)</td>", row, re.DOTALL) for row in re.findall("<tr.*?</tr>", body, re.DOTALL)]
    return [[unescape(re.sub("<.*?>", "", cell, flags=re.DOTALL)).strip() for cell in row] for row in cells]


def test_results_have_mean_deviation_and_n(page: str) -> None:
    assert rows(page, "<h2>text: book.txt (1 files), bytes as tokens</h2>") == [
        ["adamw, lr=0.1", "2", "5.0000 ± 1.4142", "2.5000 ± 0.7071", "3", "100", "0", ""],
        ["lamb, lr=0.3", "1", "8.0000", "4.0000", "2", "100", "0", "unfinished"],
    ]
    assert "3 runs, 2 configurations" in page and "1 did not reach its last step." in page


def test_the_table_of_runs_has_what_differs_and_says_the_rest_once(page: str) -> None:
    for title, value in (("model", "gpt2"), ("parameters", "12,345"), ("device", "CPU"), ("commit", "0123456789")):
        assert f"<dt>{title}:</dt> <dd>{value}</dd>" in page
    assert rows(page, "<h2>All runs</h2>")[1] == [
        "1",
        "adamw",
        "0.1",
        "1",
        "6.0000",
        "3.0000",
        "3",
        "30",
        "finished",
        "0.3 s",
        "100",
    ]
    assert rows(page, "<h2>Alarms</h2>") == [["2", "1", "dead", "w", "0", "1", "2"]]
    assert rows(page, "<h2>Commands</h2>")[0] == ["0", "distopt train"]


def test_a_phase_says_where_it_started(tmp_path: Path) -> None:
    """From the run before, and that from the one before it; a run from scratch has an empty cell."""
    before = {"checkpoint": "/any/runs/pretrain/checkpoints/step_00001000", "step": 1000, "init": None}
    start = {"checkpoint": "/any/runs/sharp/checkpoints/step_00000400", "step": 400, "init": before}
    write_run(tmp_path / "anneal", about={**ABOUT, "init": start})
    write_run(tmp_path / "pretrain", about={**ABOUT, "init": None})
    made = table.all_runs(Finder([tmp_path]).find(), tmp_path)
    place = made.columns.index("started from")
    assert {row[0].text: row[place].text for row in made.rows} == {
        "anneal": "sharp, step 400 < pretrain, step 1,000",
        "pretrain": "",
    }


def test_whatever_differs_has_a_column(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config={"train": {"steps": 3, "batch_size": 8}})
    write_run(tmp_path / "b", config={"train": {"steps": 3, "batch_size": 16}}, about={**ABOUT, "device": "H200"})
    made = table.all_runs(Finder([tmp_path]).find(), tmp_path)
    assert {"device", "batch_size"} < {*made.columns} and "version" in made.common
    place = made.columns.index("batch_size")
    assert [row[place] for row in made.rows] == [("8", 8.0, None), ("16", 16.0, None)]
    assert made.names == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("value", "form", "expected"),
    [
        (1234567, ",d", ("1,234,567", 1234567.0)),
        (NAN, ".4f", ("", math.inf)),
        (-math.inf, "g", ("-inf", 1e308)),
        (1e300, ".4f", ("1e+300", 1e300)),
        (0.00025, "g", ("0.00025", 0.00025)),
    ],
)
def test_numbers_are_sorted_by_value_and_what_is_missing_last(value: float, form: str, expected: Any) -> None:
    assert table.number(value, form)[:2] == expected


def test_a_hostile_name_is_text(tmp_path: Path) -> None:
    """A $ began a formula, and a name that is not UTF-8 has no bytes in a page."""
    name = "$x^$ </script><b>\"'%{y}"
    write_run(tmp_path / name.replace("/", "_"), config={"note": "</script>"})
    write_run(tmp_path / "\udcff", lr=0.5, config={"note": "<!--"}, about={**ABOUT, "command": "</script>"})
    page = write_report(tmp_path, tmp_path / "report").read_text()
    assert "$x^$ &lt;_script&gt;&lt;b&gt;" in page and "<b>" not in page.partition("<script")[0]
    links = {unquote(link, errors="surrogateescape") for link in re.findall(r'href="(.*?)"', page)}
    assert links == {f"../{path.name}/" for path in tmp_path.iterdir() if path.name != "report"}
    assert json.loads(packed(page, "figures"))
    for names in re.findall(r'data-runs="(.*?)"', page):
        assert json.loads(unescape(names))


def report(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["report", *map(str, words)])
    main()


def test_the_command_takes_several_folders_and_by_default_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a"))
    write_run(Path("other/a"), lr=0.2)
    report(monkeypatch)
    report(monkeypatch, "other", "--out", "both", "runs")
    assert capsys.readouterr().out == "report: runs/report/report.html\nreport: both/report.html\n"
    page = Path("both/report.html").read_text()
    assert "<h1>other, runs</h1>" in page and 'href="../runs/a/">runs/a<' in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["missing"], "no such folder"),
        (["."], "no run that has trained a step"),
        ([".", "--watch", "0"], "--watch must be a number in [1, 3600], got 0.0; the seconds between two looks"),
        ([".", "--watch", "nan"], "--watch must be a number in [1, 3600], got nan"),
        (["missing", "--watch"], "missing: no such folder"),
    ],
    ids=str,
)
def test_what_cannot_be_reported_is_one_line(
    tmp_path: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        report(monkeypatch, *words)
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith("distopt: error:") and said in error and error.count("\n") == 1


class Night:
    """A clock that sleeping moves, while things happen: one at the end of each sleep."""

    def __init__(self, *events: Callable[[], Any]) -> None:
        self.now, self.slept, self.events = 0.0, list[float](), iter(events)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        next(self.events, lambda: None)()

    def watch(self, root: Path, said: list[str]) -> Path | None:
        return watch.watch(Finder([root]), root / "report", 60.0, said.append, self.sleep, lambda: self.now)


def ctrl_c() -> None:
    raise KeyboardInterrupt


def test_a_watched_page_is_written_when_a_run_changes(tmp_path: Path) -> None:
    said, pages = list[str](), list[str]()

    def look() -> None:
        pages.append((tmp_path / "report" / "report.html").read_text())

    night = Night(
        lambda: write_run(tmp_path / "a"), look, look, lambda: write_run(tmp_path / "b", lr=0.7), look, ctrl_c
    )
    assert night.watch(tmp_path, said) == tmp_path / "report" / "report.html"
    assert said[0] == "waiting for the first step of a run" and said[1].endswith("Ctrl-C ends this")
    assert [page.count("data-every") for page in pages] == [1, 1, 1]
    assert pages[0] == pages[1] and "1 run." in pages[0] and "2 runs." in pages[2]
    look()
    assert (
        "data-every" not in pages[-1].partition("<script")[0] and "2 runs." in pages[-1]
    )  # what stays does not reload


def test_watching_ends_by_itself(tmp_path: Path) -> None:
    said = list[str]()
    night = Night()
    assert night.watch(tmp_path, said) is None
    assert night.now == watch.IDLE and said[-1] == "no run has changed for 60 minutes"
    assert night.slept == [60.0] * 60


def test_a_page_that_takes_long_is_written_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a")
    night, written = Night(ctrl_c), list[Any]()

    def slow(*args: Any) -> Path:
        night.now += 30.0
        written.append(args)
        return tmp_path

    monkeypatch.setattr(watch, "write_page", slow)
    night.watch(tmp_path, [])
    assert night.slept == [300.0] and [len(args) for args in written] == [3, 2]


def test_sections_are_by_data(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", about={**ABOUT, "digest": "z", "data": "chats.jsonl"})
    page = write_report(tmp_path, tmp_path / "report").read_text()
    assert len(by_data(Finder([tmp_path]).find())) == 2
    assert "Losses of different data or tokenizers are not comparable" in page
    assert "<h2>chats.jsonl, bytes as tokens</h2>" in page


def test_samples_are_on_the_page_as_text_and_a_run_that_stopped_early_is_not_unfinished(tmp_path: Path) -> None:
    """A model may write what HTML would take for a tag."""
    stopped = {**ABOUT, "stopped_early": "validation_loss has not improved in 3 evaluations"}
    folder = write_run(tmp_path / "a", config={"train": {"steps": 9}}, about=stopped)
    old = {"step": 0, "prompt": "1+1=", "sample": "old", "ended": False, "answer": "2", "match": False}
    right = {"step": 3, "prompt": "1+1=", "sample": "2", "ended": True, "answer": "2", "match": True}
    wrong = {"step": 3, "prompt": "2+2=", "sample": "<script>alert(1)</script>", "ended": True, "answer": "4"}
    write_rows(folder / "samples.jsonl", [old, right, {**wrong, "match": False}])
    (run,) = Finder([tmp_path]).find()
    assert (run.unfinished, run.exact_match, len(run.samples)) == (False, 0.5, 2)
    made = table.all_runs([run], tmp_path)
    assert made.common["exact match"] == "50.0%" and made.common["state"] == "stopped early"
    page = write_report(tmp_path, tmp_path / "out").read_text()
    assert "<h2>Samples</h2>" in page and "&lt;script&gt;alert(1)" in page and "<script>alert(1)" not in page
    assert "the same" in page and "did not reach" not in page and ">old<" not in page
    write_rows(folder / "samples.jsonl", [{"step": 1, "prompt": "a"}])
    with pytest.raises(ValueError, match=r"samples\.jsonl: sample of step 1 must be a text, got None"):
        Finder([tmp_path]).find()
