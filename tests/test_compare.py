"""`experiment=compare`: the search against a function whose minimum is known, and real sweeps that are killed."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hydra_plugins.hydra_coordinate_sweeper._descent import Descent, Losses, Trial, kept, tune
from hydra_plugins.hydra_coordinate_sweeper._options import CoordinateSweeperConf
from hydra_plugins.hydra_coordinate_sweeper._rows import check, rows
from hydra_plugins.hydra_coordinate_sweeper._table import Result, printed, verdict, write
from omegaconf import OmegaConf

from distopt.job.config import CONF
from distopt.report.page import write_report
from tests.harness import jobs

LADDERS = ((0.0, 0.01, 0.1), ((0.9, 0.9), (0.9, 0.95), (0.9, 0.99)))

# Anybody's program: a bowl over the learning rate's scale and one further setting, which diverges at large scales.
SCRIPT = """
import os

import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    with open("ran.txt", "a") as file:
        file.write(f"{cfg.optimizer.name} {cfg.lr_scale} {cfg.steps} {cfg.seed}\\n")
    if os.path.exists("broken"):
        raise OSError("the disk is full")
    if cfg.lr_scale > 5:
        raise ValueError("10 steps in a row had no finite gradient")
    return (cfg.lr_scale - cfg.optimizer.best) ** 2 + cfg.optimizer.decay + 1 / cfg.steps + 0.01 * cfg.seed

if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults: [{optimizer: a}, _self_, {override hydra/sweeper: coordinate}]
lr_scale: 1.0
steps: 10
seed: 0
hydra:
  mode: MULTIRUN
  sweep: {dir: out}
  sweeper:
    {steps: steps, rungs: [10, 20], trials: 4, max_batch_size: 3, seeds: [1, 2],
    coordinates: {optimizer.decay: [0.0, 0.1]}}
