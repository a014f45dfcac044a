"""Every rule against its oracle in float64, and against torch's optimizer of the same name where there is one."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt import ADOPT, LAMB, LARS, SGD, AdamW, AdEMAMix, RMSprop, ShardedOptimizer
from distopt.kernels import shards
from tests.harness import oracles
from tests.harness.optimizers import ROWS, Row, distance, every_peer, every_row, every_separate, initial, named, pull

STEPS = 20
# float64: 20 steps of about ten roundings of 1e-16 each; float32 the same with 6e-8, and a square root in between.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6}
SHAPES = ((), (7,), (1,), (5, 3), (4, 6), (2, 0))
LONG = shards._SLICE + 3


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Parameters of all SHAPES, an all-zero one, and one that is transposed and so not contiguous."""
    tensors = [*initial(*SHAPES, dtype=dtype), torch.zeros(4, 3, dtype=dtype), initial((3, 4), dtype=dtype)[0].t()]
    return [t.requires_grad_() for t in tensors]


def trajectory(opt: ShardedOptimizer, params: list[Tensor], steps: int, sign: float = 1.0) -> Iterator[list[Tensor]]:
    for step in range(steps):
        opt.zero_grad()
        (sign * pull(params, step)).backward()
        opt.step()
        yield [p.detach() for p in params]


@every_row
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_step_equals_the_oracle(row: Row, dtype: torch.dtype) -> None:
    params = leaves(dtype)
    expected = row.expected(params, oracles.gradient_of(pull), STEPS)
    for step, ours in enumerate(trajectory(row.make(row.groups(params)), params, STEPS)):
        error = distance(ours, expected[step])
        assert error < TOLERANCE[dtype], step
        assert all(p.dtype == dtype for p in ours)


