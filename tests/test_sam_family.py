"""SAM's family: every member is its paper's, leaves weights as they were, and can be resumed."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt import SAM, SGD, LookSAM
from tests.harness.optimizers import Row, distance, named
from tests.harness.sam_steps import (
    STEPS,
    TASK,
    by_closure,
    by_verbs,
    criterion,
    equal,
    leaves,
    one_pass,
    outputs,
    started,
    state_of,
    steps,
    values,
)
from tests.harness.sams import EVERYONE, MEMBERS, Member, every_member, everyone

# The papers' steps.


@everyone
@pytest.mark.parametrize("way", [by_closure, by_verbs])
def test_every_step_equals_the_oracle(member: Member, row: Row, way: Callable[..., Any]) -> None:
    """Two groups with rhos of their own, one norm over both. Roundings of 1e-16, some stretched by Adam's root."""
    params = leaves()
    expected = member.expected(row, params, TASK, STEPS)
    sam = started(member, row, params)
    for step in range(STEPS):
        unperturbed = criterion(outputs(params, step), step).item()
        loss = way(sam, partial(one_pass, sam, params, step))
        if sam.needs_ascent_gradient:
            assert loss.item() == unperturbed
        assert distance([p.detach() for p in params], expected[step]) < 1e-12, step


def test_no_two_members_are_the_same() -> None:
    """Or an oracle might be equal to what does nothing."""
    ends = {m.name: m.expected(named("adamw"), leaves(), TASK, STEPS)[-1] for m in MEMBERS}
    ends["none"] = named("adamw").expected(leaves(), TASK.grad, STEPS)[-1]
    names = list(ends)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert distance(ends[a], ends[b]) > 1e-4, (a, b)


@pytest.mark.parametrize(("member", "row"), [pair for pair in EVERYONE if pair[1].peer], ids=lambda value: value.name)
def test_the_optimizer_may_be_torchs(member: Member, row: Row) -> None:
    """torch's Adam makes its state only where a parameter has none: a mean of ours that was there first broke it."""
    params = leaves()
    expected = member.expected(row, params, TASK, STEPS)
    sam = member.make(row.make_peer(member.groups(row, params)))
    sam.init_state()  # as a checkpoint of the first step does
    steps(sam, params, 0, STEPS)
    assert distance([p.detach() for p in params], expected[-1]) < 1e-12


@every_member
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_continues_as_the_first(member: Member, how: Callable[[Any], Any]) -> None:
    """Also between two looks, with the count of steps and the state that is our own."""
    params = leaves()
    sam = started(member, named("adamw"), params)
    steps(sam, params, 0, 4)
    other = how(sam)
    again = [p for group in other.param_groups for p in group["params"]]
    order = [p for group in sam.param_groups for p in group["params"]]
    back = [next(i for i, q in enumerate(order) if q is p) for p in params]
    steps(sam, params, 4, STEPS)
    steps(other, [again[i] for i in back], 4, STEPS)
    assert equal(values(params), values(again[i] for i in back))
    assert equal(state_of(sam), state_of(other))
    assert {name: vars(other)[name] for name in member.kwargs} == member.kwargs


# Weights that come back.


@every_member
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_restored_bit_for_bit(member: Member, dtype: torch.dtype) -> None:
    params = leaves(dtype)
    sam = started(member, named("adamw"), params)
    cycle = len(member.reduces)
    steps(sam, params, 0, cycle)
    before = values(params)
    if sam.needs_ascent_gradient:
        one_pass(sam, params, cycle)
    sam.perturb()
    assert not any(torch.equal(p, b) for p, b in zip(params, before))
    one_pass(sam, params, cycle)
    sam.restore()
    assert equal(values(params), before)


@every_member
@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("at", range(3))
def test_a_pass_that_raises_leaves_weights_and_state(member: Member, failing: int, at: int) -> None:
    """The step can be taken again, and the run is the one that nothing happened to."""
    params, others = leaves(), leaves()
    sam, calm = started(member, named("adamw"), params), started(member, named("adamw"), others)
    steps(sam, params, 0, at)
    steps(calm, others, 0, at)
    before, state = values(params), state_of(sam)
    calls = []

    def closure() -> Tensor:
        calls.append(None)
        loss = one_pass(sam, params, at)
        if len(calls) == failing:
            raise KeyboardInterrupt
        return loss

    if failing == 1 or (sam.needs_ascent_gradient and sam.ascends):
        with pytest.raises(KeyboardInterrupt):
            sam.step(closure)
        assert equal(values(params), before)
        assert equal(state_of(sam), state)
    steps(sam, params, at, STEPS)
    steps(calm, others, at, STEPS)
    assert equal(values(params), values(others))


