"""Averages of the weights: EMA and LAWA against their formulas, on every engine, in checkpoints, and for evaluation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt.checkpoint import load_average, load_training_weights
from distopt.engine.train_step import update
from distopt.optim.averaged import update_average
from tests.harness import matrix
from tests.harness.distributed import run
from tests.harness.engines import CPU, DEEPSPEED, ENGINES, full
from tests.harness.optimizers import named

STEPS, HALF = 6, 3
KINDS: dict[str, dict[str, Any]] = {"EMA": {"decay": 0.7}, "LAWA": {"window": 2, "every": 2}}
every_kind = pytest.mark.parametrize("kind", KINDS)
# Of a number in float32 after six roundings; the weights themselves are those of the run that is judged.
EXACT = 1e-6


def expected(kind: str, trajectory: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The average by its formula, in float64, of the weights after each step."""
    wide = [{name: p.double() for name, p in weights.items()} for weights in trajectory]
    if kind == "EMA":
        shares = [0.7 ** (len(wide) - 1 - i) for i in range(len(wide))]
        return {name: sum(s * w[name] for s, w in zip(shares, wide)) / sum(shares) for name in wide[0]}
    chosen = wide[1::2][-2:] or wide[-1:]
    return {name: sum(w[name] for w in chosen) / len(chosen) for name in wide[0]}


class Run:
    """A training of the matrix's model on an engine, with an average."""

    def __init__(self, engine: str, kind: str | None, row: str = "adamw", precision: str = "fp32") -> None:
        options = {"find_unused_parameters": True} if engine in ("ddp", "zero1") else {}
        self.engine, self.kind = ENGINES[engine](precision=precision, **options), engine
        toy = matrix.initial("fp32")
        model = self.engine.build(toy, [toy.part], lambda unit, device: None, CPU)
        chosen = named(row)
        trained = [p for p in self.engine.unwrap(model).parameters() if p.requires_grad]
        self.optimizer = chosen.make(chosen.groups(trained))
        if kind is not None:
            getattr(distopt, kind)(self.optimizer, **KINDS[kind])
        self.model = self.engine.attach(model, self.optimizer, 1, matrix.MAX_NORM)
        distopt.prove_every(self.optimizer, self.engine.unwrap(self.model), steps=2, state=True)

    def step(self, step: int) -> None:
        step *= 3  # at which all parameters are used
        mine = matrix.batch(step, torch.float32).chunk(dist.get_world_size())[dist.get_rank()]
        assert update(
            self.engine, self.model, self.optimizer, [mine], matrix.MAX_NORM, partial(matrix.loss, step)
        ).applied
        update_average(self.optimizer)

    def averaged(self) -> Any:
        return distopt.averaged(self.optimizer, self.engine.unwrap(self.model))

    def loss(self) -> float:
        with torch.no_grad():
            loss = float(self.model(matrix.batch(0, torch.float32), 0))
        return loss

    def close(self) -> None:
        if self.kind in DEEPSPEED:
            self.model.destroy()


def evaluated(engine: str, kind: str) -> tuple[float, float, float]:
    """The largest distance from the formula in all steps; the loss that the model computes, and the one it should."""
    training = Run(engine, kind)
    trajectory, worst = [], 0.0
    for step in range(1, STEPS + 1):
        training.step(step)
        before = full(training.model)
        trajectory.append(before)
        oracle = expected(kind, trajectory)
        with training.averaged():
            found, loss = full(training.model), training.loss()
        trained = {name: p for name, p in oracle.items() if "frozen" not in name}
        worst = max(
            [worst, *(float((found[n] - p).abs().max() / p.abs().max().clamp(min=1e-3)) for n, p in trained.items())]
        )
        after = full(training.model)
        assert all(torch.equal(after[name], p) for name, p in before.items())
    judge = matrix.initial("fp32")
    judge.load_state_dict({**judge.state_dict(), **{name: p.float() for name, p in oracle.items()}})
    with pytest.raises(RuntimeError, match="in the middle"), training.averaged():
        raise RuntimeError("in the middle of an evaluation")
    assert all(torch.equal(p, before[name]) for name, p in full(training.model).items())
    training.step(STEPS + 1)  # and the training goes on
    training.close()
    with torch.no_grad():
        return worst, loss, float(judge(matrix.batch(0, torch.float32), 0))