@every_row
def test_slices_change_nothing(row: Row) -> None:
    """On the CPU a rule gets several short layers at once, a long one in slices, and one that is long but not
    contiguous in full."""
    transposed = initial((2, LONG))[0].t()
    params = [*initial((7,), (LONG,), (5, 3), (3, LONG // 2)), transposed, *initial((4, 4))]
    params = [p.requires_grad_() for p in params]
    assert not transposed.is_contiguous()
    expected = row.expected(params, oracles.gradient_of(pull), 3)
    ours = [*trajectory(row.make(row.groups(params)), params, 3)][-1]
    error = distance(ours, expected[-1])
    assert error < TOLERANCE[torch.float64]


@every_separate
def test_layers_do_not_affect_each_other(row: Row) -> None:
    """Bit for bit as if each had an optimizer of its own; they have taken different numbers of steps and are in several
    slices."""
    shapes = (5, 3), (LONG,), (4, 4), (2, LONG), (3, 3)
    together, alone = ([p.requires_grad_() for p in initial(*shapes)] for _ in range(2))
    optimizers = [row.make(together), *[row.make([p]) for p in alone]]
    for step in range(4):
        for i, params in enumerate(zip(together, alone)):
            for p in params:
                p.grad = None if (step + i) % 3 == 0 else p.detach() - 2.0 - i
        for opt in optimizers:
            opt.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone))


@every_row
def test_maximize_ascends(row: Row) -> None:
    params = leaves()
    expected = row.expected(params, oracles.gradient_of(pull), STEPS)
    ours = [*trajectory(row.make(row.groups(params), maximize=True), params, STEPS, sign=-1.0)][-1]
    assert distance(ours, expected[-1]) < TOLERANCE[torch.float64]


@every_row
def test_a_zero_gradient_decays_and_makes_no_nan(row: Row) -> None:
    params = [p.requires_grad_() for p in [*initial((3, 3), (5,)), torch.zeros(2, 2, dtype=torch.float64)]]
    opt = row.make(row.groups(params))
    expected = row.expected(params, lambda params, step: [torch.zeros_like(p) for p in params], STEPS)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.step()
    assert distance([p.detach() for p in params], expected[-1]) < TOLERANCE[torch.float64]


@every_separate
def test_a_parameter_without_gradient_does_not_change(row: Row) -> None:
    """One that has a gradient every other step is, after 20 steps, where ten steps of its own lead: neither its step
    count nor its moments change in between. Gradients here depend on nothing else."""

    def grad(params: list[Tensor], step: int) -> list[Tensor]:
        return [p - 2.0 - torch.sin(torch.tensor(3.0 * step)) for p in params]

    often, seldom, never = params = [p.requires_grad_() for p in initial((4, 3), (3, 4), (2, 3))]
    opt = row.make(params)
    expected = [row.expected([p], grad, STEPS) for p in params]
    for step in range(STEPS):
        opt.zero_grad()
        (often.grad,) = grad([often.detach()], step)
        if step % 2:
            (seldom.grad,) = grad([seldom.detach()], step // 2)
        opt.step()
    assert distance([often.detach()], expected[0][-1]) < 1e-13
    assert distance([seldom.detach()], expected[1][STEPS // 2 - 1]) < 1e-13
    assert torch.equal(never, initial((4, 3), (3, 4), (2, 3))[2])
    assert [opt.state[p]["step"].item() for p in params] == [STEPS, STEPS // 2, 0]


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_keep_their_dtype_and_state_has_float32_or_wider(row: Row, dtype: torch.dtype) -> None:
    params = [p.requires_grad_() for p in initial((5, 3), (7,), dtype=dtype)]
    exact = row.expected(params, oracles.gradient_of(pull), 3)[-1]
    opt = row.make(row.groups(params))
    for ours in trajectory(opt, params, 3):
        assert {p.dtype for p in ours} == {dtype}
    state = {name: value.dtype for p in params for name, value in opt.state[p].items()}
    wide = torch.promote_types(dtype, torch.float32)
    counts = {"step": torch.float32, **dict.fromkeys(row.counts[1:], torch.float64)}
    assert state == dict.fromkeys(state, wide) | counts
    assert ("master" in state) == (dtype == torch.bfloat16)
    # Three steps from below 0.5, each rounded to 8 bits.
    assert distance(ours, exact) < (0.02 if dtype == torch.bfloat16 else 1e-13)


@pytest.mark.parametrize("cls", [SGD, LARS], ids=["trust_ratio", "rates"])
def test_a_bfloat16_neighbour_costs_a_float32_layer_no_accuracy(cls: type[ShardedOptimizer]) -> None:
    """The ratios of a group took the dtype of its first parameter: a float32 layer behind a bfloat16 one was
    scaled by a ratio of 8 bits."""

    def stepped(*params: Tensor) -> Tensor:
        for p in params:
            p.grad = torch.full_like(p, 0.7) + p.detach()
        cls(params, lr=0.1, trust_ratio=True).step()
        return params[-1].detach()

    low, alone = initial((3, 4), (4, 3), dtype=torch.float32)
    neighbour, beside = low.bfloat16().requires_grad_(), alone.clone().requires_grad_()
    assert torch.equal(stepped(neighbour, beside), stepped(alone.requires_grad_()))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centered_rmsprop_survives_a_constant_gradient(momentum: float) -> None:
    """The mean of squares less the square of the mean is 0 then, and rounds below it: its root was nan after some 100
    steps, as in torch 2.13."""
    p = torch.zeros(100, requires_grad=True)
    opt = RMSprop([p], lr=1e-6, alpha=0.9, centered=True, eps=1e-3, momentum=momentum)
    p.grad = torch.linspace(0.1, 1.0, 100)
    for _ in range(300):
        opt.step()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.cls is not LARS and row.may_trust], ids=lambda row: row.name
)
def test_any_rule_may_have_a_trust_ratio(row: Row) -> None:
    """Along its own direction, each layer changes by lr times its norm; the first step that moves it shows the
    direction."""
    steps = range(2 if row.cls is ADOPT else 1)  # ADOPT's first step moves nothing, with a ratio of 1
    free, held = ([p.requires_grad_() for p in initial((5, 3), (7,))] for _ in range(2))
    before = [p.detach().clone() for p in held]
    walk(row.make(free, trust_ratio=False, lr=1.0), free, steps)
    walk(row.make(held, trust_ratio=True, trust_clip=None, lr=0.01), held, steps)
    for p, q, b in zip(free, held, before):
        direction = p.detach() - b
        assert distance([q], [b + 0.01 * b.norm() / direction.norm() * direction]) < 1e-15


@pytest.mark.parametrize("kwargs", [{}, {"dampening": 0.5}, {"nesterov": True}, {"momentum": 0.0}], ids=str)
def test_lars_without_its_ratio_is_sgd(kwargs: dict[str, Any]) -> None:
    kwargs = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1} | kwargs
    ours, theirs = ([p.requires_grad_() for p in initial((5, 3), (7,))] for _ in range(2))
    walk(LARS(ours, trust_ratio=False, **kwargs), ours, range(5))
    walk(SGD(theirs, **kwargs), theirs, range(5))
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs))


