"""Gradient health: the norms of every layer and step, without a collective of their own, alarms, and actions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from benchmarks.collectives import Collectives
from distopt.health import Alarm, Monitor, StepNorms
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import ROWS, Row, named
from tests.harness.sharded import backward, full, reduce_scattered, sharded, whole

UNWATCHED = ("cautious_adamw", "cautious_lamb", "sgd_schedule_free", "adamw_schedule_free")
BY_NAME = {row.name: row for row in ROWS if row.name not in UNWATCHED}
STEPS = 4


def setup(kind: str, row: Row, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Any]:
    """The model as it is called, the model inside, and a bound optimizer with two param groups."""
    inner = sharded(kind, dtype) if dist.is_initialized() else whole(kind, dtype)
    model: nn.Module = inner
    if kind == "zero1" and dist.is_initialized():
        model = DistributedDataParallel(inner, find_unused_parameters=True)
    opt = row.cls(row.groups([p for p in inner.parameters() if p.requires_grad]), **row.kwargs)
    if model is not inner:
        opt.bind(reduce_scattered(model))
    return model, inner, opt


def graded(model: nn.Module, inner: nn.Module, kind: str, step: int) -> None:
    inner.zero_grad()
    if model is inner:
        backward(model, kind, step)
        return
    samples = torch.rand(8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    samples = samples.to(next(inner.parameters()).dtype).chunk(dist.get_world_size())[dist.get_rank()]
    model(samples, step).backward()


def recorded(kind: str, name: str) -> list[StepNorms]:
    model, inner, opt = setup(kind, BY_NAME[name], torch.float64)
    found: list[StepNorms] = []
    monitor = Monitor(opt, inner, on_step=found.append)
    for step in range(STEPS):
        graded(model, inner, kind, step)
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
    monitor.flush()
    return found


def by_hand(name: str) -> list[dict[str, list[float]]]:
    """The norms of the unsharded run in float64, from the weights before and after each step."""
    model, inner, opt = setup("replicated", BY_NAME[name], torch.float64)
    rows = []
    for step in range(STEPS):
        graded(model, inner, "replicated", step)
        params = [p for p in inner.parameters() if p.requires_grad]
        gradient = [0.0 if p.grad is None else float(p.grad.norm()) for p in params]
        distopt.clip_grad_norm_(opt, 1.0)
        before = [p.detach().clone() for p in params]
        opt.step()
        update = [float((p.detach() - b).norm()) if p.grad is not None else math.nan for p, b in zip(params, before)]
        weight = [float(b.norm()) if p.grad is not None else math.nan for p, b in zip(params, before)]
        ratios = opt.trust_ratios()
        trust = [math.nan if p.grad is None else float(ratios.get(p, 1.0)) for p in params]
        # `trained` orders the layers by param group
        order = [next(i for i, p in enumerate(params) if p is q) for q in opt.layout.params]
        columns = {"gradient": gradient, "weight": weight, "update": update, "trust": trust}
        rows.append({key: [column[i] for i in order] for key, column in columns.items()})
    return rows


def same(found: list[StepNorms], expected: list[dict[str, list[float]]], order: list[int] | None = None) -> None:
    assert [norms.step for norms in found] == list(range(1, STEPS + 1))
    for norms, row in zip(found, expected):
        for key, values in row.items():
            # Weights of about 1 move by 1e-3: their difference has 12 digits of float64.
            assert getattr(norms, key).tolist() == pytest.approx(values, rel=1e-10, abs=1e-14, nan_ok=True), key


@pytest.mark.parametrize("name", BY_NAME)
def test_norms_are_those_of_the_weights_before_and_after_a_step(name: str) -> None:
    """Also of a layer without gradient (nan), of zeros, and with the trust ratio within the momentum (LARS)."""
    same(recorded("replicated", name), by_hand(name))


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
@pytest.mark.parametrize("kind", ["fsdp2", "zero1"])
@pytest.mark.parametrize("world", [1, 2])
def test_sharded_norms_are_the_unsharded_ones(world: int, kind: str, name: str) -> None:
    expected = by_hand(name)
    if kind == "zero1":  # its layout has the order of the model, and the others that of the param groups
        order = run(1, layer_names, "zero1", name)[0]
        plain = layer_names("replicated", name)
        expected = [{key: [v[plain.index(n)] for n in order] for key, v in row.items()} for row in expected]
    for found in run(world, recorded, kind, name):
        same(found, expected)


def layer_names(kind: str, name: str) -> list[str]:
    _, inner, opt = setup(kind, BY_NAME[name], torch.float64)
    return Monitor(opt, inner).names


def collectives(kind: str, name: str, watched: bool) -> list[str]:
    model, inner, opt = setup(kind, BY_NAME[name], torch.float32)
    if watched:
        Monitor(opt, inner)
    for step in range(2):
        graded(model, inner, kind, step)
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
    with Collectives() as mode:
        graded(model, inner, kind, 2)
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
    return mode.seen


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])
@pytest.mark.parametrize("kind", ["fsdp2", "zero1"])
def test_a_watched_step_has_no_collective_more(kind: str, name: str) -> None:
    (without, *_), (watched, *_) = run(2, collectives, kind, name, False), run(2, collectives, kind, name, True)
    assert watched == without
    assert sum("allreduce" in seen for seen in watched) >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "nesterov", "rmsprop_centered_momentum", "adagrad"])
def test_watching_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    """Kernels, the unfused fallback and masters: the direction is measured on its way, and applied as otherwise."""
    models = []
    for watched in (False, True):
        model, inner, opt = setup("replicated", BY_NAME[name], dtype)
        if watched:
            Monitor(opt, inner)
        for step in range(6):
            graded(model, inner, "replicated", step)
            distopt.clip_grad_norm_(opt, 1.0)
            opt.step()
        models.append(full(inner))
    assert all(torch.equal(a, b) for a, b in zip(*models))


DEPTH = 50
INITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "too small": (lambda w: nn.init.xavier_normal_(w, gain=0.5), "vanishing"),
    "too large": (lambda w: nn.init.xavier_normal_(w, gain=3.0), "exploding"),
    "Xavier": (nn.init.xavier_normal_, ""),
    "He": (nn.init.kaiming_normal_, ""),
}


def tanh_network(init: Callable[[Tensor], Any], width: int = 32, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        linear = nn.Linear(width, width, bias=bias)
        init(linear.weight)
        if bias:
            nn.init.zeros_(linear.bias)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def trained(model: nn.Module, monitor: Monitor, opt: Any, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()


def test_the_monitor_tells_initialisations_of_a_deep_network_apart() -> None:
    """The factors of the biases: 1/2 for half of Xavier's weights, 1 for Xavier, more for He, and far more above."""
    factors = {}
    for name, (init, kind) in INITS.items():
        torch.manual_seed(0)
        model = tanh_network(init)
        opt = distopt.AdamW(model.parameters(), lr=1e-4)
        alarms: list[Alarm] = []
        monitor = Monitor(opt, model, on_alarm=alarms.append)
        trained(model, monitor, opt, 3)
        assert {alarm.kind for alarm in alarms} == ({kind} if kind else set()), name
        assert all(alarm.step in (1, 2) and alarm.layer in ("*.weight", "*.bias") for alarm in alarms)
        factors[name] = {trend.series.name: trend.factor for trend in monitor.trends()}["*.bias"]
    assert factors["too small"] == pytest.approx(0.5, abs=0.05)
    assert factors["Xavier"] == pytest.approx(0.97, abs=0.04)
    assert 1.02 < factors["He"] < 1.15
    assert factors["too large"] > 1.2