"""


def driven(descent: Descent, trials: int, rungs: list[int], seeds: list[int], loss: Any) -> list[list[Trial]]:
    """Every list of runs that the search asks for."""
    rounds: list[list[Trial]] = []
    losses: dict[Trial, float] = {}
    search = tune(descent, trials, rungs, seeds)
    asked = next(search)
    while True:
        rounds.append(asked)
        losses.update({trial: loss(trial) for trial in asked})
        given: Losses = losses
        try:
            asked = search.send(given)
        except StopIteration:
            return rounds


def bowl(trial: Trial) -> float:
    scale, decay, betas = trial.point
    return math.log(scale / 4.0) ** 2 + abs(decay - 0.1) + 10 * abs(betas[1] - 0.99)


def test_the_search_finds_the_minimum_of_a_bowl_with_equal_runs() -> None:
    """Within the last factor, sqrt(3) or less, of the best scale, and at the best rung of each ladder."""
    rounds = driven(Descent(LADDERS, (1.0, 0.0, (0.9, 0.9)), 3.0), 14, [40, 120], [1, 2, 3], bowl)
    trials = [trial for asked in rounds for trial in asked]
    assert len(set(trials)) == len(trials)  # nothing is run twice
    assert [sum(t.steps == n and t.seed is None for t in trials) for n in (40, 120)] == kept(14, [40, 120]) == [14, 5]
    last = rounds[-1]
    assert [trial.seed for trial in last] == [1, 2, 3] and len({trial.point for trial in last}) == 1
    scale, *others = last[0].point
    assert abs(math.log(scale / 4.0)) < math.log(3.0) / 2 and others == [0.1, (0.9, 0.99)]


@pytest.mark.parametrize("trials", [1, 2, 3, 9, 300])
def test_every_budget_is_used_up_whatever_the_losses(trials: int) -> None:
    """Also where every run diverges, and where there is no other coordinate than the learning rate."""
    for ladders, start in ((LADDERS, (1.0, 0.0, (0.9, 0.9))), ((), (1.0,))):
        for loss in (lambda trial: math.inf, lambda trial: 0.0, lambda trial: -min(trial.point[0], 100.0)):
            rounds = driven(Descent(ladders, start, 3.0), trials, [5], [0], loss)
            assert sum(map(len, rounds[:-1])) == trials or trials == 300  # which ends at steps of 2 %
            assert len(rounds[-1]) == 1


def test_the_longer_runs_decide() -> None:
    """A point that is best only in short runs is not the one that is compared."""
    short_best = driven(
        Descent((), (1.0,), 3.0), 6, [10, 20], [7], lambda t: abs(t.point[0] - (9.0 if t.steps == 10 else 3.0))
    )
    (last,) = short_best[-1]
    assert (last.point, last.steps, last.seed) == (pytest.approx((3.0,)), 20, 7)


def test_a_row_that_estimates_its_learning_rate_searches_the_rest() -> None:
    """With as many runs as the others, as long as there are values left: here 2 + 3 x 3 points less some corners."""
    rounds = driven(Descent(LADDERS, (1.0, 0.0, (0.9, 0.9)), 1.0), 30, [40], [1], bowl)
    points = [trial.point for asked in rounds for trial in asked]
    assert {scale for scale, *_ in points} == {1.0} and 5 <= len(set(points)) <= 9
    assert points[-1] == (1.0, 0.1, (0.9, 0.99))


def script(folder: Path) -> list[str]:
    group = folder / "conf" / "optimizer"
    group.mkdir(parents=True)
    (folder / "script.py").write_text(SCRIPT)
    (folder / "conf" / "config.yaml").write_text(CONFIG)
    for name, best in {"a": 2.0, "b": 0.5}.items():
        (group / f"{name}.yaml").write_text(f"name: {name}\nbest: {best}\ndecay: 0.0\n")
    return [sys.executable, str(folder / "script.py")]


def test_a_sweep_is_resumed_and_says_what_it_found(tmp_path: Path) -> None:
    """A failure that is no divergence ends it, a divergence does not; the losses on disk are not computed again."""
    command, ran = script(tmp_path), tmp_path / "ran.txt"
    (tmp_path / "broken").touch()
    failed = jobs.launch(tmp_path, [], command, 60)
    assert failed.code == 1 and "a run failed, and has not diverged: the disk is full" in failed.err
    (tmp_path / "broken").unlink()
    ran.unlink()
    ended = jobs.launch(tmp_path, [], command, 60)
    assert ended.code == 0, ended.err
    assert "comparison: 16 of 16 runs" in ended.err and "min left" in ended.err
    runs = ran.read_text().splitlines()
    assert [sum(line.startswith(name) for line in runs) for name in "ab"] == [8, 8]  # equal budgets
    record = tmp_path / "out" / "losses.jsonl"
    lines = record.read_text().splitlines()
    record.write_text("\n".join([*lines[:9], lines[9][:20]]))  # as if killed while it wrote
    ran.unlink()
    again = jobs.launch(tmp_path, [], command, 60)
    assert again.code == 0 and 0 < len(ran.read_text().splitlines()) < 10
    assert [line for line in again.out.splitlines() if line[:1] in "ab"] == [
        line for line in ended.out.splitlines() if line[:1] in "ab"
    ]
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    # The formula above, at the scales that the search can reach: 1, 3, 1/3, and sqrt(3) of them.
    for row in rows:
        best, scale = {"a": 2.0, "b": 0.5}[row["name"]], float(row["settings"]["lr_scale"])
        assert row["losses"] == pytest.approx([(scale - best) ** 2 + 1 / 20 + 0.01 * seed for seed in (1, 2)])
    assert (tmp_path / "out" / "comparison.md").is_file() and (tmp_path / "out" / "comparison.png").is_file()


def test_the_table_fits_80_columns_and_says_what_is_noise(tmp_path: Path) -> None:
    settings = {"lr_scale": "0.3333", "optimizer.betas": "[0.9,0.99]", "optimizer.weight_decay": "0.001"}
    settings |= {"schedule.warmup_steps": "36"}
    results = [
        Result("worse", settings, [3.0, 3.1, 3.2], [(1.0, 3.0), (3.0, math.inf)]),
        Result("best", settings, [2.0, 2.1, 2.2], [(1.0, 2.0)]),
        Result("near", {}, [2.05, 2.15, 2.25], []),
        Result("diverged", settings, [math.inf, 2.0, 2.0], []),
    ]
    text = printed(results)
    assert max(map(len, text.splitlines())) <= 80
    assert [re.split(" +", line)[0] for line in text.splitlines() if line[0] not in " W"] == [
        "best",
        "near",
        "worse",
        "diverged",
    ]
    assert f"{statistics.mean([2.0, 2.1, 2.2]):.4f}  0.1000" in text
    assert verdict(results) == "Within two standard errors of best: near, at 3 seeds."
    write(tmp_path, results)
    assert (tmp_path / "comparison.png").stat().st_size < 60_000


def other_runs(cwd: Path) -> None:
    """Runs that joblib's process has had before, with another optimizer, SAM and dropout."""
    from distopt.train import job

    own = sys.argv
    for name, changes in {
        "one": {"optimizer": "sgd", "sam": "on"},
        "two": {"model__config__resid_pdrop": "0.1"},
    }.items():
        sys.argv = ["distopt.train", *jobs.overrides(name=name, seed="7", train__steps="3", **changes)]
        job()
    sys.argv = own


def test_a_run_after_others_in_one_process_is_the_run_alone(tmp_path: Path) -> None:
    """So that a comparison may be run by hydra/launcher=joblib, which starts a process once for many runs."""
    jobs.write_text(tmp_path)
    found = []
    before: Any
    for name, before in (("alone", ()), ("after", (other_runs, tmp_path))):
        ended = jobs.start(tmp_path, jobs.overrides(name=name, train__steps="6"), 1, *before).wait(280.0)
        assert ended[0].code == 0, ended[0].err
        rows = jobs.metrics(tmp_path / "runs" / name)
        found.append([row[key] for row in rows for key in ("loss", "grad_norm", "validation_loss") if key in row])
    assert found[0] == found[1] and len(found[0]) > 12
    assert (tmp_path / "runs" / "one" / "metrics.jsonl").is_file()