@every_kind
@pytest.mark.parametrize(
    ("engine", "world"),
    [
        *[("ddp", 1), ("zero1", 2), ("fsdp2", 3), ("deepspeed_zero1", 2), ("deepspeed_zero3", 2)],
        *[
            pytest.param(engine, world, marks=pytest.mark.matrix)
            for engine in ENGINES
            for world in (1, 2, 3, 4)
            if engine != "hsdp" or world % 2 == 0
        ],
    ],
)
def test_the_average_is_the_formulas_on_every_engine_and_the_weights_come_back(
    engine: str, world: int, kind: str
) -> None:
    for worst, loss, right in run(world, evaluated, engine, kind):
        assert worst < EXACT
        assert loss == pytest.approx(right, rel=1e-5)


def rounded(engine: str, master_weights: str) -> tuple[bool, bool]:
    """Whether the weights of bfloat16 show the average of their float32 values, and come back."""
    from distopt.engine import Zero1

    toy = matrix.initial("fp32")
    kind = Zero1(param_dtype="bf16", find_unused_parameters=True)
    model = kind.build(toy, [toy.part], lambda unit, device: None, CPU)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = distopt.AdamW([{"params": params, "master_weights": master_weights}], lr=1e-3)
    distopt.EMA(optimizer, decay=0.7)
    model = kind.attach(model, optimizer, 1, 1e9)
    for step in range(1, 4):
        mine = matrix.batch(step, torch.bfloat16).chunk(dist.get_world_size())[dist.get_rank()]
        update(kind, model, optimizer, [mine], 1e9, partial(matrix.loss, step))
        update_average(optimizer)
    before = [p.detach().clone() for p in params]
    with distopt.averaged(optimizer, model):
        shown = [p.detach().clone() for p in params]
    averages = [optimizer.state[p]["ema"] for p in params]
    same = all(torch.equal(p, average.full_tensor().to(torch.bfloat16)) for p, average in zip(shown, averages))
    return same, all(map(torch.equal, before, (p.detach() for p in params)))


@pytest.mark.parametrize("master_weights", ["float32", "remainder", "none"])
def test_16_bit_weights_are_averaged_in_float32(master_weights: str) -> None:
    assert run(2, rounded, "zero1", master_weights) == [(True, True)] * 2


# Checkpoints.


def saved_half(path: Path, engine: str, kind: str) -> list[dict[str, Tensor]]:
    training, trajectory = Run(engine, kind), []
    for step in range(1, HALF + 1):
        training.step(step)
        trajectory.append(full(training.model))
    distopt.save_checkpoint(path, training.engine.unwrap(training.model), training.optimizer)
    training.close()
    return trajectory


def resumed_half(
    path: Path, engine: str, kind: str | None
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], set[str]]:
    training, trajectory = Run(engine, kind), []
    training.step(1)  # an average of its own, which the load replaces
    distopt.load_checkpoint(path, training.engine.unwrap(training.model), training.optimizer)
    for step in range(HALF + 1, STEPS + 1):
        training.step(step)
        trajectory.append(full(training.model))
    with training.averaged():
        average = full(training.model)
    buffers = {name for state in training.optimizer.state.values() for name in state}
    training.close()
    return trajectory, average, buffers