def test_weights_alone_do_not_show_that_forward_and_backward_vanish_alike() -> None:
    """The gradient of a weight is the product of both, the same at every depth; the biases' is what comes back."""
    torch.manual_seed(0)
    model = tanh_network(INITS["too small"][0], bias=False)
    opt = distopt.SGD(model.parameters(), lr=1e-4)
    monitor = Monitor(opt, model, on_alarm=lambda alarm: None)
    trained(model, monitor, opt, 1)
    (found,) = monitor.trends()
    assert found.factor == pytest.approx(1.0, abs=0.05)


class Line(nn.Module):
    """A few layers for spikes: the gradient of each is about the same in every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


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


@pytest.mark.parametrize("action", ["clip", "skip", "rollback"])
@pytest.mark.parametrize("kind", ["fsdp2", "zero1"])
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


def all_reduced() -> None:
    model = DistributedDataParallel(Line())
    opt = distopt.AdamW(model.parameters())
    opt.bind(distopt.layout.zero1_layout(model))
    Monitor(opt, model)


def test_what_has_no_norms_is_refused() -> None:
    model = Line()
    for name in UNWATCHED:
        with pytest.raises(ValueError, match=r"cautious=True: a masked|ScheduleFree: the weights y also move"):
            Monitor(named(name).make(model.parameters()), model)
    with pytest.raises(ValueError, match="those of distopt's optimizers, got AdamW: use the one of this name"):
        Monitor(torch.optim.AdamW(model.parameters()), model)
    with pytest.raises(RankError, match=r"bind distopt.layout.zero1_layout\(model, gradients='reduce_scatter'\)"):
        run(2, all_reduced)


def test_sam_and_accelerates_wrapper_are_watched() -> None:
    from accelerate import Accelerator

    model = Line()
    sam = distopt.LookSAM(distopt.AdamW(model.parameters(), lr=1e-3), interval=2, model=model)
    accelerator = Accelerator(cpu=True)
    prepared, wrapped = accelerator.prepare(model, sam)
    found: list[StepNorms] = []
    monitor = Monitor(wrapped, prepared, action="rollback", copy_every=2, on_step=found.append)
    x = torch.randn(16, 6)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = prepared(x).square().mean()
        loss.backward()
        return loss

    for step in range(6):
        closure()
        with sam.perturbed():
            if sam.ascends:
                closure()
        if step == 4:
            model.first.bias.grad.fill_(math.nan)
        distopt.clip_grad_norm_(wrapped, 1.0)
        wrapped.step()
    assert monitor.rolled_back == 2  # an alarm at the step that would have copied
    assert [norms.step for norms in found] == [1, 2, 3, 4]
    assert monitor.alarms[0].kind == "non-finite" and monitor.alarms[0].layer == "first.bias"
    assert all(bool(p.isfinite().all()) for p in model.parameters())
