"""Alarms of the monitor and its actions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.health import Alarm, Monitor, StepNorms
from tests.harness.cells import covering
from tests.harness.distributed import run
from tests.harness.healths import BY_NAME, Line, graded, setup
from tests.harness.sharded import full


def loop(
    action: str,
    spike_at: int,
    steps: int = 40,
    opt_of: Callable[[Any], Any] = lambda params: distopt.AdamW(params, lr=1e-3),
    kind: str = "gradient",
    factor: float = 1e4,
    **options: Any,
) -> tuple[Line, Monitor, list[int], list[Alarm]]:
    """Trains with one spike of one layer, once; returns the batches of the steps taken."""
    model = Line()
    opt = opt_of(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 + 0.01 * step)
    alarms: list[Alarm] = []
    monitor = Monitor(opt, model, action=action, on_alarm=alarms.append, others=[schedule], **options)
    done, batch, batches = 0, 0, []
    while done < steps:
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(batch))
        opt.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        if batch == spike_at and kind == "gradient":
            model.first.weight.grad.mul_(factor)
        distopt.clip_grad_norm_(opt, math.inf)
        if batch == spike_at and kind == "update":  # after a copy, which is made while gradients are measured
            opt.state[model.first.weight]["exp_avg_sq"].mul_(1e-8)
        opt.step()
        batch += 1
        if monitor.rolled_back is None:
            schedule.step()
            done += 1
            batches.append(batch - 1)
        else:  # the schedule has gone back too
            done, monitor.rolled_back = monitor.rolled_back, None
            del batches[done:]
    monitor.flush()
    return model, monitor, batches, alarms


def plain(batches: list[int], scale: Callable[[int], float] = lambda batch: 1.0, steps_of: Any = None) -> Line:
    """The same training on these batches without a monitor; a skipped batch, -1, moves the schedule alone."""
    model = Line()
    opt = distopt.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1.0 + 0.01 * step)
    for batch in batches:
        if batch >= 0:
            x = torch.randn(64, 6, generator=torch.Generator().manual_seed(batch))
            opt.zero_grad()
            (model(x) - x[:, :3]).square().mean().backward()
            model.first.weight.grad.mul_(scale(batch))
            opt.step()
        schedule.step()
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def only(alarms: list[Alarm], kind: str) -> Alarm:
    assert [(alarm.kind, alarm.layer) for alarm in alarms[:1]] == [(kind, "first.weight")]
    return alarms[0]


SPIKED = 30


def test_a_spike_is_warned_of() -> None:
    model, _, batches, alarms = loop("warn", SPIKED)
    alarm = only(alarms, "spike of the gradient")
    assert alarm.step == SPIKED + 1
    assert alarm.value > 1000.0 * alarm.bound
    assert str(alarm).startswith(f"step {SPIKED + 1}: spike of the gradient: first.weight: norm ")
    assert equal(model, plain(batches, lambda batch: 1e4 if batch == SPIKED else 1.0))


def test_no_spike_is_no_alarm() -> None:
    assert loop("warn", -1)[3] == []


def test_the_spiking_layer_is_clipped_to_its_bound() -> None:
    model, _, batches, alarms = loop("clip", SPIKED)
    alarm = only(alarms, "spike of the gradient")
    expected = plain(batches, lambda batch: 1e4 * alarm.bound / alarm.value if batch == SPIKED else 1.0)
    for p, q in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # the factor is rounded once more
    assert len(alarms) == 1


def test_the_step_is_skipped() -> None:
    model, _, batches, alarms = loop("skip", SPIKED)
    only(alarms, "spike of the gradient")
    assert equal(model, plain([-1 if batch == SPIKED else batch for batch in batches]))


def test_a_run_rolls_back_to_its_copy_and_continues_with_other_batches() -> None:
    """Weights, state and schedule of step 24; the batches 24 to 30 are passed over, in which the spike was."""
    model, monitor, batches, alarms = loop("rollback", SPIKED, copy_every=8)
    only(alarms, "spike of the gradient")
    assert batches == [*range(24), *range(31, 47)]
    assert monitor.step == 40
    assert equal(model, plain(batches))


def test_a_spike_of_the_update_alone_is_known_one_step_late_and_undone_by_a_rollback() -> None:
    """The gradient is as always, but the second moment of a layer has lost its size."""
    model, _, batches, alarms = loop("rollback", SPIKED, kind="update", copy_every=10)
    assert only(alarms, "spike of the update").step == SPIKED + 1  # its own step, not the one that reported it
    assert batches == [*range(30), *range(32, 42)]
    assert equal(model, plain(batches))


def test_a_spike_of_the_update_scales_the_next_one() -> None:
    _, monitor, _, alarms = loop("clip", SPIKED, kind="update")
    first = only(alarms, "spike of the update")
    updates: list[StepNorms] = []
    loop("clip", SPIKED, kind="update", on_step=updates.append)
    free: list[StepNorms] = []
    loop("warn", SPIKED, kind="update", on_step=free.append)
    at = monitor.names.index("first.weight")
    assert float(updates[SPIKED].update[at]) == float(free[SPIKED].update[at])
    ratio = float(updates[SPIKED + 1].update[at] / free[SPIKED + 1].update[at])
    assert ratio == pytest.approx(first.bound / first.value, rel=1e-6)


def test_reload_restores_what_the_caller_restores() -> None:
    kept: dict[str, Any] = {}

    def reload() -> int | None:
        return kept.get("step")

    model, _, batches, _ = loop("reload", SPIKED, reload=reload)
    assert equal(model, plain([-1 if batch == SPIKED else batch for batch in batches]))  # nothing there: skipped
    with pytest.raises(ValueError, match="action='reload' needs reload="):
        loop("reload", SPIKED)


def test_many_rollbacks_end_the_run() -> None:
    model = Line()
    opt = distopt.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(opt, model, action="rollback", max_rollbacks=2, on_alarm=lambda alarm: None)
    model(torch.ones(1, 6)).sum().backward()
    distopt.clip_grad_norm_(opt)
    opt.step()
    with pytest.raises(ValueError, match=r"step 1: an alarm again, after 2 rollbacks: lower the learning rate"):
        for _ in range(3):
            model.first.weight.grad.fill_(math.nan)
            distopt.clip_grad_norm_(opt)
            opt.step()
    assert monitor.step == 1  # it was put back to 0 twice
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("action", ["clip", "skip"])
def test_a_gradient_that_is_not_finite_moves_nothing_and_is_named(action: str) -> None:
    model, _, batches, alarms = loop(action, 5, factor=math.inf)
    assert only(alarms, "non-finite").step == 6
    assert equal(model, plain([-1 if batch == 5 else batch for batch in batches]))


def test_a_dead_layer_is_told_once_until_it_lives_again() -> None:
    model = Line()
    model.first.bias.register_hook(torch.zeros_like)
    opt = distopt.AdamW(model.parameters(), lr=1e-3)
    alarms: list[Alarm] = []
    Monitor(opt, model, dead_steps=3, on_alarm=alarms.append)
    for _ in range(8):
        opt.zero_grad()
        model(torch.ones(1, 6)).sum().backward()
        distopt.clip_grad_norm_(opt)
        opt.step()
    assert [str(alarm) for alarm in alarms] == ["step 3: dead: first.bias: no gradient for 3 steps"]


def decisions(kind: str, action: str) -> tuple[list[str], list[Tensor]]:
    model, inner, opt = setup(kind, BY_NAME["adamw"], torch.float64)
    alarms: list[Alarm] = []
    monitor = Monitor(opt, inner, action=action, warmup=3, threshold=8.0, copy_every=3, on_alarm=alarms.append)
    weight = inner.get_parameter("part.weight")
    batch = done = 0
    while done < 12:
        graded(model, inner, kind, batch)
        if batch == 8:
            weight.grad.mul_(1e5)
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
        batch, done = batch + 1, done + 1
        if monitor.rolled_back is not None:
            done, monitor.rolled_back = monitor.rolled_back, None
    return [f"{a.step} {a.kind} {a.layer} {a.value:.10g} {a.bound:.10g}" for a in alarms], full(inner)


@pytest.mark.parametrize(("action", "kind"), covering(["clip", "skip", "rollback"], ["fsdp2", "zero1"]))
def test_ranks_act_together_and_as_one_process(kind: str, action: str) -> None:
    lines, weights = decisions("replicated", action)
    assert any("spike of the gradient part.weight" in line for line in lines)
    for found, sharded_weights in run(2, decisions, kind, action):
        assert found == lines
        for p, q in zip(sharded_weights, weights):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


def test_statistics_resume_where_they_were() -> None:
    """Alarms and actions of a resumed run are those of the unbroken one."""
    whole_run, first = loop("clip", SPIKED, steps=40), loop("clip", SPIKED, steps=25)
    state = copy.deepcopy(first[1].state_dict())
    again = Monitor(distopt.AdamW(first[0].parameters()), first[0])
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert again.step == 25
    assert whole_run[1].step == 40


def test_a_step_without_measured_gradients_is_refused() -> None:
    model = Line()
    opt = distopt.AdamW(model.parameters())
    monitor = Monitor(opt, model)
    model(torch.ones(1, 6)).sum().backward()
    with pytest.raises(ValueError, match=r"call distopt.clip_grad_norm_\(optimizer, max_norm\) before every step"):
        opt.step()
    monitor.close()
    opt.step()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "action": ({"action": "stop"}, "action must be one of warn, clip, skip, rollback, reload, got 'stop'"),
    "threshold": ({"threshold": 0.0}, "threshold must be a number > 0, got 0.0"),
    "decay": ({"decay": 1.0}, r"decay must be a number in \[0, 1\), got 1.0"),
    "warmup": ({"warmup": True}, "warmup must be an integer >= 1, got True"),
    "depth_factor": ({"depth_factor": 1}, "depth_factor must be a number > 1, got 1"),
    "dead_steps": ({"dead_steps": 0}, "dead_steps must be an integer >= 1, got 0"),
    "copy_every": ({"copy_every": 2.5}, "copy_every must be an integer >= 1, got 2.5"),
    "max_rollbacks": ({"max_rollbacks": "3"}, "max_rollbacks must be an integer >= 1, got '3'"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    model = Line()
    with pytest.raises(ValueError, match=f"^{message}$"):
        Monitor(distopt.AdamW(model.parameters()), model, **options)
