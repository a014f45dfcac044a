"""What a run writes and draws: metrics.jsonl over interruptions, and curves of whatever is in it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from distopt.data.accuracy import Counts
from distopt.job.curves import draw_curves
from distopt.job.drawing import COLORS
from distopt.job.metrics import Monitor
from distopt.job.records import METRICS, read_metrics
from distopt.job.totals import Totals


def monitor(folder: Path, first_step: int = 0, steps: int = 8, main: bool = True, track: Any = None) -> Monitor:
    return Monitor(
        folder,
        first_step,
        steps,
        totals=Totals(first_step, {"tokens": 64 * first_step, "target_tokens": 8 * first_step}),
        main=main,
        track=track or (lambda *_: None),
    )


def step(m: Monitor, loss: float = 2.0, lr: float = 0.1, grad_norm: float = 1.5, applied: bool = True) -> None:
    m.start_step()
    m.got_batch(Counts(64, 8))
    m.end_step(loss=loss, lr=lr, grad_norm=grad_norm, applied=applied)


def train_row(number: int, **changes: float) -> dict[str, float]:
    row = {"step": number, "loss": 3.0 / number, "lr": 0.1, "grad_norm": 1.0 / number, "tokens": 64 * number}
    return {**row, "tokens_per_second": 9.0, "skipped": 0, **changes}


def validation_row(number: int, loss: float = 3.0) -> dict[str, float]:
    return {"step": number, "validation_loss": loss, "bits_per_byte": loss / math.log(2)}


def write(folder: Path, rows: list[dict[str, float]], end: str = "") -> None:
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def kept(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """The steps of rows, and their kind."""
    return [(row["step"], "train" if "loss" in row else "validation") for row in rows]


def test_a_step_is_a_line_and_goes_to_the_trackers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracked: list[tuple[int, Mapping[str, float]]] = []
    m = monitor(tmp_path, track=lambda metrics, number: tracked.append((number, metrics)))
    m.write({"validation_loss": 5.0, "bits_per_byte": 7.2})
    step(m, loss=2.5, lr=1e-3, grad_norm=0.5)
    step(m, loss=2.25)
    # What is written is on the disk at once: a killed run has it.
    first, second, third = read_metrics(tmp_path)
    assert first == {"step": 0, "validation_loss": 5.0, "bits_per_byte": 7.2}
    speed = second.pop("tokens_per_second")
    assert speed > 0
    assert 0.0 <= second.pop("data_seconds") < 1.0
    counts = {"tokens": 64, "target_tokens": 8, "skipped": 0}
    assert second == {"step": 1, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, **counts}
    assert (third["step"], third["tokens"]) == (2, 128)
    assert [(number, {"step": number, **metrics}) for number, metrics in tracked] == [
        (row["step"], row) for row in read_metrics(tmp_path)
    ]
    m.say("something happened")
    m.close()
    out, err = capsys.readouterr()
    said, progress = out.splitlines()
    assert (said, err) == ("something happened", "")
    assert progress.startswith("step 2/8  loss 2.2500  ") and "tok/s" in progress and "skipped" not in progress


def test_other_processes_write_and_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = monitor(tmp_path, main=False, track=pytest.fail)
    m.write({"validation_loss": 5.0})
    step(m, applied=False)
    m.say("something happened")
    m.close()
    assert m.skipped_in_a_row == 1  # but all of them stop together, so all of them count
    assert (list(tmp_path.iterdir()), capsys.readouterr()) == ([], ("", ""))


def test_skipped_steps_are_counted_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = monitor(tmp_path)
    in_a_row = []
    for applied in (True, False, False, True, False):
        step(m, loss=2.0 if applied else math.nan, grad_norm=1.0 if applied else math.inf, applied=applied)
        in_a_row.append(m.skipped_in_a_row)
    m.close()
    assert in_a_row == [0, 1, 2, 0, 1]
    assert [row["skipped"] for row in read_metrics(tmp_path)] == [0, 1, 2, 2, 3]
    assert "skipped 3" in capsys.readouterr().out


BOTH = [validation_row(0), *(train_row(n) for n in range(1, 5)), validation_row(4), train_row(5), validation_row(5)]
RESUMED: dict[str, tuple[list[dict[str, float]], str, int, list[tuple[int, str]]]] = {
    # what stands there, a half-written end, the step of the checkpoint, and what stays
    "new run": (BOTH, "", 0, []),
    "from the middle": (BOTH, "", 2, [(0, "validation"), (1, "train"), (2, "train")]),
    # The validation loss of the checkpoint's step is measured again.
    "from a validation": (BOTH, "", 4, [(0, "validation"), *((n, "train") for n in range(1, 5))]),
    "from the end": (BOTH, "", 5, [*kept(BOTH)[:-1]]),
    "half a line": (BOTH[:3], '{"step": 3, "lo', 2, [(0, "validation"), (1, "train"), (2, "train")]),
    "half a line of the checkpoint's step": (BOTH[:2], '{"step": 2', 2, [(0, "validation"), (1, "train")]),
    "a line of zeros": (BOTH[:3], "\0" * 40, 2, [(0, "validation"), (1, "train"), (2, "train")]),
    "metrics lost": ([], "", 4, []),
}


@pytest.mark.parametrize(("rows", "end", "checkpoint", "expected"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_writes_on_after_its_checkpoint(
    tmp_path: Path,
    rows: list[dict[str, float]],
    end: str,
    checkpoint: int,
    expected: list[tuple[int, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path, rows, end)
    m = monitor(tmp_path, first_step=checkpoint)
    step(m)
    m.close()
    assert kept(read_metrics(tmp_path)) == [*expected, (checkpoint + 1, "train")]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]
    assert read_metrics(tmp_path)[-1]["tokens"] == 64 * (checkpoint + 1)
    assert f"step {checkpoint + 1}/8" in capsys.readouterr().out


def test_the_count_of_skipped_steps_continues(tmp_path: Path) -> None:
    """It began at 0 again in a resumed run, so that the number at the end was that of the last leg only."""
    write(tmp_path, [train_row(1), train_row(2, skipped=1), train_row(3, skipped=2), validation_row(3)])
    m = monitor(tmp_path, first_step=3)
    assert m.skipped_in_a_row == 0
    step(m)
    step(m, applied=False)
    m.close()
    assert [row.get("skipped") for row in read_metrics(tmp_path)] == [0, 1, 2, 2, 3]


def test_no_metrics_are_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_the_tokens_per_second_leave_evaluation_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens in 2 s, whatever happened between the end of the step before and the start of this one."""
    clock = iter([100.0, 101.0, 102.0, 900.0, 901.0, 904.0])  # of the batch, too
    m = monitor(tmp_path)
    monkeypatch.setattr("distopt.job.metrics.time.perf_counter", lambda: next(clock))
    step(m)
    step(m)
    monkeypatch.undo()
    m.close()
    assert [row["tokens_per_second"] for row in read_metrics(tmp_path)] == [32.0, 16.0]
    assert m.seconds == 6.0


