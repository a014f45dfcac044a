"""Schedules: the curve at every step, the bounds of every argument, and that only the position is state."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from distopt.optim import schedules
from distopt.optim.schedules import (
    warmup_constant,
    warmup_cosine,
    warmup_inverse_sqrt,
    warmup_linear,
    warmup_stable_decay,
)

CONF = Path(__file__).parents[1] / "conf" / "schedule"
TOTAL = 20
SCHEDULES: dict[str, Callable[..., torch.optim.lr_scheduler.LambdaLR]] = {
    "cosine": partial(warmup_cosine, final_lr_ratio=0.1),
    "linear": partial(warmup_linear, final_lr_ratio=0.3),
    "constant": warmup_constant,
    "inverse_sqrt": warmup_inverse_sqrt,
    "stable_decay": partial(warmup_stable_decay, decay_steps=6, final_lr_ratio=0.1),
}
FINAL = {"cosine": 0.1, "linear": 0.3, "stable_decay": 0.1}

every_schedule = pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES.keys())


def optimizer(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def curve(make: Callable, steps: int, warmup_steps: int, total_steps: int = TOTAL) -> list[float]:
    """The factor of each optimizer step, as the optimizer sees it."""
    opt = optimizer(1.0)
    lr_schedule = make(opt, warmup_steps=warmup_steps, total_steps=total_steps)
    factors = []
    for _ in range(steps):
        factors.append(opt.param_groups[0]["lr"])
        opt.step()
        lr_schedule.step()
    return factors


@every_schedule
@pytest.mark.parametrize("warmup", [0, 1, 5, TOTAL - 7])
def test_warmup_is_linear_from_one_over_warmup_steps_to_one(make: Callable, warmup: int) -> None:
    expected = [(t + 1) / max(warmup, 1) for t in range(max(warmup, 1))]
    assert curve(make, max(warmup, 1), warmup) == expected
    assert expected[-1] == 1.0


@every_schedule
def test_never_rises_after_the_peak_nor_falls_before(make: Callable) -> None:
    factors = curve(make, TOTAL + 5, warmup_steps=5)
    assert factors[:5] == sorted(set(factors[:5]))
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert min(factors) >= 0.0


@pytest.mark.parametrize("name", FINAL)
@pytest.mark.parametrize("warmup", [0, 5])
def test_final_ratio_is_reached_with_the_last_step_and_kept(name: str, warmup: int) -> None:
    factors = curve(SCHEDULES[name], TOTAL + 5, warmup)
    assert factors[TOTAL - 2] > factors[TOTAL - 1] == FINAL[name]
    assert set(factors[TOTAL - 1 :]) == {FINAL[name]}


@pytest.mark.parametrize(
    ("name", "step", "expected"),
    [
        # Peak at step 4 (warmup 5), last step 19: step 9 is a third of the way down.
        ("cosine", 9, 0.1 + 0.9 * 0.75),
        ("linear", 9, 0.3 + 0.7 * 2 / 3),
        ("constant", 9, 1.0),
        ("constant", 10**6, 1.0),
        # The 20th step of a warmup of 5: sqrt(5 / 20).
        ("inverse_sqrt", 19, 0.5),
        # The last 6 steps are 14 to 19; step 16 is the third of them.
        ("stable_decay", 13, 1.0),
        ("stable_decay", 14, 0.1 + 0.9 * 5 / 6),
        ("stable_decay", 16, 0.1 + 0.9 / 2),
    ],
)
def test_values_between(name: str, step: int, expected: float) -> None:
    factor = SCHEDULES[name](optimizer(1.0), warmup_steps=5, total_steps=TOTAL).lr_lambdas[0]
    assert factor(step) == pytest.approx(expected, rel=1e-15)


def test_cosine_is_torchs_cosine_annealing_without_warmup() -> None:
    opt = optimizer(1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=TOTAL - 1, eta_min=0.1)
    for factor in curve(SCHEDULES["cosine"], TOTAL, warmup_steps=0):
        # torch's is a recurrence, which gathers rounding errors; ours is a function of the step.
        assert factor == pytest.approx(opt.param_groups[0]["lr"], rel=1e-12)
        opt.step()
        reference.step()


def test_inverse_sqrt_is_the_transformers_formula() -> None:
    """Equation 3 of Vaswani et al., with the peak lr = (d * w)^-0.5."""
    d, w = 512, 7
    lrs = [schedules.inverse_sqrt_factor(t, w) * (d * w) ** -0.5 for t in range(40)]
    paper = [d**-0.5 * min(n**-0.5, n * w**-1.5) for n in range(1, 41)]
    assert lrs == pytest.approx(paper, rel=1e-14)


@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"stable_decay"}))
def test_a_run_of_one_step_is_at_the_peak(name: str) -> None:
    assert curve(SCHEDULES[name], 1, warmup_steps=0, total_steps=1) == [1.0]


@every_schedule
def test_every_group_keeps_its_own_rate(make: Callable) -> None:
    opt = optimizer(1.0, 0.25)
    lr_schedule = make(opt, warmup_steps=5, total_steps=TOTAL)
    for _ in range(TOTAL):
        whole, quarter = (group["lr"] for group in opt.param_groups)
        assert quarter == 0.25 * whole
        opt.step()
        lr_schedule.step()


@every_schedule
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_a_group_that_is_added_follows_from_the_next_step_on(make: Callable, tensor: bool) -> None:
    """As a head that is thawed; torch's LambdaLR ends in "zip() argument 2 is shorter than argument 1" there."""
    opt = optimizer(1.0)
    lr_schedule = make(opt, warmup_steps=5, total_steps=TOTAL)
    for step in range(TOTAL):
        if step == 3:
            lr = torch.tensor(0.25, dtype=torch.float64) if tensor else 0.25
            opt.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": lr})
        if step > 3:
            whole, quarter = (group["lr"] for group in opt.param_groups)
            assert quarter == pytest.approx(0.25 * whole, rel=1e-15)
        opt.step()
        lr_schedule.step()
    assert lr_schedule.base_lrs == [1.0, 0.25]

    resumed = optimizer(1.0)  # as the run was: the group is added, then the state loaded
    again = make(resumed, warmup_steps=5, total_steps=TOTAL)
    resumed.add_param_group({"params": [torch.zeros(1, requires_grad=True)], "lr": 9.0})
    resumed.load_state_dict(opt.state_dict())
    again.load_state_dict(lr_schedule.state_dict())
    for o, s in ((opt, lr_schedule), (resumed, again)):
        o.step()
        s.step()
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in opt.param_groups]


