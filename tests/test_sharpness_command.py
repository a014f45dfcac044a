"""`python -m distopt.sharpness`: its files, the same values on every engine, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import jobs


def command(cwd: Path, words: list[str], world: int) -> list[jobs.Ended]:
    """The command on real ranks: the harness starts `distopt.train.main`, which is replaced by ours."""
    return jobs.run(cwd, words, world, _instead)


def _instead() -> None:
    import distopt.train
    from distopt.sharpness.__main__ import main

    distopt.train.main = main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    jobs.write_text(folder)
    jobs.train(folder, name="tiny", train__steps="4")
    return folder


FEW = ["--eigenvalues", "2", "--iterations", "6", "--draws", "2", "--steps", "2", "--points", "3", "--plane", "3"]


def values(folder: Path, world: int, *words: str) -> dict[str, Any]:
    ended = command(folder, ["runs/tiny", *FEW, *words], world)
    assert [rank.code for rank in ended] == [0] * world, [rank.err for rank in ended]
    assert all(len(line) <= 80 for line in ended[0].out.splitlines()[:6]) and not any(rank.out for rank in ended[1:])
    return json.loads((folder / "runs" / "tiny" / "sharpness.json").read_text())


@pytest.mark.matrix
def test_the_values_are_the_same_on_every_engine(trained: Path) -> None:
    """Rounding of float32 for losses; its root, for products by differences of gradients."""
    expected = values(trained, 1)
    assert expected["worst_loss"] > expected["loss"] and expected["eigenvalues"][0] > 0
    assert 0 < (trained / "runs" / "tiny" / "sharpness.png").stat().st_size < 60_000
    for engine, world in (("ddp", 2), ("zero1", 2), ("fsdp2", 2)):
        found = values(trained, world, "--engine", engine)
        for name in ("loss", "worst_loss", "noisy_loss"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4), (engine, name)
        for name in ("eigenvalues", "trace"):
            assert found[name] == pytest.approx(expected[name], rel=2e-2, abs=1e-2), (engine, name)


REFUSED = {
    "nowhere": ("nowhere",),
    "runs --rho 0": ("--rho must be a number > 0, got 0",),
    "runs --eigenvalues 9 --iterations 3": ("--iterations must be an integer >= 9, got 3",),
    "runs --points 4": ("--points must be an odd number >= 3", "got 4"),
    "runs --draws 1": ("--draws must be an integer >= 2, got 1",),
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_refused(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything slow; `one_line_errors`, around it, makes a line of it."""
    from distopt.sharpness.__main__ import _check, _parser, _run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distopt.sharpness", *words.split()])
    with pytest.raises(ValueError) as raised:
        options = _parser().parse_args()
        _check(options)
        _run(options)
    assert all(part in str(raised.value) for part in REFUSED[words])