DRAWN: dict[str, list[dict[str, float]]] = {
    "a run": BOTH,
    "one step": [validation_row(0), train_row(1), validation_row(1)],
    "no validation": [train_row(1), train_row(2)],
    "no step": [validation_row(0)],
    "nothing": [],
    "a skipped step": [train_row(1), train_row(2, loss=math.nan, grad_norm=math.nan, skipped=1), train_row(3)],
    "an infinite step": [train_row(1), train_row(2, loss=math.inf, grad_norm=math.inf, skipped=1), train_row(3)],
    "only skipped steps": [train_row(n, loss=math.nan, grad_norm=math.inf) for n in (1, 2)],
    "a validation loss that is nan": [train_row(1), validation_row(1, math.nan)],
    "no gradient": [train_row(1, grad_norm=0.0), train_row(2, grad_norm=0.0)],
    "no learning rate": [train_row(1, lr=0.0), train_row(2, lr=0.0)],
    "huge losses": [train_row(1, loss=1e30), train_row(2, loss=3e38, grad_norm=1e38)],
}


@pytest.mark.parametrize("rows", DRAWN.values(), ids=DRAWN)
def test_curves_are_drawn_of_whatever_there_is(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    """Without a warning, which would be an error here."""
    if rows:
        write(tmp_path, rows)
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 500


def colours(folder: Path, rows: list[dict[str, float]]) -> set[str]:
    """The colours of the curves that are in the picture."""
    write(folder, rows)
    with Image.open(draw_curves(folder)) as image:
        found = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 24)}
    known = dict(zip(("train", "validation", "lr", "norm"), COLORS))
    return {name for name, colour in known.items() if ImageColor.getrgb(colour) in found}


def test_every_curve_is_in_the_picture(tmp_path: Path) -> None:
    rows = [validation_row(0), *(train_row(n) for n in range(1, 50)), validation_row(49, 2.0)]
    assert colours(tmp_path, rows) == {"train", "validation", "lr", "norm"}
    gap = [train_row(25, loss=math.nan, grad_norm=math.nan)]
    assert colours(tmp_path, rows[:25] + gap + rows[26:]) == {"train", "validation", "lr", "norm"}
