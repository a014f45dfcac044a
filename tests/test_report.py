"""What a report reads: real runs, damaged ones, groups of seeds, and what differs between configurations."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import nn

import distopt
from distopt.job.about import commit
from distopt.job.diagnostics import by_layer
from distopt.report.find import Finder
from distopt.report.grouping import Group, by_data, deviation, differing, grouped, mean
from distopt.report.page import write_report
from distopt.report.runs import Run
from distopt.version import __version__
from tests.harness import jobs
from tests.harness.run_folders import write_run

NAN, INF = math.nan, math.inf


def found(*folders: Path) -> list[Run]:
    finder = Finder(folders)
    runs = finder.find()
    assert not finder.damaged
    return runs


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A sweep of two optimizers, one of them trained on two ranks."""
    with TemporaryDirectory() as name:
        root = Path(name)
        jobs.write_text(root)
        for job, (optimizer, world) in enumerate([("lamb", 2), ("momentum", 1)]):
            words = [*jobs.overrides(optimizer=optimizer), "optimizer.lr=0.05", f"hydra.run.dir=runs/sweep/{job}"]
            assert [ended.code for ended in jobs.run(root, words, world)] == [0] * world
        yield root / "runs"


def test_runs_are_read(folder: Path) -> None:
    runs = found(folder)
    assert [run.name for run in runs] == ["sweep/0", "sweep/1"]
    assert [run.optimizer for run in runs] == ["lamb", "momentum"]
    run = runs[0]
    assert run.train[-1]["step"] == 12 and run.train[-1]["tokens"] == 12 * 8 * 16
    assert 0 < run.train[0]["seconds"] < run.train[-1]["seconds"]
    assert run.lr == pytest.approx(0.05)
    assert run.validation[0]["step"] == 0 and run.validation[0]["seconds"] == 0.0
    (dataset,) = by_data(runs)
    assert dataset.title == f"text: {folder.parent / 'text.txt'} (1 files), bytes as tokens"
    assert [len(group.runs) for group in dataset.groups] == [1, 1]


def test_a_run_says_what_it_is(folder: Path) -> None:
    about = found(folder)[0].about
    assert {name: about[name] for name in ("model", "tokenizer", "device", "processes", "version")} == {
        "model": "gpt2",
        "tokenizer": "bytes",
        "device": "CPU",
        "processes": 2,
        "version": __version__,
    }
    embedding, block = (256 + 64) * 16, 12 * 16 * 16 + 13 * 16  # of a GPT-2 with tied embeddings
    assert about["parameters"] == embedding + 2 * block + 2 * 16
    assert about["digest"] == found(folder)[1].about["digest"]
    assert about["commit"] == ""  # it ran in no repository
    assert about["began"].startswith("20")
    words = shlex.split(about["command"])
    assert {"train", "optimizer=lamb", "--processes"} <= set(words)
    assert any(word.startswith("hydra.run.dir=") for word in words)


def test_the_commit_is_that_of_the_repository_around_a_folder(tmp_path: Path) -> None:
    import subprocess

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("commit", "-q", "-m", "a")
    git("tag", "-a", "v1", "-m", "v1")
    head = git("rev-parse", "--short=10", "HEAD").strip()
    assert commit(tmp_path) == head
    (tmp_path / "a").write_text("b")
    assert commit(tmp_path) == f"{head}-dirty"


def test_a_run_records_each_parameter(folder: Path) -> None:
    lamb, momentum = found(folder)
    assert [row["step"] for row in lamb.layers] == [6, 12]
    last = lamb.layers[-1]
    assert set(last["grad_norm"]) >= {"transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"}
    total = math.sqrt(sum(norm**2 for norm in last["grad_norm"].values()))
    assert total == pytest.approx(lamb.train[-1]["grad_norm"], rel=1e-4)
    # Biases and norms take no trust ratio.
    assert "transformer.wte.weight" in last["trust_ratio"] and "transformer.ln_f.bias" not in last["trust_ratio"]
    assert "trust_ratio" not in momentum.layers[-1]


