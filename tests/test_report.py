"""The report of real runs: the page and the pictures show the measurements of the runs."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import distopt
from distopt.job.diagnostics import by_layer
from distopt.report import Group, find_runs, grouped, pictures, write_report
from distopt.report.__main__ import main
from tests.harness import jobs


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
    runs, damaged = find_runs(folder)
    assert not damaged
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


def test_a_run_records_each_parameter_and_its_command(folder: Path) -> None:
    (lamb, _, momentum), _ = find_runs(folder)
    assert [row["step"] for row in lamb.layers] == [6, 12]
    last = lamb.layers[-1]
    assert set(last["grad_norm"]) >= {"transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"}
    total = math.sqrt(sum(norm**2 for norm in last["grad_norm"].values()))
    assert total == pytest.approx(lamb.train[-1]["grad_norm"], rel=1e-4)
    # Biases and norms take no trust ratio.
    assert "transformer.wte.weight" in last["trust_ratio"] and "transformer.ln_f.bias" not in last["trust_ratio"]
    assert "trust_ratio" not in momentum.layers[-1]
    words = shlex.split(lamb.command)
    assert {"train", "optimizer=lamb", "--processes"} <= set(words)
    assert any(word.startswith("hydra.run.dir=") for word in words)


def test_the_page_needs_no_other_file(folder: Path, tmp_path: Path) -> None:
    page = write_report(folder, tmp_path / "report").read_text()
    assert not re.search(r'(src|href)="(?!data:)', page)
    for group in grouped(find_runs(folder)[0]):
        assert group.label in page and f"{group.final:.4f}" in page
    written = {f"{name}.png" for name in ("loss_by_step", "loss_by_tokens", "loss_by_seconds", "grad_norm")}
    written |= {f"layers_{name}.png" for name in ("grad_norm_lamb", "grad_norm_momentum", "trust_ratio_lamb")}
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"report.html", *written}  # one rate: no lr.png
    assert page.count("<figure>") == len(written)
    assert "optimizer._target_" in page and "distopt train" in page


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_a_folder_without_runs_is_refused(
    tmp_path: Path, make: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs"
    if make == "empty":
        path.mkdir()
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = {"missing": "no such folder", "empty": "has no run that has trained a step"}[make]
    assert capsys.readouterr().err.startswith("distopt: error:") and said in find_error(path)


def find_error(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        find_runs(path)
    return str(raised.value)


STEP = {"step": 1, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 9, "tokens_per_second": 5.0}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.yaml", "a: [1\nb: }", "config.yaml cannot be read (while parsing"),
        ("config.yaml", "[1, 2]", "config.yaml must be values by name, got [1, 2]"),
        ("run.json", "[1]", "run.json must be values by name, got [1]"),
        ("run.json", "{", "run.json cannot be read (Expecting property name"),
        ("run.json", '{"choices": "x"}', "run.json: choices must be names by group, got 'x'"),
        (
            "metrics.jsonl",
            {**STEP, "tokens_per_second": None},
            "tokens_per_second of step 1 must be a number, got N",
        ),
        ("metrics.jsonl", {**STEP, "lr": "0.1"}, "metrics.jsonl: lr of step 1 must be a number, got '0.1'"),
        ("metrics.jsonl", {**STEP, "step": "1"}, "metrics.jsonl:1 is no row of a run, an object with an integer step"),
        ("metrics.jsonl", "3", "metrics.jsonl:1 is no row of a run"),
        ("metrics.jsonl", {"step": 1, "validation_loss": "x"}, "validation_loss of step 1 must be a number, got 'x'"),
        ("layers.jsonl", {"step": 1, "grad_norm": "x"}, "grad_norm of step 1 must be numbers by the name of a param"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    """Each was a traceback, or the reason without the name of the file."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP))
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    line = find_error(tmp_path)
    assert line.startswith(str(tmp_path)) and expected in line and "\n" not in line