@every_schedule
@pytest.mark.parametrize("stop", [1, 4, 5, 15, TOTAL])
def test_resuming_gives_the_same_rates(make: Callable, stop: int) -> None:
    opt = optimizer(1.0)
    lr_schedule = make(opt, warmup_steps=5, total_steps=TOTAL)
    for _ in range(stop):
        opt.step()
        lr_schedule.step()
    file = io.BytesIO()
    torch.save({"optimizer": opt.state_dict(), "schedule": lr_schedule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = optimizer(1.0)
    lr_schedule = make(resumed, warmup_steps=5, total_steps=TOTAL)
    resumed.load_state_dict(saved["optimizer"])
    lr_schedule.load_state_dict(saved["schedule"])
    factors = []
    for _ in range(5):
        factors.append(resumed.param_groups[0]["lr"])
        resumed.step()
        lr_schedule.step()
    assert factors == curve(make, stop + 5, warmup_steps=5)[stop:]


def test_a_resumed_run_follows_the_configuration_and_not_the_checkpoint() -> None:
    """A callable object's attributes are saved by LambdaLR and would bring the old total_steps back."""
    opt = optimizer(1.0)
    short = warmup_linear(opt, warmup_steps=5, total_steps=TOTAL)
    for _ in range(10):
        opt.step()
        short.step()
    resumed = optimizer(1.0)
    long = warmup_linear(resumed, warmup_steps=5, total_steps=2 * TOTAL)
    long.load_state_dict(short.state_dict())
    resumed.step()
    long.step()
    assert resumed.param_groups[0]["lr"] == schedules.linear_factor(11, 5, 2 * TOTAL, 0.0)


@every_schedule
def test_the_factor_can_be_pickled(make: Callable) -> None:
    (factor,) = make(optimizer(1.0), warmup_steps=5, total_steps=TOTAL).lr_lambdas
    again = pickle.loads(pickle.dumps(factor))
    assert [again(t) for t in range(TOTAL)] == [factor(t) for t in range(TOTAL)]


@every_schedule
@pytest.mark.parametrize(
    ("warmup_steps", "total_steps", "message"),
    [
        (-1, TOTAL, "warmup_steps must be an integer >= 0, got -1"),
        (1e1, TOTAL, "warmup_steps must be an integer >= 0, got 10.0"),
        (True, TOTAL, "warmup_steps must be an integer >= 0, got True"),
        ("5", TOTAL, "warmup_steps must be an integer >= 0, got '5'"),
        (TOTAL, TOTAL, "warmup longer than the run: warmup_steps must be less than total_steps = 20, got 20"),
        (TOTAL + 1, TOTAL, "warmup longer than the run: .* got 21; shorten the warmup"),
        (0, 0, "total_steps must be an integer >= 1, got 0"),
        (0, -3, "total_steps must be an integer >= 1, got -3"),
        (0, 20.0, "total_steps must be an integer >= 1, got 20.0"),
    ],
)
def test_refuses_steps_out_of_bounds(make: Callable, warmup_steps: int, total_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(optimizer(1.0), warmup_steps=warmup_steps, total_steps=total_steps)


@pytest.mark.parametrize("name", FINAL)
@pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan])
def test_refuses_final_ratio_out_of_bounds(name: str, ratio: float) -> None:
    with pytest.raises(
        ValueError, match=rf"final_lr_ratio must be a number in \[0, 1\], got {ratio}; it is a fraction"
    ):
        SCHEDULES[name](optimizer(1.0), warmup_steps=5, total_steps=TOTAL, final_lr_ratio=ratio)


@pytest.mark.parametrize(
    ("warmup", "decay", "message"),
    [
        (5, 16, "decay_steps must be at most 15, what total_steps = 20 leaves after warmup_steps = 5, got 16"),
        (0, 20, "decay_steps must be at most 19"),
        (5, 0, "decay_steps must be an integer >= 1, got 0"),
        (5, 2.0, "decay_steps must be an integer >= 1, got 2.0"),
    ],
)
def test_refuses_decay_steps_out_of_bounds(warmup: int, decay: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        warmup_stable_decay(optimizer(1.0), warmup_steps=warmup, total_steps=TOTAL, decay_steps=decay)


def test_stable_decay_may_start_at_the_peak() -> None:
    make = partial(warmup_stable_decay, decay_steps=15)
    assert curve(make, TOTAL, warmup_steps=5) == pytest.approx(curve(warmup_linear, TOTAL, warmup_steps=5), rel=1e-15)


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_makes_its_schedule(file: Path) -> None:
    """As the training loop calls it: everything but the length of the run comes from the file."""
    lr_schedule = instantiate(OmegaConf.load(file))(optimizer(1.0), total_steps=1000)
    expected = "constant" if file.stem == "constant" else file.stem.removeprefix("warmup_")
    assert lr_schedule.lr_lambdas[0].func is getattr(schedules, f"{expected}_factor")
    assert lr_schedule.get_last_lr() == [1.0 if file.stem == "constant" else 0.01]


def test_every_schedule_has_a_config() -> None:
    assert {file.stem for file in CONF.glob("*.yaml")} == {f"warmup_{name}" for name in SCHEDULES} | {"constant"}