def far(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return max(float((found[n] - p).abs().max() / p.abs().max().clamp(min=1e-3)) for n, p in right.items())


@every_kind
@pytest.mark.parametrize(
    ("here", "there"), [(("zero1", 2), ("fsdp2", 3)), (("fsdp2", 2), ("deepspeed_zero1", 1))], ids=str
)
def test_a_checkpoint_resumes_the_average_anywhere(
    kind: str, here: tuple[str, int], there: tuple[str, int], tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    first = run(here[1], saved_half, path, here[0], kind)[0]
    saved = {name: torch.zeros(p.shape) for name, p in first[0].items()}
    load_average(path, saved)
    assert far(saved, expected(kind, first)) < EXACT
    for second, average, _ in run(there[1], resumed_half, path, there[0], kind):
        assert far(average, expected(kind, [*first, *second])) < EXACT


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed_zero1"])
def test_a_run_may_begin_to_average_end_or_change_the_kind(engine: str, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    run(2, saved_half, path, engine, "EMA")
    second, average, buffers = run(2, resumed_half, path, engine, "LAWA")[0]
    assert "lawa_0" in buffers and "ema" not in buffers
    assert far(average, expected("LAWA", second)) < EXACT  # of the steps since
    _, _, buffers = run(2, resumed_half, path, engine, None)[0]
    assert not buffers & {"ema", "lawa_0"}


# Schedule-free optimizers come in by the same door.


def free(engine: str, row: str) -> tuple[bool, float]:
    """Whether y is the same bits after an evaluation at x; and how far that x is from the one of `eval()`."""
    training = Run(engine, None, row)
    for step in range(1, 4):
        training.step(step)
    before = full(training.model)
    with training.averaged():
        x = full(training.model)
    back = full(training.model)
    training.optimizer.eval()
    right = full(training.model)
    with training.averaged():  # nothing to do
        again = full(training.model)
    training.close()
    assert all(map(torch.equal, right.values(), again.values()))
    assert far(before, x) > 1e-3
    return all(map(torch.equal, before.values(), back.values())), far(x, right)


@pytest.mark.parametrize("engine", ["zero1", "fsdp2", "deepspeed_zero3"])
def test_a_schedule_free_optimizer_is_evaluated_at_its_own_average(engine: str) -> None:
    for same, distance in run(2, free, engine, "adamw_schedule_free"):
        assert same and distance == 0.0


# Refused.


def test_what_has_no_average_is_refused() -> None:
    weights = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="EMA averages the weights of an optimizer of distopt, got AdamW"):
        distopt.EMA(torch.optim.AdamW([weights]))
    with pytest.raises(ValueError, match="EMA beside AdamWScheduleFree, which averages the weights already"):
        distopt.EMA(distopt.AdamWScheduleFree([weights]))
    optimizer = distopt.AdamW([weights])
    for wrong in (-0.1, 1.0, True, "0.9"):
        with pytest.raises(ValueError, match=r"decay must be a number in \[0, 1\)"):
            distopt.EMA(optimizer, decay=wrong)
    with pytest.raises(ValueError, match="window must be an integer >= 1"):
        distopt.LAWA(optimizer, window=0)
    distopt.LAWA(distopt.SAM(optimizer))
    with pytest.raises(ValueError, match="EMA beside LAWA"):
        distopt.EMA(optimizer)


def test_a_checkpoint_without_an_average_exports_none(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    distopt.save_checkpoint(tmp_path / "plain", model, distopt.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="it has no average of the weights: train with average=ema"):
        load_average(tmp_path / "plain", dict(model.state_dict()))


# Phases that take weights alone.


def started(path: Path, engine: str, row: str) -> tuple[dict[str, Tensor], bool]:
    """The weights of a checkpoint, taken into a new run, and whether its optimizer is as before the first step."""
    training = Run(engine, None, row)
    load_training_weights(path, training.engine.unwrap(training.model), training.optimizer)
    weights = full(training.model)
    state = {name for state in training.optimizer.state.values() for name in state}
    training.step(1)
    training.close()
    return weights, not state


def saved_weights(path: Path, engine: str, row: str) -> dict[str, Tensor]:
    training = Run(engine, None, row)
    training.step(1)
    distopt.save_checkpoint(path, training.engine.unwrap(training.model), training.optimizer)
    weights = full(training.model)
    training.close()
    return weights


@pytest.mark.parametrize(("engine", "row"), [("fsdp2", "adamw_schedule_free"), ("deepspeed_zero3", "lamb")])
def test_weights_alone_are_the_same_bits_for_another_optimizer_on_another_engine(
    engine: str, row: str, tmp_path: Path
) -> None:
    right = run(2, saved_weights, tmp_path / "saved", "zero1", "adamw")[0]
    for weights, fresh in run(3, started, tmp_path / "saved", engine, row):
        assert fresh and all(torch.equal(weights[name], p) for name, p in right.items())
