"""One checkpoint for all engines: a run that stops on one resumes on any other, at another number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

import distopt
from distopt.checkpoint import async_save_checkpoint, load_checkpoint, save_checkpoint
from distopt.engine.train_step import update
from distopt.models.language_model import LanguageModel
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, ENGINES, batch, full, made, mean

STOPS, ENDS = 3, 6
# float32 sums in another order at another world size, each step of which the steps after it see.
TOLERANCE = 1e-5
NEW_WORLDS = (1, 4)
PAIRS = [
    (source, target, world)
    for source in ENGINES
    for target in ENGINES
    for world in NEW_WORLDS
    if not (target == "hsdp" and world == 1)  # two replicas
]
# Every engine as the one that stops, and as the one that resumes; the rest is in `make matrix`.
SOME = [(source, target, NEW_WORLDS[i % 2]) for i, (source, target) in enumerate(zip(ENGINES, [*ENGINES][1:]))]
SOME += [("deepspeed_zero3", "ddp", 4), ("deepspeed_zero3", "fsdp2", 4)]
every_pair = pytest.mark.parametrize(("source", "target", "world"), some(SOME, PAIRS))


def train(
    kind: str, start: int, stop: int, source: Path | None = None, to: Path | None = None, late: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Steps `start` to `stop` of a run, from a checkpoint and to one; its losses and full parameters.

    late: save in the background, and train a step, which is none of the run's, while that is going on.
    """
    engine = ENGINES[kind]()
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"], seed=start), engine)
    groups = distopt.param_groups(engine.unwrap(model), weight_decay=0.1, overrides={"wpe": {"lr": 0.01}})
    optimizer = distopt.LAMB(groups, lr=0.1)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=2, total_steps=ENDS)
    model = engine.attach(model, optimizer, 2, 1.0)
    if source is not None:
        extra = load_checkpoint(source, engine.unwrap(model), optimizer, schedule)
        assert extra == {"step": start}
    losses = []
    for step in range(start, stop):
        losses.append(mean(update(engine, model, optimizer, batch(step).chunk(2), max_grad_norm=1.0).loss))
        schedule.step()
    weights = full(model)
    if to is not None:
        save = async_save_checkpoint if late else save_checkpoint
        saving = save(to, engine.unwrap(model), optimizer, schedule, {"step": stop})
        if late:
            update(engine, model, optimizer, batch(99).chunk(2))
            saving.result()
    return losses, weights


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@lru_cache
def stopped(folder: Path, kind: str) -> Path:
    path = folder / kind
    run(2, train, kind, 0, STOPS, None, path)
    return path


@lru_cache
def unbroken(kind: str) -> tuple[list[float], dict[str, Tensor]]:
    return run(2, train, kind, 0, ENDS)[0]


def same(results: list[tuple[list[float], dict[str, Tensor]]], kind: str) -> None:
    losses, weights = unbroken(kind)
    for rank_losses, rank_weights in results:
        assert rank_losses == pytest.approx(losses[STOPS:], rel=TOLERANCE)
        assert rank_weights.keys() == weights.keys()
        for name, p in rank_weights.items():
            assert ((p - weights[name]).norm() / weights[name].norm()).item() < TOLERANCE, name


@every_pair
def test_a_run_resumes_where_another_engine_stopped(folder: Path, source: str, target: str, world: int) -> None:
    same(run(world, train, target, STOPS, ENDS, stopped(folder, source)), source)


def test_the_steps_after_the_stop_matter() -> None:
    """Lest the test above compare runs that have ended: without the checkpoint they are elsewhere."""
    losses, weights = unbroken("ddp")
    fresh, others = run(1, train, "ddp", STOPS, ENDS)[0]
    assert abs(fresh[-1] - losses[-1]) > 100 * TOLERANCE * losses[-1]
    assert any((others[name] - p).norm() / p.norm() > 1e-2 for name, p in weights.items())


@pytest.mark.parametrize("kind", some(["zero1", "hsdp", "deepspeed_zero3"], ENGINES))
def test_the_same_engine_and_world_resumes_bit_for_bit(folder: Path, kind: str) -> None:
    losses, weights = unbroken(kind)
    for rank_losses, rank_weights in run(2, train, kind, STOPS, ENDS, stopped(folder, kind)):
        assert rank_losses == losses[STOPS:]
        assert all(torch.equal(p, weights[name]) for name, p in rank_weights.items())


@pytest.mark.parametrize("kind", some(["zero1", "deepspeed_zero3"], ENGINES))
def test_a_save_in_the_background_is_of_the_moment_it_began(tmp_path: Path, kind: str) -> None:
    run(2, train, kind, 0, STOPS, None, tmp_path / "late", True)
    same(run(4, train, kind, STOPS, ENDS, tmp_path / "late"), kind)