REFUSED = {
    "trials": (0, "hydra.sweeper.trials must be >= 1, got 0"),
    "rungs": ([120, 40], "hydra.sweeper.rungs must be increasing numbers of steps, >= 1, got [120, 40]"),
    "seeds": ([1, 1], "hydra.sweeper.seeds must be different integers >= 0, got [1, 1]"),
    "factor": (1.0, "hydra.sweeper.factor must be > 1, got 1"),
    "choices": ([], "hydra.sweeper.choices is empty"),
    "gradients": ({"sam": 0}, "hydra.sweeper.gradients must be >= 1"),
    "max_batch_size": (0, "hydra.sweeper.max_batch_size must be >= 1, or null, got 0"),
}


def test_rungs_that_would_give_a_row_fewer_gradients_are_refused() -> None:
    with pytest.raises(Exception, match=r"rungs must be multiples of 2, the gradients of a step of sam, got \[41\]"):
        check(CoordinateSweeperConf(rungs=[41], gradients={"sam": 2}))


@pytest.mark.parametrize("name", REFUSED)
def test_numbers_out_of_bounds_are_refused(name: str) -> None:
    value, message = REFUSED[name]
    with pytest.raises(Exception, match=re.escape(message)):
        check(CoordinateSweeperConf(**{name: value}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hydra.sweeper.choices=[adamv]", "there is no optimizer adamv. Did you mean adam"),
        pytest.param(
            "+hydra.sweeper.own.sgd={optimizer.alpha: [1]}",
            "hydra.sweeper.own.sgd: sgd has no optimizer.alpha",
            marks=pytest.mark.matrix,
        ),
        pytest.param("lr_scale=3", "lr_scale=3: the comparison sets lr_scale; leave it out", marks=pytest.mark.matrix),
    ],
)
def test_what_does_not_exist_is_refused_before_anything_runs(words: str, message: str, tmp_path: Path) -> None:
    ended = jobs.python("-m", "distopt.train", "experiment=compare", words, cwd=tmp_path)
    assert ended.code == 1 and "Traceback" not in ended.err
    assert message in ended.err.splitlines()[-1] and not list(tmp_path.rglob("losses.jsonl"))


def composed(words: list[str]) -> Any:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("train", overrides=["experiment=compare", *words], return_hydra_config=True)


@pytest.fixture(scope="module")
def options() -> CoordinateSweeperConf:
    given: Any = OmegaConf.to_container(composed([]).hydra.sweeper)
    return CoordinateSweeperConf(**given)


def test_every_optimizer_is_compared_with_its_own_main_parameter(options: CoordinateSweeperConf) -> None:
    """A new file of conf/optimizer joins by itself; an entry for one that does not exist would be refused."""
    cfg = composed([])
    names = {file.stem for file in (CONF / "optimizer").glob("*.yaml")}
    assert options.choices is None and set(options.own) <= names | set(options.variants)
    assert names - set(options.own) - set(options.exclude) == {"sgd"}, (
        "an entry in hydra.sweeper.own of compare.yaml is missing"
    )
    assert cfg.schedule.final_lr_ratio == 0.0 and cfg.train.steps == options.rungs[-1]
    # What averages its iterates has no decay, and what estimates its rate is left at it.
    averaging, estimating = rows(replace(options, choices=["sgd_schedule_free", "prodigy"]), sorted(names), composed)
    assert averaging.scaled and composed([*averaging.words]).schedule._target_.endswith("warmup_constant")
    assert not estimating.scaled and estimating.start[0] == 1.0


def test_every_row_computes_as_many_gradients(options: CoordinateSweeperConf) -> None:
    """Counted in steps of the stepper that the job makes of a row: SAM's takes two passes, an optimizer's one."""
    names = [file.stem for file in (CONF / "optimizer").glob("*.yaml")]
    for row in rows(replace(options, choices=["adamw", "sam"]), names, composed):
        cfg = composed([*row.words])
        weight = torch.ones(3, requires_grad=True)
        stepper = instantiate(cfg.optimizer)([weight])
        stepper = instantiate(cfg.sam)(stepper) if cfg.sam else stepper
        closure = Counting(weight)
        for steps in options.rungs:
            before = closure.count
            for _ in range(row.steps(Trial(row.start, steps))):
                stepper.step(closure)
            assert closure.count - before == steps


class Counting:
    """A closure that counts its gradients."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.count = weight, 0

    def __call__(self) -> torch.Tensor:
        self.count += 1
        self.weight.grad = None
        loss = self.weight.square().sum()
        loss.backward()
        return loss


def test_the_report_shows_the_comparison(tmp_path: Path) -> None:
    run = tmp_path / "0"
    run.mkdir()
    row = {"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 8, "tokens_per_second": 8.0}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write(tmp_path, [Result("adamw", {"lr_scale": "3"}, [2.0, 2.2], [(1.0, 2.0)])])
    page = write_report(tmp_path, tmp_path / "report").read_text()
    assert "<h2>Comparison</h2>" in page and "2.1000" in page and "lr_scale=3" in page
