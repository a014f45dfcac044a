"""The report of real runs: what stands on the page and in the pictures is what the runs measured."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from PIL import Image
from torch import nn

import distopt
from distopt.diagnostics import by_layer
from distopt.report import find_runs, grouped, write_report
from distopt.report.__main__ import main
from tests import jobs


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A sweep of two optimizers, one of them with two seeds, trained on two ranks."""
    with TemporaryDirectory() as name:
        root = Path(name)
        jobs.write_text(root)
        for job, (optimizer, seed) in enumerate([("lamb", 0), ("lamb", 1), ("momentum", 0)]):
            where = f"hydra.run.dir=runs/sweep/{job}"
            words = [*jobs.overrides(optimizer=optimizer, seed=str(seed)), "optimizer.lr=0.05", where]
            assert [ended.code for ended in jobs.run(root, words, 2)] == [0, 0]
        yield root / "runs"


def test_runs_are_read_and_grouped(folder: Path) -> None:
    runs = find_runs(folder)
    assert [run.name for run in runs] == ["sweep/0", "sweep/1", "sweep/2"]
    assert [run.optimizer for run in runs] == ["lamb", "lamb", "momentum"]
    groups = {group.runs[0].optimizer: group for group in grouped(runs)}
    assert [len(groups[name].runs) for name in ("lamb", "momentum")] == [2, 1]
    lamb = groups["lamb"]
    assert lamb.final == pytest.approx(sum(run.final for run in lamb.runs) / 2)  # the median of two
    assert lamb.spread == (min(run.final for run in lamb.runs), max(run.final for run in lamb.runs))
    finals = [group.final for group in grouped(runs)]
    assert finals == sorted(finals)
    run = runs[0]
    assert run.train[-1]["step"] == 12 and run.train[-1]["tokens"] == 12 * 8 * 16
    assert 0 < run.train[0]["seconds"] < run.train[-1]["seconds"]
    assert run.lr == pytest.approx(0.05)
    assert run.validation[0]["step"] == 0 and run.validation[0]["seconds"] == 0.0


def test_a_run_says_what_each_layer_does_and_how_it_is_started(folder: Path) -> None:
    lamb, _, momentum = find_runs(folder)
    assert [row["step"] for row in lamb.layers] == [6, 12]
    last = lamb.layers[-1]
    assert set(last["grad_norm"]) >= {"transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"}
    total = math.sqrt(sum(norm**2 for norm in last["grad_norm"].values()))
    assert total == pytest.approx(lamb.train[-1]["grad_norm"], rel=1e-4)
    # Biases and norms take no trust ratio.
    assert "transformer.wte.weight" in last["trust_ratio"] and "transformer.ln_f.bias" not in last["trust_ratio"]
    assert "trust_ratio" not in momentum.layers[-1]
    words = shlex.split(lamb.command)
    assert {"-m", "distopt.train", "optimizer=lamb", "--num_processes"} <= set(words)
    assert any(word.startswith("hydra.run.dir=") for word in words)


def test_the_page_needs_no_other_file(folder: Path, tmp_path: Path) -> None:
    page = write_report(folder, tmp_path / "report").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    for group in grouped(find_runs(folder)):
        assert group.label in page and f"{group.final:.4f}" in page
    for name in ("loss_by_step", "loss_by_tokens", "loss_by_seconds", "grad_norm", "layers_grad_norm"):
        with Image.open(tmp_path / "report" / f"{name}.png") as picture:
            assert len(set(picture.convert("L").resize((64, 64)).tobytes())) > 4, name  # something is drawn
    assert (tmp_path / "report" / "layers_trust_ratio.png").is_file()
    assert "optimizer._target_" in page and "distopt.train" in page


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_a_folder_without_runs_says_so(
    tmp_path: Path, make: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs"
    if make == "empty":
        path.mkdir()
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = {"missing": "no such folder", "empty": "holds no run that has trained a step"}[make]
    assert capsys.readouterr().err.startswith("distopt: error:") and said in find_error(path)


def find_error(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        find_runs(path)
    return str(raised.value)


def test_a_run_that_has_only_begun_is_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation_loss": 5.0}) + "\n")
    with pytest.raises(ValueError, match="no run that has trained"):
        find_runs(tmp_path)


@pytest.mark.parametrize("optimizer", [distopt.LAMB, distopt.LARS])
def test_trust_ratios_are_those_that_were_applied(optimizer: type[distopt.ShardedOptimizer]) -> None:
    """By the update itself: |step| = lr * ratio * |direction|."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    opt = optimizer(distopt.param_groups(model, weight_decay=0.0), lr=0.1)
    model(torch.randn(3, 5)).square().sum().backward()
    before, grad = model.weight.detach().clone(), model.weight.grad.clone()  # type: ignore[union-attr]
    opt.step()
    ratio = by_layer(model, opt)["trust_ratio"]["weight"]
    moved = (before - model.weight.detach()).norm()
    if optimizer is distopt.LAMB:
        assert moved == pytest.approx(0.1 * before.norm().item(), rel=1e-5)
        direction = grad / (grad.abs() + 1e-6)
        assert ratio == pytest.approx((before.norm() / direction.norm()).item(), rel=1e-4)
    else:
        # A step of 1e-4 of weights that float32 rounds to 1e-8.
        assert moved == pytest.approx(0.1 * ratio * grad.norm().item(), rel=1e-3)
    assert "bias" not in by_layer(model, opt)["trust_ratio"]
    assert by_layer(model, opt, clipped=0.5)["grad_norm"]["weight"] == pytest.approx(2 * grad.norm().item(), rel=1e-5)
