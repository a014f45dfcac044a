"""The folders of checkpoints: complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from distopt.checkpoint import (
    best_checkpoint,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from distopt.optim import schedules as schedules
from tests.harness.checkpoints import sealed, trained
from tests.harness.distributed import run


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 100, 200 and 300."""
    first = save_checkpoint(checkpoint_path(tmp_path / "all", 100), *trained(steps=1), extra={"step": 100})
    for step in (200, 300):
        shutil.copytree(first, checkpoint_path(first.parent, step))
    return first.parent


def test_the_newest_complete_one_is_found_and_newer_broken_ones_are_told(checkpoints: Path) -> None:
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_00000300", [])
    os.truncate(next((checkpoints / "step_00000300").glob("*/shard-00000.bin")), 10)
    size, _ = json.loads((checkpoints / "step_00000300" / "manifest.json").read_text())["files"]["shard-00000.bin"]
    truncated = f"step_00000300: shard-00000.bin is 10 bytes, the manifest says {size}"
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_00000200", [truncated])
    next((checkpoints / "step_00000200").glob("*/index.json")).unlink()
    missing = "step_00000200: index.json is missing"
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_00000100", [truncated, missing])
    (checkpoints / "step_00000100" / "manifest.json").unlink()
    path, lines = latest_checkpoint(checkpoints)
    assert path is None and lines[2] == "step_00000100: it has no manifest.json, so it was not written to its end"
    assert latest_checkpoint(checkpoints / "nothing") == (None, [])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "files": 3}', '{"format": 7, "files": {}}', "\0"])
def test_a_manifest_that_cannot_be_read_is_one_line(checkpoints: Path, content: str) -> None:
    (checkpoints / "step_00000300" / "manifest.json").write_text(content)
    path, (line,) = latest_checkpoint(checkpoints)
    assert path == checkpoints / "step_00000200"
    assert line.startswith("step_00000300: it") and "\n" not in line
    with pytest.raises(ValueError, match=r"step_00000300 is not a complete checkpoint: it"):
        load_checkpoint(checkpoints / "step_00000300", *trained(steps=0))


def test_what_a_killed_save_has_left_is_told_unless_it_was_saved_before(checkpoints: Path) -> None:
    for name in ("step_00000300/01234567", "step_00000350/01234567", "step_00000050/01234567"):
        (checkpoints / name).mkdir(parents=True)
    line = "step_00000350: it has no manifest.json, so it was not written to its end"
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_00000300", [line])


def test_a_broken_one_is_replaced(checkpoints: Path) -> None:
    path = checkpoints / "step_00000300"
    os.truncate(next(path.glob("*/training.pt")), 0)
    save_checkpoint(path, *trained(steps=1))
    assert latest_checkpoint(checkpoints) == (path, [])
    assert len(os.listdir(checkpoints)) == 3


def test_pruning_keeps_the_newest_complete_ones_and_what_is_newer(checkpoints: Path) -> None:
    for name in ("step_00000400", "step_00000500", "step_00000050", "step_00000090"):
        shutil.copytree(checkpoints / "step_00000100", checkpoints / name)
    for name in ("step_00000400", "step_00000050"):
        (checkpoints / name / "manifest.json").unlink()
    os.truncate(checkpoints / "step_00000500" / "manifest.json", 10)
    (checkpoints / "notes").mkdir()
    prune_checkpoints(checkpoints, keep=3)
    assert sorted(os.listdir(checkpoints)) == [
        "notes",
        "step_00000100",
        "step_00000200",
        "step_00000300",
        "step_00000500",
    ]
    prune_checkpoints(checkpoints, keep=1)
    assert sorted(os.listdir(checkpoints)) == ["notes", "step_00000300", "step_00000500"]
    for keep in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="keep must be an integer >= 1"):
            prune_checkpoints(checkpoints, keep=keep)


def test_the_best_one_and_multiples_stay(checkpoints: Path) -> None:
    losses = {100: 3.0, 200: 1.0, 300: 1.0, 400: float("inf"), 500: None, 600: "0.5", 700: 2.0, 800: True}
    for step, loss in losses.items():
        path = checkpoint_path(checkpoints, step)
        if not path.exists():
            shutil.copytree(checkpoints / "step_00000100", path)
        sealed(path, lambda content, _, loss=loss: content.update(extra={"validation_loss": loss}))
    assert best_checkpoint(checkpoints, "validation_loss") == checkpoints / "step_00000200"  # the first of equals
    assert best_checkpoint(checkpoints, "accuracy") is best_checkpoint(checkpoints / "none", "accuracy") is None
    os.truncate(next((checkpoints / "step_00000200").glob("*/index.json")), 1)
    assert best_checkpoint(checkpoints, "validation_loss") == checkpoints / "step_00000300"  # the best complete one
    prune_checkpoints(checkpoints, keep=2, keep_every=400, best="validation_loss")
    assert sorted(os.listdir(checkpoints)) == [f"step_00000{step}" for step in (300, 400, 600, 700, 800)]
    prune_checkpoints(checkpoints, keep=1)  # nothing stays by itself
    assert os.listdir(checkpoints) == ["step_00000800"]
    with pytest.raises(ValueError, match="keep_every must be an integer >= 1 or null, got 0"):
        prune_checkpoints(checkpoints, keep=1, keep_every=0)


def test_a_folder_that_is_not_ours_is_left_with_a_warning(checkpoints: Path) -> None:
    (checkpoints / "step_00000001").mkdir()
    (checkpoints / "step_00000001" / "thesis.tex").touch()
    with pytest.warns(RuntimeWarning, match="step_00000001 could not be removed: it is not a checkpoint"):
        prune_checkpoints(checkpoints, keep=1)
    assert sorted(os.listdir(checkpoints)) == ["step_00000001", "step_00000300"]


def only_rank_0_prunes(folder: Path) -> None:
    if dist.get_rank() == 1:
        prune_checkpoints(folder, keep=1)
        assert len(os.listdir(folder)) == 3
    dist.barrier()
    if dist.get_rank() == 0:
        prune_checkpoints(folder, keep=1)
        assert os.listdir(folder) == ["step_00000300"]


def test_only_rank_0_prunes(checkpoints: Path) -> None:
    run(2, only_rank_0_prunes, checkpoints)