def error_of(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        Finder([path]).find()
    return str(raised.value)


STEP = {"step": 1, "loss": 3.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 9, "tokens_per_second": 5.0}
ALARM = {"step": 1, "kind": "dead", "layer": "w", "others": 0, "value": 1.0, "bound": 2.0}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.yaml", "a: [1\nb: }", "config.yaml cannot be read (while parsing"),
        ("config.yaml", "[1, 2]", "config.yaml must be values by name, got [1, 2]"),
        ("config.yaml", "a: &x\n  b: *x\n", "config.yaml is nested too deeply"),
        ("run.json", "[1]", "run.json must be values by name, got [1]"),
        ("run.json", "{", "run.json cannot be read (Expecting property name"),
        ("run.json", "", "run.json cannot be read (Expecting value"),
        ("run.json", '{"choices": "x"}', "run.json: choices must be names by group, got 'x'"),
        ("run.json", '{"init": {"checkpoint": 3}}', "run.json: init must be null, or have a checkpoint and its step"),
        ("run.json", '{"device": 3}', "run.json: device must be a text, got 3"),
        ("run.json", '{"parameters": "x"}', "run.json: parameters must be an integer, got 'x'"),
        (
            "metrics.jsonl",
            {**STEP, "tokens_per_second": None},
            "tokens_per_second of step 1 must be a number, got N",
        ),
        ("metrics.jsonl", {**STEP, "lr": "0.1"}, "metrics.jsonl: lr of step 1 must be a number, got '0.1'"),
        ("metrics.jsonl", {**STEP, "tokens": 10**400}, "metrics.jsonl: tokens of step 1 must be a number, got an int"),
        ("metrics.jsonl", {**STEP, "skipped": "x"}, "metrics.jsonl: skipped of step 1 must be an integer, got 'x'"),
        ("metrics.jsonl", {**STEP, "step": "1"}, "metrics.jsonl:1 is no row of a run, an object with an integer step"),
        ("metrics.jsonl", "3", "metrics.jsonl:1 is no row of a run"),
        ("metrics.jsonl", {"step": 1, "validation_loss": "x"}, "validation_loss of step 1 must be a number, got 'x'"),
        ("layers.jsonl", {"step": 1, "grad_norm": "x"}, "grad_norm of step 1 must be numbers by the name of a param"),
        ("alarms.jsonl", {"step": 1}, "alarms.jsonl: kind of step 1 must be there, got None"),
        ("alarms.jsonl", {**ALARM, "value": "x"}, "alarms.jsonl: value of step 1 must be a number, got 'x'"),
    ],
)
def test_a_damaged_run_is_named(tmp_path: Path, name: str, content: Any, expected: str) -> None:
    """Each was a traceback, or the reason without the name of the file."""
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEP))
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    line = error_of(tmp_path)
    assert line.startswith(str(tmp_path)) and expected in line and "\n" not in line


def test_a_damaged_run_is_named_on_the_page_of_the_others(tmp_path: Path) -> None:
    """One bad run of today must not take the page of all."""
    write_run(tmp_path / "good")
    for name, file, content in (("torn", "run.json", "{"), ("text", "metrics.jsonl", '{"step": 1, "loss": "x"}')):
        write_run(tmp_path / name)
        (tmp_path / name / file).write_text(content)
    (tmp_path / "comparison.json").write_text('[{"name": 1}]')
    page = write_report(tmp_path, tmp_path / "report").read_text()
    assert "1 run." in page
    assert f"{tmp_path / 'torn' / 'run.json'} cannot be read" in page
    assert f"{tmp_path / 'text' / 'metrics.jsonl'}: loss of step 1 must be a number" in page
    assert f"{tmp_path / 'comparison.json'} is no comparison" in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    assert error_of(tmp_path / "a") == f"{tmp_path / 'a'}: no such folder; give a run, a sweep, or a folder of them"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation_loss": 5.0}) + "\n")
    assert "no run that has trained a step" in error_of(tmp_path)


def test_several_folders_are_one_report_and_a_run_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs/10", "runs/9", "other/a", "other/a/checkpoints/no"):
        write_run(Path(name))
    Path("link").symlink_to("other")
    assert [run.name for run in found(Path("runs"), Path("other"), Path("link"))] == ["other/a", "runs/9", "runs/10"]
    assert [run.name for run in found(Path("runs/9"))] == ["9"]


def test_a_run_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    finder = Finder([tmp_path])
    before = finder.find()
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**STEP, "step": 4}) + "\n")
    after = finder.find()
    assert after[0] is before[0] and after[1] is not before[1] and after[1].steps == 4


