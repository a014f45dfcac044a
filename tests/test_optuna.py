"""`hydra/sweeper=optuna`: searches that are interrupted, fail and are stopped early, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_accelerate_launcher._alone import alone
from hydra_plugins.hydra_accelerate_launcher._halving import Stopped
from hydra_plugins.hydra_study_sweeper._errors import StudyError
from hydra_plugins.hydra_study_sweeper._samplers import sampler
from hydra_plugins.hydra_study_sweeper._settings import SAMPLERS, OptunaSweeperConf
from hydra_plugins.hydra_study_sweeper._space import Space
from hydra_plugins.hydra_study_sweeper._study import Search, in_sequence, open_study, storage
from hydra_plugins.hydra_study_sweeper.optuna_sweeper import check
from omegaconf import OmegaConf
from optuna.samplers import GridSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from tests.harness import jobs

# Anybody's program: a parabola. It fails for kind=b, or is killed in the job of a number, where it is told to.
SCRIPT = """
import os, hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    number = HydraConfig.get().job.num
    with open("calls", "a") as file:
        file.write(f"{number} {cfg.x} {cfg.kind}\\n")
    if os.environ.get("KILLED") == str(number):
        os._exit(9)
    if os.environ.get("FAILS") == cfg.kind:
        raise ValueError(f"{cfg.kind} is not allowed")
    value = (cfg.x - 2.0) ** 2 + len(cfg.kind)
    return [value, cfg.x] if cfg.both else value

