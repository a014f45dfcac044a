"""A job on a stream: resumed at another number of processes it goes on with the batches of the unbroken run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distopt.checkpoint.folder import open_checkpoint
from tests.harness import jobs
from tests.harness.jobs import metrics, write_text

STREAM: dict[str, Any] = {
    "data": "stream",
    "data.path": "rows",
    "data.validation_documents": "20",
    "data.shuffle_buffer": "32",
    "data.validation_fraction": None,
    "schedule": "constant",
    "schedule.warmup_steps": None,
    "evaluation.sample_tokens": "0",
    "checkpoint.every": "5",
}


def words(name: str, steps: int, **changes: str | None) -> list[str]:
    return jobs.overrides(**{**STREAM, "name": name, "train.steps": str(steps), **changes})


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows in three files, and the unbroken run of one process."""
    folder = tmp_path_factory.mktemp("stream")
    (folder / "rows").mkdir()
    lines = [json.dumps({"text": line}) for line in write_text(folder).read_text().splitlines()]
    for number in range(3):
        (folder / "rows" / f"{number}.jsonl").write_text("\n".join(lines[number::3]) + "\n")
    (ended,) = jobs.run(folder, words("unbroken", 10))
    assert ended.code == 0, ended.err
    assert "read while it trains" in ended.out and "10 steps of 8 x 16 = 128 tokens: 1,280 tokens\n" in ended.out
    return folder


def losses(cwd: Path, name: str) -> list[float]:
    return [row["loss"] for row in metrics(cwd / "runs" / name) if "loss" in row]


def test_a_run_of_one_process_is_resumed_by_two(cwd: Path) -> None:
    (first,) = jobs.run(cwd, words("resumed", 5))
    assert first.code == 0, first.err
    (checkpoint,) = (cwd / "runs" / "resumed" / "checkpoints").glob("step*")
    bookmarks = open_checkpoint(checkpoint)["extra"]["stream"]
    assert [(bookmark["source"], bookmark["lane"]) for bookmark in bookmarks] == [("", lane) for lane in range(8)]
    second = jobs.run(cwd, words("resumed", 10, engine="fsdp2", **{"train.resume": "auto"}), 2)
    assert [rank.code for rank in second] == [0, 0], second[0].err
    assert losses(cwd, "resumed") == pytest.approx(losses(cwd, "unbroken"), rel=1e-5)
    assert len(losses(cwd, "resumed")) == 10
    checkpoint = max((cwd / "runs" / "resumed" / "checkpoints").glob("step*"))
    assert [bookmark["lane"] for bookmark in open_checkpoint(checkpoint)["extra"]["stream"]] == list(range(8))


def test_what_a_stream_has_not_is_one_line(cwd: Path) -> None:
    mixed = {"a": {"path": "rows", "stream": True, "weight": 1}, "b": {"path": "text.txt", "weight": 1}}
    sources = json.dumps(mixed).replace('"', "")
    commands = [
        words("refused", 5, **{"train.epochs": "2", "train.steps": "null"}),
        jobs.overrides(data="mixture", data__path=None, data__sources=sources, train__steps="null", train__epochs="2"),
        words("refused", 5, **{"data.path": "text.txt"}),
        words("refused", 5, **{"data.shuffle_buffer": "none"}),
    ]
    ended = jobs.one_after_another(cwd, commands)
    expected = [
        "train.epochs=2: how many sequences a stream has",
        "train.epochs=2: how many sequences a stream has",
        "data.path=text.txt has no file of rows to stream",
        "data.shuffle_buffer must be an integer >= 1, got 'none'",
    ]
    for each, message in zip(ended, expected):
        assert each.code == 1 and message in each.err and len(each.err.strip().splitlines()) == 1, each.err
    (prepared,) = jobs.one_after_another(cwd, [words("refused", 5)], "distopt.prepare.prepared")
    assert "data=stream is tokenized while it trains, and has nothing to prepare" in prepared.err