@pytest.mark.parametrize("finals", [(3.0, NAN, 1.0), (NAN, 1.0, 3.0), (1.0, 3.0, NAN), (1.0, 3.0, INF)], ids=str)
def test_a_seed_that_diverged_is_the_worst(finals: tuple[float, ...], tmp_path: Path) -> None:
    """It neither keeps its earlier loss nor disappears; the mean of the others is told."""
    for seed, final in enumerate(finals):
        write_run(tmp_path / "runs" / str(seed), seed=seed, final=final, steps=3 if math.isfinite(final) else 2)
    write_run(tmp_path / "runs" / "stable", lr=0.2, final=5.0)
    stable, group = grouped(found(tmp_path / "runs"))
    assert stable.label == "adamw, lr=0.2" and group.label == "adamw, lr=0.1"
    assert (group.final, group.bits_per_byte, group.diverged) == (INF, INF, 1)
    page = write_report(tmp_path / "runs", tmp_path / "out").read_text()
    assert "1 diverged: it counts as inf." in page and "did not reach" not in page
    assert ">inf (2.0000 without)<" in page and ">1 of 3 diverged<" in page


def test_means_and_deviations_are_those_of_samples() -> None:
    assert mean([1.0, 3.0, NAN]) == 2.0 and deviation([1.0, 3.0, NAN]) == pytest.approx(math.sqrt(2))
    assert math.isnan(mean([])) and math.isnan(deviation([1.0])) and math.isnan(deviation([1.0, INF]))
    assert mean([1e308, 1e308]) == INF  # and no warning


def labels(groups: list[Group]) -> list[str]:
    return [group.label for group in groups]


def test_labels_have_the_optimizer_and_at_most_three_keys(tmp_path: Path) -> None:
    """A difference that always goes with the optimizer is left to the table; six keys made a label of thirty lines."""
    for i in range(4):
        train = {"steps": 3, "batch_size": 8 * (i // 2), "clip": i % 2, "length": i, "decay": i // 3}
        write_run(tmp_path / str(i), lr=0.1 + i % 2, final=i, config={"train": train})
    write_run(tmp_path / "l", "lamb", 0.1, final=9.0, config={"train": {**train, "steps": 4}})
    assert labels(grouped(found(tmp_path))) == [
        "adamw, lr=0.1, length=0, batch_size=0",
        "adamw, lr=1.1, length=1, batch_size=0",
        "adamw, lr=0.1, length=2, batch_size=8",
        "adamw, lr=1.1, length=3, batch_size=8",
        "lamb, lr=0.1",
    ]


def test_what_a_choice_implies_is_no_difference(tmp_path: Path) -> None:
    """Every key of another engine was a column, with None in most rows."""
    for i, (engine, own) in enumerate([("ddp", {}), ("fsdp2", {"unit_mib": 16}), ("fsdp2", {"unit_mib": 32})]):
        run = write_run(tmp_path / str(i), final=float(i), config={"engine": {"_target_": engine, **own}})
        about = json.loads((run / "run.json").read_text())
        about["choices"] |= {"engine": engine, "experiment": f"e{i}"}
        (run / "run.json").write_text(json.dumps(about))
    runs = found(tmp_path)
    assert differing(runs) == ["engine", "engine.unit_mib"]
    assert differing(runs[:2]) == ["engine"]
    assert labels(grouped(runs[:2])) == ["adamw, engine=ddp", "adamw, engine=fsdp2"]


def test_labels_that_are_alike_get_the_name_of_a_run(tmp_path: Path) -> None:
    for i in range(2):
        write_run(tmp_path / f"a{i}", final=float(i), config={"model": {"path": "x" * 30 + str(i)}})
    assert labels(grouped(found(tmp_path))) == [f"adamw, path={'x' * 23}… (a{i})" for i in range(2)]


def test_other_data_is_another_data_set_ranked_by_bits_per_byte(tmp_path: Path) -> None:
    """A loss of 0.01 nats on chats was the best above a text's 3.6."""
    for i in range(2):
        write_run(tmp_path / f"text{i}", final=3.0 - i, lr=1 + i)
    write_run(tmp_path / "chat", final=0.01, about={"digest": "z", "data": "chats.jsonl", "tokenizer": "/m/llama"})
    write_run(tmp_path / "old", about={}, config={"data": {"path": "book.txt", "tokenizer": None}})
    rows = (tmp_path / "text0" / "metrics.jsonl").read_text()
    (tmp_path / "text0" / "metrics.jsonl").write_text(rows.replace('"bits_per_byte": 6.0', '"bits_per_byte": 1.0'))
    text, *others = by_data(found(tmp_path))
    assert text.title == "text: book.txt (1 files), bytes as tokens" and labels(text.groups)[0] == "adamw, lr=1"
    assert [dataset.title for dataset in others] == ["chats.jsonl, tokenizer llama", "book.txt, bytes as tokens"]


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