main()
"""
CONFIG = "x: 0.0\nkind: a\nboth: false\nhydra: {sweep: {dir: out}, output_subdir: null}\n"
# What hydra-optuna-sweeper stores under the same name, where it is left over.
LEFT_OVER = """
from hydra.core.config_store import ConfigStore
ConfigStore.instance().store(group="hydra/sweeper", name="optuna", node={"_target_": "of.another"}, provider="old")
"""
RUN = "import runpy, sys; sys.path.append('left_over'); runpy.run_path('script.py', run_name='__main__')"


def program(folder: Path) -> Path:
    left_over = folder / "left_over/hydra_plugins/hydra_optuna_sweeper"
    for below in (folder / "conf", left_over):
        below.mkdir(parents=True)
    (folder / "script.py").write_text(SCRIPT)
    (folder / "conf/config.yaml").write_text(CONFIG)
    (left_over / "config.py").write_text(LEFT_OVER)
    return folder


def search(cwd: Path, *words: str, **environment: str) -> jobs.Ended:
    return jobs.python("-c", RUN, "-m", "hydra/sweeper=optuna", *words, cwd=cwd, **environment)


def calls(cwd: Path) -> list[str]:
    return (cwd / "calls").read_text().splitlines()


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """A process is killed in its third trial: the same command runs that one again, and then those that are missing."""
    whole, cut = program(tmp_path / "whole"), program(tmp_path / "cut")
    words = ["x=interval(-5.0,5.0)", "kind=a,'b, $c'", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler.seed=1"]
    ended = search(whole, *words)
    assert ended.code == 0, ended.err
    assert [line.split()[0] for line in calls(whole)] == list("012345") and len({*calls(whole)}) == 6
    found = yaml.safe_load((whole / "out/optimization_results.yaml").read_text())
    trials = json.loads((whole / "out/trials.json").read_text())["trials"]
    best = min(trials, key=lambda trial: trial["values"][0])
    assert found == {"name": "optuna", "best_params": best["params"], "best_value": best["values"][0]}
    assert f"search: 6 of 6 trials; the best is #{best['number']} " in ended.err

    assert search(cut, *words, KILLED="2").code == 9
    again = search(cut, *words)
    assert "search: 2 of 6 trials were done before" in again.err
    assert calls(cut) == [*calls(whole)[:3], *calls(whole)[2:]]  # the third one twice
    assert json.loads((cut / "out/trials.json").read_text())["trials"] == trials


def test_failed_trials_are_tried_again_with_the_same_values(tmp_path: Path) -> None:
    """Those of a grid too, whose points are counted by trial."""
    cwd = program(tmp_path / "grid")
    words = ["hydra/sweeper/sampler=grid", "x=range(1,3)", "kind=a,b"]
    failed = search(cwd, *words, FAILS="b")
    assert failed.code == 1 and "Traceback" not in failed.err
    told = r"(\d) of 2 trials failed, with hydra.sweeper.max_failure_rate=0.0; the same command tries them again; #\d: "
    match = re.search(rf"^{told}b is not allowed$", failed.err, re.M)
    assert match, failed.err
    ended = search(cwd, *words)
    assert ended.code == 0, ended.err
    done = [line.split(" ", 1)[1] for line in calls(cwd)]
    assert sorted({*done}) == ["1 a", "1 b", "2 a", "2 b"] and len(done) == 4 + int(match[1])
    states = [trial["state"] for trial in json.loads((cwd / "out/trials.json").read_text())["trials"]]
    assert sorted(states) == ["complete"] * 4 + ["fail"] * int(match[1])


def test_two_numbers_have_a_front(tmp_path: Path) -> None:
    cwd = program(tmp_path / "two")
    words = ["hydra/sweeper/sampler=nsgaii", "hydra.sweeper.sampler.population_size=3", "hydra.sweeper.n_trials=4"]
    ended = search(cwd, *words, "x=interval(-5,5)", "both=true", "hydra.sweeper.direction=[minimize,maximize]")
    assert ended.code == 0, ended.err
    found = yaml.safe_load((cwd / "out/optimization_results.yaml").read_text())
    points = [trial["values"] for trial in json.loads((cwd / "out/trials.json").read_text())["trials"]]
    front = [p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)]
    assert sorted(solution["values"] for solution in found["solutions"]) == sorted(front)


# In this process

ONE: dict[str, Any] = {"name": "sweep", "directions": ["minimize"], "configuration": {"steps": 3}, "own": True}


def opened(folder: Path, words: tuple[str, ...] = ("x=interval(0,9)",), seed: int | None = 0, **changes: Any) -> Search:
    options = {**ONE, **changes}
    make, _ = sampler(partial(RandomSampler, seed=seed), dict)
    kept = options.pop("storage", None)
    return Search(open_study(storage(kept, folder), make=make, **options), make, "", read(*words).suggest)


def read(*words: str) -> Space:
    return Space.read(words, None)  # type: ignore[arg-type]


def ended(value: Any, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
    result = JobReturn(status=status)
    result.return_value = value
    return result


@pytest.mark.parametrize("kept", [None, "sqlite"])
def test_the_draws_of_a_resumed_search_are_not_those_of_its_start(tmp_path: Path, kept: str | None) -> None:
    where = kept and f"sqlite:///{tmp_path}/search.db"
    points = []
    for _ in range(2):
        found = opened(tmp_path, storage=where)
        for trial in found.ask(2):
            points.append(trial.params["x"])
            assert found.tell(trial, ended(1.0)) is None
    assert len({*points}) == 4
    (tmp_path / "other").mkdir()
    found = opened(tmp_path / "other")  # without an interruption
    assert [trial.params["x"] for trial in found.ask(4)] == points
    assert found.missing(4) == 4


def test_a_job_that_the_launcher_stops_is_a_pruned_trial(tmp_path: Path) -> None:
    stopped = pickle.loads(pickle.dumps(Stopped(4.5, 100)))
    assert stopped == 4.5 and stopped.stopped_at == 100
    found = opened(tmp_path)
    first, second = found.ask(2)
    assert found.tell(first, ended(stopped)) is None and found.tell(second, ended(5.0)) is None
    pruned, done = found.study.trials
    assert (pruned.state, pruned.intermediate_values, pruned.value) == (TrialState.PRUNED, {100: 4.5}, 4.5)
    assert (done.state, found.missing(3)) == (TrialState.COMPLETE, 1)
    assert found.results()["best_value"] == 5.0  # at the end of its schedule, which the other has not seen
    assert found.best() == f"the best is #1 x={done.params['x']:.4g}: 5"

    both = opened(tmp_path, name="both", directions=["minimize", "minimize"])
    (trial,) = both.ask(1)
    assert both.tell(trial, ended(stopped)) is None and both.study.trials[0].state == TrialState.PRUNED


@pytest.mark.parametrize("value", [None, "three", float("nan"), [1.0, 2.0]], ids=str)
def test_what_is_no_number_has_failed(tmp_path: Path, value: Any) -> None:
    found = opened(tmp_path)
    (trial,) = found.ask(1)
    assert found.tell(trial, ended(value)) == f"it has to return a number, and returned {value!r}"
    assert found.study.trials[0].state == TrialState.FAIL and found.missing(3) == 2
    found.retry([0])  # if it ends the search; a failure that is allowed is a trial as any other
    assert found.missing(3) == 3
    (again,) = opened(tmp_path).ask(1)
    assert (again.number, again.params) == (1, trial.params)
    assert found.tell(again, ended(ValueError("memory"), JobStatus.FAILED)) == "memory"
    (new,) = found.ask(1)
    assert new.params != trial.params and found.missing(3) == 2


def test_the_numbers_of_jobs_are_those_of_trials(tmp_path: Path) -> None:
    found = opened(tmp_path)
    trials = found.ask(4)
    assert [[t.number for t in some] for some in in_sequence([*trials[:2], trials[3]])] == [[0, 1], [3]]


def test_a_search_of_something_else_is_another_search(tmp_path: Path) -> None:
    """Unless it has found nothing yet, as after a mistyped configuration."""
    (trial,) = opened(tmp_path).ask(1)
    found = opened(tmp_path, configuration={"steps": 4})
    assert found.study.trials == []
    (trial,) = found.ask(1)
    found.tell(trial, ended(1.0))
    for changes, said in {
        "steps=4, and now it is 5": {"configuration": {"steps": 5}},
        "more=None, and now it is 1 (1 more keys differ)": {"configuration": {"steps": 5, "more": 1}},
        "direction=minimize, and now it is [minimize,maximize]": {"directions": ["minimize", "maximize"]},
    }.items():
        options = {"configuration": {"steps": 4}, **said}
        with pytest.raises(StudyError, match=re.escape(changes)):
            opened(tmp_path, **options)
    with pytest.raises(StudyError, match=re.escape("give another hydra.sweeper.study_name")):
        opened(tmp_path, configuration={"steps": 5}, own=False)
    assert opened(tmp_path, name="new", configuration={"steps": 5}).study.trials == []


def test_the_space_is_what_hydra_means() -> None:
    space = read(
        "a=range(0,6,2)", "b=range(1.0,0,-0.25)", "c=int(interval(1,8))", "d=tag(log,interval(1e-4,1))", "e=x,1"
    )
    assert {key: repr(found) for key, found in space.searched.items()} == {
        "a": "IntDistribution(high=4, log=False, low=0, step=2)",
        "b": "FloatDistribution(high=1.0, log=False, low=0.25, step=0.25)",
        "c": "IntDistribution(high=8, log=False, low=1, step=1)",
        "d": "FloatDistribution(high=1.0, log=True, low=0.0001, step=None)",
        "e": "CategoricalDistribution(choices=('x', 1))",
    }
    later = read("x=1,2", "+y=1", "~z", "x=3", "+y=4,5")
    assert later.fixed == {"~z": "~z", "x": "x=3"} and later.words({"+y": 4}) == ["~z", "x=3", "+y=4"]
    assert read("a=range(0,6,2)", "e='x, y',1").grid() == {"a": [0, 2, 4], "e": ["'x, y'", 1]}
    assert space.examples()[1]["e"] == 1 and len(space.examples()) == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("x=interval(2,1)", "x=interval(2,1): an interval needs low < high, got 2.0 and 1.0"),
        ("x=tag(log,interval(0,1))", "an interval needs 0 < low < high, got 0.0 and 1.0"),
        ("x=tag(lin,interval(0,1))", "an unknown tag lin; tag(log,interval(low,high)) has the only one"),
        ("x=tag(log,choice(1,2))", "an unknown tag log"),
        ("x=range(3,3)", "there is no value in it; give at least one"),
        ("x=choice(", "hydra.sweeper.params: no viable alternative"),
    ],
)
def test_a_space_that_cannot_be_searched_is_one_line(word: str, message: str) -> None:
    with pytest.raises(StudyError, match=re.escape(message)):
        read(word)


def test_a_grid_needs_values() -> None:
    with pytest.raises(StudyError, match=r"grid needs the values of x: give a list, or range\(start,stop,step\)"):
        sampler(partial(GridSampler), read("x=interval(0,1)").grid)
    assert sampler(partial(GridSampler, seed=None), read("x=1,2,3", "y=1,2").grid)[1] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_trials": 0}, "hydra.sweeper.n_trials must be >= 1, got 0"),
        ({"n_jobs": -1}, "hydra.sweeper.n_jobs must be >= 1, got -1"),
        ({"max_failure_rate": 1.5}, "hydra.sweeper.max_failure_rate must be >= 0 and <= 1, got 1.5"),
        ({"direction": "down"}, "must be minimize, maximize or a list of these, got 'down'"),
        ({"direction": []}, "must be minimize, maximize or a list of these, got ''"),
        ({"sampler": {"seed": -1}}, "hydra.sweeper.sampler.seed must be an integer >= 0 or null, got -1"),
    ],
    ids=str,
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    given = {"sampler": SAMPLERS["tpe"], **options}
    with pytest.raises(StudyError, match=re.escape(message)):
        check(OmegaConf.merge(OmegaConf.structured(OptunaSweeperConf), given))


def test_what_a_sampler_does_not_have_is_refused() -> None:
    for of, options in {TPESampler: {"sead": 1}, NSGAIISampler: {"population_size": 1}}.items():
        with pytest.raises(StudyError, match=r"hydra\.sweeper\.sampler: .*(sead|population_size)"):
            sampler(partial(of, **options), dict)


def test_two_searches_in_a_folder_are_refused(tmp_path: Path) -> None:
    locked = partial(alone, tmp_path / ".search.lock", "search", StudyError)
    with locked(), pytest.raises(StudyError, match="another search runs in"), locked():
        pass