def test_a_damaged_run_is_named_on_the_page_of_the_others(tmp_path: Path) -> None:
    """One bad run of today must not take the page of all; nor a $ in a name, which begins a formula in matplotlib."""
    for name, config in (
        ("good", "optimizer: {_target_: distopt.SGD, lr: 1}\n"),
        ("$x^$ \\frac$", "optimizer: {lr: $y_}\n"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(STEP))
        (tmp_path / name / "config.yaml").write_text(config)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text(json.dumps(STEP))
    (tmp_path / "torn" / "run.json").write_text("{")
    page = write_report(tmp_path, tmp_path / "report").read_text()
    assert "good" in page and "frac" in page
    assert f"{tmp_path / 'torn' / 'run.json'} cannot be read" in page


def test_a_run_without_a_step_is_left_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation_loss": 5.0}) + "\n")
    with pytest.raises(ValueError, match="no run that has trained"):
        find_runs(tmp_path)


NAN = math.nan


def write_run(
    folder: Path, optimizer: str, lr: float, seed: int, final: float, steps: int = 3, skipped: int = 0
) -> None:
    """A run of so many steps, of 10 tokens in a tenth of a second each; a final loss of nan ends it before."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "optimizer": {"_target_": optimizer, "lr": lr}, "train": {"steps": 3}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps({"command": "go", "choices": {"optimizer": optimizer}}))
    rows = [{"step": 0, "validation_loss": 6.0, "bits_per_byte": 8.0}]
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 6.0 - step, "lr": lr, "grad_norm": step / 2, "tokens": 10 * step}
        rows.append({**row, "tokens_per_second": 100.0, "skipped": skipped})
    if math.isfinite(final):
        rows.append({"step": steps, "validation_loss": final, "bits_per_byte": 2 * final})
    else:
        rows[-1]["grad_norm"] = final
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    layers = [{"step": 1, "grad_norm": {"a": lr, "b": final}}, {"step": 3, "grad_norm": {"a": 2 * lr}}]
    (folder / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in layers))


@pytest.mark.parametrize("finals", [(3.0, NAN, 1.0), (NAN, 1.0, 3.0), (1.0, 3.0, NAN), (1.0, 3.0, math.inf)], ids=str)
def test_a_seed_that_diverged_is_the_worst(finals: tuple[float, ...], tmp_path: Path) -> None:
    """In every column, and in the picture of learning rates; it neither keeps its earlier loss nor disappears."""
    for seed, final in enumerate(finals):
        made = {"steps": 2, "skipped": 1} if not math.isfinite(final) else {"steps": 3, "skipped": int(2 * final)}
        write_run(tmp_path / "runs" / str(seed), "adamw", 0.1, seed, final, **made)
    (group,) = grouped(find_runs(tmp_path / "runs")[0])
    assert (group.final, group.bits_per_byte, group.steps, group.skipped) == (3.0, 6.0, 3, 2)
    assert group.spread == (1.0, math.inf) and group.tokens_per_second == pytest.approx(100.0)
    page = write_report(tmp_path / "runs", tmp_path / "out").read_text()
    (row,) = re.findall('<tr class="best">.*?</tr>', page, re.DOTALL)
    assert re.findall('number">(.*?)</td>', row) == ["3", "3.0000", "1.0000 to inf", "6.0000", "3", "100", "2"]
    assert "1 diverged: it counts as inf." in page and "1 did not reach its last step." in page
    assert lines(pictures.by_lr, [group]) == {"adamw": ([0.1], [3.0])}


def lines(fill: Callable[..., None], groups: Sequence[Group], **options: str) -> dict[str, tuple[list[float], ...]]:
    """The lines of a picture, by label; those without one by index."""
    axis = Figure().subplots()
    fill(axis, groups=groups, **options)
    return {str(line.get_label()): tuple(map(list, line.get_data())) for line in axis.get_lines()}


@pytest.fixture
def groups(tmp_path: Path) -> list[Group]:
    """Two optimizers with two learning rates each, one of them with three seeds."""
    finals = {("adamw", 0.1): (3.0, 2.0, 2.5), ("adamw", 0.2): (4.0,), ("lamb", 0.3): (1.0,), ("lamb", 0.1): (NAN,)}
    for (optimizer, lr), of_seeds in finals.items():
        for seed, final in enumerate(of_seeds):
            write_run(tmp_path / f"{optimizer}-{lr}-{seed}", optimizer, lr, seed, final)
    return grouped(find_runs(tmp_path)[0])


def test_curves_are_the_losses(groups: list[Group]) -> None:
    labels = ["lamb, lr=0.3", "adamw, lr=0.1", "adamw, lr=0.2", "lamb, lr=0.1"]
    assert [group.label for group in groups] == labels
    for by, unit in {"step": 1.0, "tokens": 10.0, "seconds": 0.1}.items():
        drawn = lines(pictures.curves, groups, by=by)
        assert len(drawn) == 2 * 6  # training and validation of every run
        for label, final in zip(labels, (1.0, 3.0, 4.0)):  # the dots; a name for the first of the seeds
            assert drawn[label] == (pytest.approx([0.0, 3 * unit]), [6.0, final])
        assert drawn["lamb, lr=0.1"] == ([0.0], [6.0])  # which diverged before it was evaluated again
        steps, training = drawn["_child0"]
        assert steps == pytest.approx([unit, 2 * unit, 3 * unit])
        assert training == pytest.approx([5.0, (0.9 * 5 + 4) / 1.9, (0.81 * 5 + 0.9 * 4 + 3) / 2.71])


def test_learning_rates_have_the_medians_of_their_seeds(groups: list[Group]) -> None:
    assert lines(pictures.by_lr, groups) == {"lamb": ([0.1, 0.3], [math.inf, 1.0]), "adamw": ([0.1, 0.2], [2.5, 4.0])}


def test_of_many_runs_the_best_of_each_optimizer_are_named(tmp_path: Path) -> None:
    for i in range(7):
        write_run(tmp_path / f"adamw-{i}", "adamw", 0.1 + i, 0, 3.0 + i)
        write_run(tmp_path / f"lamb-{i}", "lamb", 0.1 + i, 0, 9.5 - i)
    many = grouped(find_runs(tmp_path)[0])
    for fill, options in ((pictures.curves, {"by": "step"}), (pictures.norms, {})):
        named = [label for label in lines(fill, many, **options) if not label.startswith("_")]
        assert sorted(named) == ["adamw, lr=0.1", "lamb, lr=6.1"]


def test_gradient_norms_are_those_of_each_step(groups: list[Group]) -> None:
    drawn = lines(pictures.norms, groups)
    assert len(drawn) == 6 and drawn["adamw, lr=0.2"] == ([1, 2, 3], [0.5, 1.0, 1.5])


def test_layers_are_those_of_the_best_run_of_each_optimizer(groups: list[Group], tmp_path: Path) -> None:
    shown = pictures.best(groups, "grad_norm")
    assert [run.name for run in shown] == ["lamb-0.3-0", "adamw-0.1-1"]
    axis = Figure().subplots()
    pictures.layers(axis, shown[1], "grad_norm")
    (image,) = axis.get_images()
    assert image.get_array().filled(0.0).tolist() == [[0.1, 0.2], [2.0, 0.0]]  # layer by step; b has no second value
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "3"]
    assert pictures.best(groups, "trust_ratio") == []
    drawn = pictures.draw(tmp_path, groups)
    names = ["loss_by_step", "loss_by_tokens", "loss_by_seconds", "lr", "grad_norm"]
    assert [file.stem for file in drawn.values()] == [*names, "layers_grad_norm_lamb", "layers_grad_norm_adamw"]


def test_labels_show_differences_within_an_optimizer(tmp_path: Path) -> None:
    """A difference that always goes with the name is left to the table of differences."""
    for number, (optimizer, lr, steps) in enumerate([("adamw", 0.1, 3), ("adamw", 0.2, 3), ("lamb", 0.1, 4)]):
        write_run(tmp_path / str(number), optimizer, lr, 0, float(number))
        config = json.loads((tmp_path / str(number) / "config.yaml").read_text())
        config["train"]["steps"], config["optimizer"]["beta"] = steps, number % 2
        (tmp_path / str(number) / "config.yaml").write_text(json.dumps(config))
    labels = [group.label for group in grouped(find_runs(tmp_path)[0])]
    assert labels == ["adamw, lr=0.1, optimizer.beta=0", "adamw, lr=0.2, optimizer.beta=1", "lamb, lr=0.1"]


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
    assert by_layer(model, opt)["grad_norm"]["weight"] == pytest.approx(grad.norm().item(), rel=1e-5)
    measured = {model.weight: torch.tensor(3.0)}  # by the step, which may have overwritten the gradients
    assert by_layer(model, opt, measured)["grad_norm"] == {"weight": 3.0}