def test_a_warning_that_is_an_error_leaves_the_weights() -> None:
    """It is raised when they have moved already; they stayed perturbed, and perturb() refused to be called again."""
    params = leaves(torch.float16)
    before = values(params)
    sam = SAM(distopt.SGD(params), rho=1e-4)
    one_pass(sam, params, 0)
    with pytest.raises(UserWarning, match="lost in rounding"), sam.perturbed():
        raise AssertionError("not reached")
    assert equal(values(params), before)
    steps(sam, params, 0, 1)


@every_member
def test_a_zero_gradient_perturbs_nothing(member: Member) -> None:
    params = leaves()
    sam = started(member, named("adamw"), params)
    before = values(params)
    for _ in range(4):  # a whole cycle
        for p in params:
            p.grad = torch.zeros_like(p)
        sam.loss(params[1] * 0.0, torch.sum)
        assert sam.perturb().item() == 0.0
        assert equal(values(params), before)
        sam.loss(params[1] * 0.0, torch.sum)
        sam.restore()
        assert all(p.grad.eq(0.0).all() for p in params)
        sam.count_step()


@every_member
@pytest.mark.parametrize("which", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_step_that_is_left_out_leaves_no_trace(member: Member, which: int, value: float) -> None:
    """A gradient that is not finite, in either pass: the mean of FriendlySAM was nan for ever after."""
    params, others = leaves(), leaves()
    sam, calm = started(member, named("adamw"), params), started(member, named("adamw"), others)
    cycle = len(member.reduces)
    steps(sam, params, 0, cycle)
    steps(calm, others, 0, cycle)
    before, state = values(params), state_of(sam)
    if sam.needs_ascent_gradient:
        one_pass(sam, params, 9)
        if which == 1:
            params[3].grad[0, 0] = value
    norm = sam.perturb()
    one_pass(sam, params, 9)
    if which == 2 or not sam.needs_ascent_gradient:
        params[3].grad[0, 0] = value
    elif which == 1:
        assert not norm.isfinite()
    sam.restore()
    assert not distopt.clip_grad_norm_(sam, 1.0).isfinite()
    assert equal(values(params), before)
    assert equal(state_of(sam), state)
    steps(sam, params, cycle, STEPS)
    steps(calm, others, cycle, STEPS)
    assert equal(values(params), values(others))
    assert equal(state_of(sam), state_of(calm))


# What is refused.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda sgd: distopt.ASAM(sgd, eta=-0.1), "eta must be a number >= 0, got -0.1"),
        (lambda sgd: distopt.ASAM(sgd, rho=0), "rho must be a number > 0, got 0; leave SAM out for rho = 0"),
        (lambda sgd: distopt.GSAM(sgd, alpha=-1), "alpha must be a number >= 0, got -1"),
        (lambda sgd: distopt.GSAM(sgd, alpha=math.inf), "alpha must be a number >= 0, got inf"),
        (lambda sgd: distopt.GSAM(sgd, alpha=math.nan), "alpha must be a number >= 0, got nan"),
        (lambda sgd: distopt.GSAM(sgd, alpha=True), "alpha must be a number >= 0, got True"),
        (lambda sgd: distopt.FriendlySAM(sgd, sigma=1.5), "sigma must be a number in [0, 1], got 1.5"),
        (lambda sgd: distopt.FriendlySAM(sgd, decay="1"), "decay must be a number in [0, 1], got '1'"),
        (lambda sgd: distopt.LookSAM(sgd, alpha=-0.5), "alpha must be a number >= 0, got -0.5"),
        (lambda sgd: distopt.LookSAM(sgd, interval=0), "interval must be an integer >= 1, got 0; 1 perturbs at every"),
        (lambda sgd: SAM(sgd, interval=1.5), "interval must be an integer >= 1, got 1.5"),
        (lambda sgd: SAM(sgd, interval=True), "interval must be an integer >= 1, got True"),
        (lambda sgd: SAM(sgd, scope="rank"), "scope must be one of global, local, got 'rank'"),
        (lambda sgd: distopt.MomentumSAM(sgd), "SGD has no momentum to perturb along: give it some, or use SAM"),
        (lambda sgd: distopt.PreconditionedSAM(sgd), "SGD has no second moments: use Adam, AdamW, LAMB or RMSprop"),
        (lambda sgd: distopt.FunctionalSAM(sgd), "SGD has no second moments"),
        (lambda sgd: distopt.PreconditionedSAM(distopt.AdamW(leaves()), eps=0), "eps must be a number > 0, got 0"),
        (
            lambda sgd: SAM(distopt.SGD([{"params": leaves(), "sam_rho": -1}])),
            "sam_rho of a param group must be a number >= 0, got -1",
        ),
        (
            lambda sgd: SAM(sgd).add_param_group({"params": leaves(), "sam_rho": "wide"}),
            "sam_rho of a param group must",
        ),
        (
            lambda sgd: SAM(sgd).add_param_group({"params": leaves(), "rho": 0.1}),
            "rho=0.1, which is no option of SGD: SAM's radius for a group is called sam_rho",
        ),
        (lambda sgd: SAM(SAM(sgd)), "the optimizer is a SAM already, and SAM around SAM is neither: use one"),
        (lambda sgd: distopt.LookSAM(distopt.ASAM(sgd)), "the optimizer is a ASAM already"),
        (lambda sgd: SAM(sgd.param_groups), "SAM goes around an optimizer, got list: make one first"),
        (
            lambda sgd: distopt.MomentumSAM(torch.optim.RMSprop(leaves())),
            "RMSprop has no momentum to perturb along: give it some, or use SAM",
        ),
    ],
)
def test_bad_arguments_are_refused(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(distopt.SGD(leaves()))


def test_functional_sam_refuses_passes_that_do_not_show_their_outputs() -> None:
    params = leaves()
    before = values(params)
    sam = distopt.FunctionalSAM(distopt.SGD(params), precondition=False)
    criterion(outputs(params, 0), 0).backward()
    with pytest.raises(RuntimeError, match=r"the first pass has shown no outputs: compute its loss by sam\.loss"):
        sam.perturb()
    one_pass(sam, params, 0)
    with pytest.raises(RuntimeError, match=r"the second pass has shown fewer outputs than the first"), sam.perturbed():
        pass
    assert equal(values(params), before)
    one_pass(sam, params, 0)
    with pytest.raises(RuntimeError, match=r"more outputs than the first: give both the same micro"), sam.perturbed():
        one_pass(sam, params, 0)
        one_pass(sam, params, 0)
    assert equal(values(params), before)
    steps(sam, params, 0, 1)
    assert not equal(values(params), before)


# What the second pass must not move.


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))