@pytest.mark.parametrize("start, end", [(0.9, 0.9999), (0.0, 0.999), (0.9, 0.0), (0.0, 0.0), (0.999, 0.9)])
def test_ademamix_raises_the_half_life_of_its_slow_average_linearly(start: float, end: float) -> None:
    """A constant gradient shows each step's beta3: m2 <- beta3 m2 + (1 - beta3). 0 has a half-life of 0: its logarithm
    was taken. The relative rounding of a half-life of 7,000 steps is that of 1 - beta3, 1e-16 / 1e-4."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    opt = AdEMAMix([p], betas=(start, 0.9), beta3=end, slow_warmup=8)
    half_lives, slow = [], 0.0
    for _ in range(10):
        p.grad = torch.ones_like(p)
        opt.step()
        now = opt.state[p]["exp_avg_slow"].item()
        beta3 = (1.0 - now) / (1.0 - slow) if slow < 1.0 else 0.0
        half_lives.append(math.log(0.5) / math.log(beta3) if beta3 > 0.0 else 0.0)
        slow = now
    first, last = (math.log(0.5) / math.log(beta) if beta else 0.0 for beta in (start, end))
    shares = [min(step / 8, 1.0) for step in range(1, 11)]
    assert half_lives == pytest.approx([(1 - s) * first + s * last for s in shares], rel=1e-9, abs=1e-9)


def test_adopt_bounds_a_scaled_gradient_by_a_power_of_the_step() -> None:
    """A gradient that grows 100 times is 1 at the second step, and 2^0.25 at the third, however large it is."""
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    opt = ADOPT([p], lr=1.0, betas=(0.0, 0.0))
    for size, moved in ((1.0, 0.0), (100.0, 1.0), (1e4, 1.0 + 2**0.25)):
        p.grad = torch.tensor([size, -size], dtype=torch.float64)
        opt.step()
        assert p.tolist() == pytest.approx([-moved, moved], rel=1e-15)


def test_a_ratio_of_an_infinite_gradient_is_not_finite() -> None:
    """An overflow has to be visible in the parameters, if nobody looked at the norm before."""
    p = torch.ones(2, 2, requires_grad=True)
    p.grad = torch.full_like(p, torch.inf)
    LAMB([p], lr=0.1).step()
    assert not torch.isfinite(p).any()


# What torch.optim users bring along.


def both(row: Row) -> tuple[list[Tensor], ShardedOptimizer, list[Tensor], torch.optim.Optimizer]:
    ours, theirs = ([p.requires_grad_() for p in initial((), (7,), (5, 3), (3, 4))] for _ in range(2))
    return ours, row.make(row.groups(ours)), theirs, row.make_peer(row.groups(theirs))


def walk(opt: torch.optim.Optimizer, params: list[Tensor], steps: range) -> None:
    """The last parameter has no gradient at step 2."""
    for step in steps:
        opt.zero_grad()
        pull(params, step).backward()
        if step == 2:
            params[-1].grad = None
        opt.step()


@every_peer
def test_equals_torch(row: Row) -> None:
    ours, opt, theirs, peer = both(row)
    walk(opt, ours, range(STEPS))
    walk(peer, theirs, range(STEPS))
    assert distance(ours, theirs) < 1e-13
    for a, b in zip(ours, theirs):
        buffers = {name: value for name, value in peer.state[b].items() if value is not None}
        # SGD of torch counts no steps; ours does, to know the first.
        assert opt.state[a].keys() - {"step"} == buffers.keys() - {"step"}
        assert list(opt.state[a]) == ["step", *opt.rule(opt.param_groups[0]).names(a.shape)]
        for name, value in buffers.items():
            assert opt.state[a][name].shape == value.shape
            assert distance([opt.state[a][name]], [value]) < 1e-13, name


@every_peer
@pytest.mark.parametrize("by", ["copy", "file"])
def test_state_dicts_go_to_torch_and_back(row: Row, by: str) -> None:
    """Five steps by one, five by the other with the state of the first: as ten by torch alone, both ways round."""
    ours, opt, theirs, peer = both(row)
    walk(opt, ours, range(5))
    walk(peer, theirs, range(5))
    swapped_ours, swapped_opt, swapped_theirs, swapped_peer = both(row)
    for p, q in zip([*swapped_ours, *swapped_theirs], [*theirs, *ours]):
        p.data.copy_(q.data)
    swapped_opt.load_state_dict(passed(peer.state_dict(), by))
    swapped_peer.load_state_dict(passed(opt.state_dict(), by))
    for params, whichever in ((theirs, peer), (swapped_ours, swapped_opt), (swapped_theirs, swapped_peer)):
        walk(whichever, params, range(5, 10))
    assert distance(swapped_ours, theirs) < 1e-13
    assert distance(swapped_theirs, theirs) < 1e-13


def passed(state_dict: dict[str, Any], by: str) -> dict[str, Any]:
    """A copy, since load_state_dict of torch keeps the very tensors that it is given."""
    if by == "copy":
        return copy.deepcopy(state_dict)
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_row
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_state_dict_resumes_where_it_was_saved(row: Row, after: int) -> None:
    """Bit for bit, also one that was saved before the first step."""
    params, again = ([p.requires_grad_() for p in initial((5, 3), (7,))] for _ in range(2))
    first, second = row.make(row.groups(params)), row.make(row.groups(again), lr=9.0, weight_decay=9.0)
    walk(first, params, range(after))
    second.load_state_dict(passed(first.state_dict(), "file"))
    for p, q in zip(again, params):
        p.data.copy_(q.data)
    walk(first, params, range(after, 10))
    walk(second, again, range(after, 10))
    assert all(torch.equal(p, q) for p, q in zip(params, again))


def test_amsgrad_is_refused_and_nothing_is_loaded() -> None:
    p = torch.ones(2, requires_grad=True)
    theirs = torch.optim.AdamW([p], lr=7.0, amsgrad=True)
    p.grad = torch.ones(2)
    theirs.step()
    ours = AdamW([p])
    with pytest.raises(ValueError, match=r"amsgrad=True: distopt keeps no maximum"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1e-3
    assert not ours.state


def test_options_missing_from_a_state_dict_stay_as_they_were() -> None:
    """torch's groups know no trust_ratio: on loading, biases got that of the constructor's default, True."""
    weight, bias = initial((3, 4), (4,))
    groups = [{"params": [weight]}, {"params": [bias], "trust_ratio": False}]
    theirs = torch.optim.AdamW([{"params": [weight]}, {"params": [bias]}], lr=7.0)
    ours = LAMB(groups, trust_clip=(0.1, 1.0))
    ours.load_state_dict(theirs.state_dict())
    assert [g["trust_ratio"] for g in ours.param_groups] == [True, False]
    assert [g["trust_clip"] for g in ours.param_groups] == [(0.1, 1.0)] * 2
    assert [g["lr"] for g in ours.param_groups] == [7.0] * 2


@every_row
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_trains_alike(row: Row, how: str) -> None:
    params = [p.requires_grad_() for p in initial((5, 3), (7,))]
    first = row.make(row.groups(params))
    walk(first, params, range(3))
    second = copy.deepcopy(first) if how == "deepcopy" else pickle.loads(pickle.dumps(first))
    again = [p for group in second.param_groups for p in group["params"]]
    assert not {id(p) for p in again} & {id(p) for p in params}
    assert type(second) is type(first)
    walk(second, again, range(3, 6))
    walk(first, params, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, again))


@every_row
def test_closure_and_hooks_run_as_in_torch(row: Row) -> None:
    (p,) = initial((5, 3))
    p.requires_grad_()
    opt = row.make([p])
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        calls.append("closure")
        opt.zero_grad()
        loss = pull([p], 0)
        loss.backward()
        return loss

    expected = row.expected([p], oracles.gradient_of(pull), 1)[-1]
    loss = pull([p], 0)
    assert torch.equal(opt.step(closure), loss)
    assert calls == ["pre", "closure", "post"]
    assert distance([p.detach()], expected) < 1e-13
    assert opt.step() is None
    opt.zero_grad()
    assert p.grad is None


@every_separate
def test_a_group_added_later_starts_at_its_first_step(row: Row) -> None:
    def grad(params: list[Tensor], step: int) -> list[Tensor]:
        return [p - 2.0 for p in params]

    first, second = initial((5, 3), (4, 2))
    expected = [row.expected([p], grad, 8) for p in (first, second)]
    opt = row.make([first.requires_grad_()])
    for step in range(8):
        if step == 3:
            opt.add_param_group({"params": [second.requires_grad_()]})
        for group in opt.param_groups:
            for p in group["params"]:
                (p.grad,) = grad([p.detach()], step)
        opt.step()
    assert distance([first.detach()], expected[0][7]) < 1e-13
    assert distance([second.detach()], expected[1][4]) < 1e-13


def test_groups_of_names_and_of_parameters_are_the_same() -> None:
    model = nn.Linear(3, 2)
    opt = AdamW(model.named_parameters())
    assert opt.param_groups[0]["param_names"] == ["weight", "bias"]
    assert opt.param_groups[0]["params"] == [model.weight, model.bias]


def test_the_table_names_every_optimizer_once() -> None:
    """A new optimizer without a row would not be tested."""
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert named("lamb").cls is LAMB
    assert {row.cls for row in ROWS} == {*concrete(ShardedOptimizer)}


def concrete(cls: type[ShardedOptimizer]) -> Iterator[type]:
    for sub in cls.__subclasses__():
        if sub.__module__.startswith("distopt") and sub.__name__ in distopt.__all__:  # no base of others
            yield sub
        yield from concrete(sub)