@every_member
def test_the_statistics_of_batch_norm_are_those_of_the_first_pass(member: Member) -> None:
    """The second pass, at other weights, moved them as well, and num_batches_tracked twice a step."""
    torch.manual_seed(0)
    model, x = Normed().double(), torch.randn(8, 3, dtype=torch.float64)
    optimizer = named("adamw").make(model.parameters(), lr=0.01)
    sam = member.make(optimizer, **({} if member.cls is distopt.MomentumSAM else {"model": model}))

    def closure() -> Tensor:
        sam.zero_grad()
        loss = sam.loss(model(x), lambda y: y.square().sum())
        loss.backward()
        return loss

    for step in range(STEPS):
        plain = copy.deepcopy(model)
        plain(x)
        sam.step(closure)
        assert model.norm.num_batches_tracked.item() == step + 1
        if sam.needs_ascent_gradient:
            assert torch.equal(model.norm.running_mean, plain.norm.running_mean)
            assert torch.equal(model.norm.running_var, plain.norm.running_var)
        assert not torch.equal(model.first.weight, plain.first.weight)


@every_member
def test_both_passes_draw_the_same_and_the_generator_ends_as_after_one(member: Member) -> None:
    params = leaves()
    sam = started(member, named("adamw"), params)
    drawn: list[Tensor] = []

    def closure() -> Tensor:
        drawn.append(torch.rand(3))
        if len(drawn) == 2:
            torch.rand(5)  # whatever more the second pass draws
        return one_pass(sam, params, 0)

    torch.manual_seed(3)
    for _ in range(4):
        passes = 2 if sam.needs_ascent_gradient and sam.ascends else 1
        drawn.clear()
        before = torch.get_rng_state()
        sam.step(closure)
        after = torch.get_rng_state()
        assert len(drawn) == passes
        assert equal(drawn, [drawn[0]] * passes)
        torch.set_rng_state(before)
        torch.rand(3)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_look_sam_does_not_scale_up_the_rounding_of_parallel_gradients(dtype: torch.dtype) -> None:
    """The gradients of a single weight are parallel, so that v is 0. The rounding of v moved it by alpha |g|."""
    for start in torch.linspace(0.3, 2.0, 20, dtype=dtype):
        p = start[None].clone().requires_grad_()
        sam = LookSAM(SGD([p], lr=0.01), rho=0.5, interval=2, alpha=0.7)

        def closure(sam: LookSAM = sam, p: Tensor = p) -> Tensor:
            sam.zero_grad()
            loss = (p**3).sum()
            loss.backward()
            return loss

        sam.step(closure)
        before = p.detach().clone()
        sam.step(closure)
        assert torch.allclose(p, before - 0.01 * 3.0 * before**2, rtol=1e-6)  # v would have moved it by 0.5 %
