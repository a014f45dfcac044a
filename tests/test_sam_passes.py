"""SAM's two passes: gradients that one of them lacks, closures of other people, random numbers, what state there is."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import SAM
from distopt.engine.fsdp2 import reshard
from distopt.rng import random_state, same_random_numbers
from tests.harness import oracles_sam
from tests.harness.distributed import run
from tests.harness.optimizers import distance, initial
from tests.harness.oracles import Grad, gradient_of
from tests.harness.sharded import mesh

RHO, LR = 0.3, 0.1
SHAPES = ((5, 3), (4,), (3, 4), (2, 2), (3,))
STEPS = 8


# A model of which each pass of each step uses other parameters: routed experts, dropped layers.


def used(step: int, which: int) -> set[int]:
    """The parameters that a pass uses. Over the steps each of the last four is in both, in one, and in neither."""
    return {0, *(i for i in range(1, len(SHAPES)) if (step + which * i + i * i) % 3)}


def routed_loss(params: list[Tensor], step: int, which: int) -> Tensor:
    """The loss of those parameters, bent, and of their products with the first."""
    parts = [torch.sin(params[i] + 0.3 * step + i).square().mean() for i in sorted(used(step, which))]
    return sum(parts) * (1.0 + params[0].mean().square())


def routed_grad(which: int) -> Grad:
    """As torch leaves it: None for what the pass did not use."""

    def grad(params: list[Tensor], step: int) -> list[Any]:
        there = sorted(used(step, which))
        found = gradient_of(
            lambda some, step: routed_loss(
                [dict(zip(there, some)).get(i, p) for i, p in enumerate(params)], step, which
            )
        )([params[i] for i in there], step)
        return [dict(zip(there, found)).get(i) for i in range(len(params))]

    return grad


FIRST, SECOND = routed_grad(0), routed_grad(1)
MEMBERS: dict[str, tuple[Callable[..., SAM], Callable[[], Grad]]] = {
    "SAM": (SAM, lambda: oracles_sam.sam(FIRST, RHO, SECOND)),
    "ASAM": (partial(distopt.ASAM, eta=0.02), lambda: oracles_sam.asam(FIRST, RHO, 0.02, SECOND)),
    "GSAM": (partial(distopt.GSAM, alpha=0.6), lambda: oracles_sam.gsam(FIRST, RHO, 0.6, SECOND)),
    "FriendlySAM": (
        partial(distopt.FriendlySAM, sigma=0.8, decay=0.7),
        lambda: oracles_sam.friendly_sam(FIRST, RHO, 0.8, 0.7, SECOND),
    ),
    "LookSAM": (
        partial(distopt.LookSAM, interval=3, alpha=0.5),
        lambda: oracles_sam.look_sam(FIRST, RHO, 3, 0.5, SECOND),
    ),
    "PreconditionedSAM": (
        partial(distopt.PreconditionedSAM, eps=0.1),
        lambda: oracles_sam.preconditioned_sam(FIRST, RHO, 0.9, 0.1, SECOND),
    ),
    "MomentumSAM": (distopt.MomentumSAM, lambda: oracles_sam.momentum_sam(FIRST, RHO, decay=0.9, weight=1.0)),
    "FunctionalSAM": (partial(distopt.FunctionalSAM, precondition=False), lambda: oracles_sam.sam(FIRST, RHO, SECOND)),
}


def optimizer_of(name: str, library: Any, params: Any) -> torch.optim.Optimizer:
    """Without weight decay, so that a parameter that is left alone stays where it is."""
    if name == "PreconditionedSAM":
        return library.RMSprop(params, lr=LR, alpha=0.9, eps=0.1, **{"weight_decay": 0.0})
    return library.SGD(params, lr=LR, momentum=0.9 if name == "MomentumSAM" else 0.0)


def expected_of(name: str) -> list[Tensor]:
    """By the oracle, with the few lines that RMSprop and SGD are."""
    grad = MEMBERS[name][1]()
    params = initial(*SHAPES)
    memory = [torch.zeros_like(p) for p in params]
    for step in range(STEPS):
        for i, g in enumerate(grad(params, step)):
            if g is None:
                continue
            if name == "PreconditionedSAM":
                memory[i] = 0.9 * memory[i] + 0.1 * g**2
                g = g / (memory[i].sqrt() + 0.1)
            elif name == "MomentumSAM":
                g = memory[i] = 0.9 * memory[i] + g
            params[i] = params[i] - LR * g
    return params


def routed_step(sam: SAM, run_pass: Callable[[int, int], None], step: int) -> None:
    """One step by hand; a pass is given the step and its own number, and clears the gradients first."""
    if sam.needs_ascent_gradient:
        run_pass(step, 0)
    sam.perturb()
    if not sam.needs_ascent_gradient:
        run_pass(step, 0)
    elif sam.ascends:
        run_pass(step, 1)
    sam.restore()
    sam.step()


@pytest.mark.parametrize("library", [torch.optim, distopt], ids=["torch", "distopt"])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_parameter_that_one_pass_does_not_use(name: str, library: Any) -> None:
    """GSAM and LookSAM raised on lists of two lengths; of the second pass alone a gradient was not descended."""
    params = [p.requires_grad_() for p in initial(*SHAPES)]
    sam = MEMBERS[name][0](optimizer_of(name, library, params), RHO)

    def run_pass(step: int, which: int) -> None:
        sam.zero_grad()
        sam.loss(routed_loss(params, step, which), lambda loss: 1.0 * loss).backward()

    for step in range(STEPS):
        routed_step(sam, run_pass, step)
    assert distance([p.detach() for p in params], expected_of(name)) < 1e-12


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in ("MomentumSAM", "FunctionalSAM")])
def test_state_that_torchs_adam_has_not_made_yet_is_left_to_it(name: str) -> None:
    """It makes its own where a parameter has none at all: FriendlySAM's mean of an unstepped one was a KeyError."""
    ends = []
    for library in (torch.optim, distopt):
        params = [p.requires_grad_() for p in initial(*SHAPES)]
        sam = MEMBERS[name][0](library.Adam(params, lr=LR), RHO)
        for step in range(4):
            for which in (0, 1):
                sam.zero_grad()
                routed_loss(params, step, which if step else 1 - which).backward()
                (sam.perturb, sam.restore)[which]()
            sam.step()
        ends.append([p.detach() for p in params])
    assert distance(*ends) < 1e-9


class Routed(nn.Module):
    """The parameters, used as each pass of each step says; the sample moves the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(initial(*SHAPES))

    def forward(self, step: int, which: int, sample: float) -> Tensor:
        return routed_loss(list(self.weights), step, which) * (1.0 + sample)


def routed_on(kind: str, world: int) -> dict[str, list[Tensor]]:
    """All members on one layout; rank 0's sample is the half and the last rank's the double of the difference."""
    ends = {}
    for name in MEMBERS:
        model: nn.Module = Routed()
        if kind in ("fsdp2", "hsdp"):
            model = fully_shard(
                model, mesh=mesh((world,), ("shard",)) if kind == "fsdp2" else mesh((2, 2), ("replicate", "shard"))
            )
        else:
            model = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = optimizer_of(name, distopt, model.parameters())
        if kind.startswith("zero1"):
            optimizer.bind(getattr(distopt.layout, kind)(model))
        sam = MEMBERS[name][0](optimizer, RHO)
        sample = 0.5 if dist.get_rank() % 2 else -0.5

        def run_pass(step: int, which: int, model: nn.Module = model, sam: SAM = sam, sample: float = sample) -> None:
            sam.zero_grad()
            reshard(model)
            sam.loss(model(step, which, sample), lambda loss: 1.0 * loss).backward()

        for step in range(STEPS):
            routed_step(sam, run_pass, step)
        assert optimizer.layout  # waits
        with torch.no_grad():
            ends[name] = [(p.full_tensor() if isinstance(p, DTensor) else p).clone() for p in model.parameters()]
    return ends


@pytest.mark.parametrize(
    ("kind", "world"), [("ddp", 2), ("zero1", 2), ("zero1_scattered", 2), ("fsdp2", 2), ("hsdp", 4)]
)
def test_on_every_layout_a_pass_may_lack_parameters(kind: str, world: int) -> None:
    expected = {name: expected_of(name) for name in MEMBERS}
    for ends in run(world, routed_on, kind, world):
        for name, end in ends.items():
            assert distance(end, expected[name]) < 1e-12, name


# Groups.


NORMS_ONLY = [0.0, RHO, 0.0, 0.0, RHO]


@pytest.mark.parametrize(
    ("make", "oracle"),
    [
        (SAM, lambda grad: oracles_sam.sam(grad, NORMS_ONLY)),
        (partial(distopt.ASAM, eta=0.02), lambda grad: oracles_sam.asam(grad, NORMS_ONLY, 0.02)),
        (partial(distopt.GSAM, alpha=0.6), lambda grad: oracles_sam.gsam(grad, NORMS_ONLY, 0.6)),
        (partial(distopt.LookSAM, interval=2), lambda grad: oracles_sam.look_sam(grad, NORMS_ONLY, 2, 0.7)),
        (distopt.MomentumSAM, lambda grad: oracles_sam.momentum_sam(grad, NORMS_ONLY, decay=0.9, weight=1.0)),
    ],
    ids=["SAM", "ASAM", "GSAM", "LookSAM", "MomentumSAM"],
)
def test_sam_rho_0_leaves_a_group_out_of_the_perturbation_and_of_its_norm(make: Any, oracle: Any) -> None:
    """SAM-ON (arXiv 2306.04226) perturbs the norm layers alone; a rho of 0 was refused. All are stepped."""
    params = [p.requires_grad_() for p in initial(*SHAPES)]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "sam_rho": 0.0},
        {"params": [p for p in params if p.ndim < 2]},
    ]
    sam = make(torch.optim.SGD(groups, lr=LR, momentum=0.9), RHO)

    def loss(params: list[Tensor], step: int) -> Tensor:
        return sum(torch.sin(p + i).square().mean() for i, p in enumerate(params)) * (1.0 + params[0].mean().square())

    def closure() -> Tensor:
        sam.zero_grad()
        value = loss(params, step)
        value.backward()
        return value

    grad = oracle(gradient_of(loss))
    expected, momenta = initial(*SHAPES), [torch.zeros_like(p) for p in initial(*SHAPES)]
    for step in range(5):
        momenta = [0.9 * m + g for m, g in zip(momenta, grad(expected, step))]
        expected = [p - LR * m for p, m in zip(expected, momenta)]
        sam.step(closure)
        assert distance([p.detach() for p in params], expected) < 1e-12, step


def test_adadeltas_rho_is_adadeltas() -> None:
    """It was taken for the radius: 0.9 where 0.05 was asked for."""
    p = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    sam = SAM(torch.optim.Adadelta([p], rho=0.9), rho=0.05)
    p.grad = torch.tensor([3.0, 4.0], dtype=torch.float64)
    sam.perturb()
    assert p.tolist() == pytest.approx([0.03, 0.04])
    sam.restore()
    sam.param_groups[0]["sam_rho"] = 0.5
    sam.perturb()
    assert p.tolist() == pytest.approx([0.3, 0.4])


def test_the_first_group_may_be_empty_and_the_count_of_steps_outlives_it() -> None:
    """An IndexError; and the count of `interval` was in the first group alone, which may be replaced."""
    p = torch.ones(2, requires_grad=True)
    sam = SAM(distopt.SGD([{"params": []}, {"params": [p]}], lr=0.1), interval=3)
    seen = []
    for step in range(6):
        if step == 4:
            sam.param_groups = sam.param_groups[1:]
            sam.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
        seen.append(sam.ascends)
        sam.step(partial(squared, sam, p))
    assert seen == [True, False, False, True, False, False]
    assert [group["sam_steps"] for group in sam.param_groups] == [6, 6]


def squared(sam: SAM, p: Tensor) -> Tensor:
    sam.zero_grad()
    loss = p.square().sum()
    loss.backward()
    return loss


def test_arguments_after_rho_have_names() -> None:
    """The third had six meanings in the family."""
    for kind in (SAM, distopt.ASAM, distopt.GSAM, distopt.LookSAM, distopt.FriendlySAM, distopt.FunctionalSAM):
        with pytest.raises(TypeError, match="positional argument"):
            kind(distopt.AdamW([torch.ones(1)]), 0.1, 1)
    for kind in (distopt.PreconditionedSAM, distopt.MomentumSAM):
        with pytest.raises(TypeError, match="positional argument"):
            kind(distopt.AdamW([torch.ones(1)]), 0.1, 1)


# Closures. Those of Lightning (2.6), from core/optimizer.py, loops/optimization/automatic.py and plugins/precision.


def do_nothing_closure() -> None:
    return


class LightningClosure:
    """`training_step`, `zero_grad` at the first micro-batch of a step, and backward, whose loss is divided."""

    def __init__(self, loss: Callable[[], Tensor], zero_grad: Callable[[], None] | None, accumulate: int) -> None:
        self.loss, self.zero_grad, self.accumulate = loss, zero_grad, accumulate

    @torch.enable_grad()
    def __call__(self) -> Tensor:
        loss = self.loss() / self.accumulate
        kept = loss.detach().clone()
        if self.zero_grad is not None:
            self.zero_grad()
        loss.backward()
        return kept


class LightningOptimizer:
    """`step()` gives the optimizer a closure in any case, and the strategy wraps it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (self.__class__, type(optimizer)), {})

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        closure = closure or do_nothing_closure
        return self._optimizer.step(closure=partial(self._wrap_closure, closure), **kwargs)

    def _wrap_closure(self, closure: Callable[[], Any]) -> Any:
        result = closure()
        self._clip()
        return result

    def _clip(self) -> None:
        """After each call, in automatic optimization, if `gradient_clip_val` is set."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def fit(optimizer: LightningOptimizer, loss: Callable[[int], Tensor], batches: int, accumulate: int) -> list[Any]:
    """Lightning's automatic optimization of one epoch; what the closures of the steps returned."""
    results = []
    for i in range(batches):
        zero_grad = optimizer.zero_grad if i % accumulate == 0 else None
        closure = LightningClosure(partial(loss, i), zero_grad, accumulate)
        if (i + 1) % accumulate == 0 or i + 1 == batches:
            results.append(optimizer.step(closure))
        else:
            closure()
    return results


class Regression:
    """A model, its data, and one of the family around AdamW."""

    def __init__(self, kind: Callable[..., SAM], **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.x = nn.Linear(8, 1).double(), torch.randn(64, 8, dtype=torch.float64)
        self.sam = kind(distopt.AdamW(self.model.parameters(), lr=0.01), rho=0.1, **options)

    def loss(self, i: int = 0) -> Tensor:
        return self.sam.loss((self.model(self.x.roll(i, 0)[:16]).sin() - 1), lambda y: y.square().mean())

    def closure(self) -> Tensor:
        self.sam.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    @property
    def end(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


FAMILY = (
    SAM,
    distopt.ASAM,
    distopt.GSAM,
    distopt.LookSAM,
    distopt.FriendlySAM,
    distopt.MomentumSAM,
    distopt.PreconditionedSAM,
    distopt.FunctionalSAM,
)
every_kind = pytest.mark.parametrize("kind", FAMILY)


@every_kind
def test_lightnings_manual_optimization(kind: Any) -> None:
    """Its step() gives a closure that does nothing, which SAM took for the passes: LookSAM's and FriendlySAM's part in
    the gradient came twice."""
    ends = []
    for wrap in (lambda sam: sam, LightningOptimizer):
        task = Regression(kind)
        optimizer = wrap(task.sam)
        for _ in range(7):
            if task.sam.needs_ascent_gradient:
                task.closure()
            with task.sam.perturbed():
                if task.sam.ascends or not task.sam.needs_ascent_gradient:
                    task.closure()
            optimizer.step()
        ends.append(task.end)
    assert distance(*ends) == 0.0


@every_kind
def test_lightnings_automatic_optimization(kind: Any) -> None:
    """One closure for each step, which clears."""
    ends = []
    for lightning in (False, True):
        task = Regression(kind)
        if lightning:
            losses = fit(LightningOptimizer(task.sam), task.loss, 5, 1)
            assert all(loss is not None for loss in losses)
        else:
            for i in range(5):
                task.sam.step(LightningClosure(partial(task.loss, i), task.sam.zero_grad, 1))
        ends.append(task.end)
    assert distance(*ends) == 0.0


@every_kind
@pytest.mark.parametrize("clear", [True, False], ids=["None", "zeros"])
def test_lightnings_accumulation_is_refused(kind: Any, clear: bool) -> None:
    """Its closure runs the last micro-batch alone, and adds: the second pass lacked all others, without a word."""
    task = Regression(kind)
    before = task.end
    if not clear:  # gradients that are zero are no others' gradients
        task.closure()
        task.sam.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match=r"the closure adds to gradients that were there before it.*in Lightning"):
        fit(LightningOptimizer(task.sam), task.loss, 4, 2)
    assert distance(task.end, before) == 0.0
    fit(LightningOptimizer(task.sam), task.loss, 3, 1)  # weights are as before, and it goes on


CLOSURES: dict[str, Callable[[Regression], Any]] = {
    "clears": lambda task: task.closure(),
    "clears through the model": lambda task: (task.model.zero_grad(), task.loss().backward()),
    "clears in place": lambda task: (task.sam.zero_grad(set_to_none=False), task.loss().backward()),
    "clears in place, through the model": lambda task: (task.model.zero_grad(False), task.loss().backward()),
    "clears after the forward pass": lambda task: (loss := task.loss(), task.sam.zero_grad(), loss.backward()),
    "in two micro-batches": lambda task: (
        task.sam.zero_grad(),
        (task.loss() / 2).backward(),
        (task.loss() / 2).backward(),
    ),
}


@every_kind
@pytest.mark.parametrize("way", CLOSURES)
def test_closures_may_clear_in_any_way(kind: Any, way: str) -> None:
    ends = []
    for closure in (CLOSURES["clears"], CLOSURES[way]):
        task = Regression(kind)
        for _ in range(4):
            task.sam.step(partial(closure, task))
        ends.append(task.end)
    assert distance(*ends) < 1e-12


@every_kind
def test_a_closure_may_leave_the_clearing_to_the_loop(kind: Any) -> None:
    """The second pass added to the gradients of the first. Zeros are taken for gradients: to read them would wait."""
    ends = []
    for clears in (True, False):
        task = Regression(kind)
        for _ in range(4):
            task.sam.zero_grad()
            task.sam.step(task.closure if clears else lambda task=task: task.loss().backward())
        ends.append(task.end)
    assert distance(*ends) < 1e-12
    task.sam.zero_grad(set_to_none=False)
    with contextlib.nullcontext() if not task.sam.ascends else pytest.raises(ValueError, match="let it clear them"):
        task.sam.step(lambda: task.loss().backward())


def added_on(kind: str) -> list[str]:
    """What SAM says to a closure that adds, and to ones that clear, under DDP and FSDP2."""
    said, calls = [], []
    for way in ("adds", "clears", "clears in place", "does nothing"):
        model = nn.Linear(4, 3)
        if kind == "fsdp2":
            forward: nn.Module = fully_shard(model, mesh=mesh((2,), ("shard",)))
        else:
            forward = DistributedDataParallel(model, gradient_as_bucket_view=kind == "views")
        sam, x = SAM(torch.optim.SGD(model.parameters(), lr=0.1)), torch.ones(2, 4)

        def closure(way: str = way, model: nn.Module = model, forward: nn.Module = forward, x: Tensor = x) -> Any:
            calls.append(None)
            if way == "does nothing":
                return None
            if way.startswith("clears"):
                model.zero_grad(set_to_none=way == "clears")
            forward(x).square().sum().backward()
            return 1.0

        with forward.no_sync() if kind != "fsdp2" else contextlib.nullcontext():
            forward(x).square().sum().backward()
        calls.clear()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                sam.step(closure)
                sam.step(closure)
            said.append(f"{way}: {len(calls)} calls")
        except ValueError as error:
            said.append(f"{way}: {str(error)[:40]}, {len(calls)} calls")
    return said


@pytest.mark.parametrize("kind", ["ddp", "views", "fsdp2"])
def test_what_a_closure_did_is_seen_on_every_layout(kind: str) -> None:
    """DDP's gradients may be views of buckets, put back after they were cleared; FSDP2's are made without autograd."""
    expected = [
        "adds: step(closure): the closure adds to gradi, 1 calls",
        "clears: 4 calls",
        "clears in place: 4 calls",
        "does nothing: 2 calls",
    ]
    assert run(2, added_on, kind) == [expected] * 2


def test_a_closure_may_return_nothing_or_skip_its_batch() -> None:
    task = Regression(SAM)
    assert task.sam.step(lambda: task.loss().backward()) is None
    before = task.end
    assert task.sam.step(lambda: task.sam.zero_grad()) is None  # Lightning's, for a training_step that returned None
    assert distance(task.end, before) == 0.0
    task.closure()
    with task.sam.perturbed():
        loss = task.closure()
    assert task.sam.step(lambda: loss) is loss
    assert distance(task.end, before) > 0.0


# Steps in the wrong order.


@every_kind
def test_a_step_between_perturb_and_restore_is_refused(kind: Any) -> None:
    """It stepped from perturbed weights, and restore() undid the step."""
    task = Regression(kind)
    task.sam.step(task.closure)
    task.closure()
    before = task.end
    task.sam.perturb()
    for closure in (None, task.closure):
        with pytest.raises(RuntimeError, match=r"step\(\) was called between perturb\(\) and restore\(\)"):
            task.sam.step(closure)
    task.sam.abort_pass()
    assert distance(task.end, before) == 0.0


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught if "without perturb()" in str(warning.message)]


@every_kind
def test_a_step_without_its_passes_is_told_once(kind: Any) -> None:
    """A loop that does not know of SAM trained without it, and nobody knew."""
    task = Regression(kind)
    with told() as messages:
        for _ in range(3):
            task.closure()
            task.sam.step()
    assert messages == [
        f"{kind.__name__}.step() was called without perturb() and restore(), so this is a plain step of AdamW: run the "
        "passes around them, or give step a closure"
    ]


def test_steps_that_do_not_ascend_need_no_perturb() -> None:
    """But LookSAM's, whose direction is in all of them."""
    for kind, expected in ((SAM, []), (distopt.LookSAM, [1])):
        task = Regression(kind, interval=3)
        task.sam.step(task.closure)
        with told() as messages:
            for _ in range(2):
                task.closure()
                task.sam.step()
        assert len(messages) == len(expected)


# Random numbers.


@pytest.mark.parametrize("interval", [1, 2])
def test_numpys_and_pythons_random_numbers_are_the_same_in_both_passes(interval: int) -> None:
    """torch's were; a mask drawn by numpy was another one in the second pass."""
    task, drawn = Regression(SAM, interval=interval), []

    def draw() -> tuple[float, float, float]:
        return (np.random.rand(), random.random(), float(torch.rand(())))

    def closure() -> Tensor:
        drawn.append(draw())
        return task.closure()

    for _ in range(4):
        ascends, start = task.sam.ascends, random_state()
        drawn.clear()
        task.sam.step(closure)
        assert drawn == [drawn[0]] * (1 + ascends)
        then = draw()
        with same_random_numbers(start):
            assert [draw(), draw()] == [drawn[0], then]  # one pass has been drawn
    assert len(set(then)) == 3


def test_random_numbers_go_on_after_a_pass_that_raised() -> None:
    start = random_state()
    first = np.random.rand(), random.random()
    following = None
    for raises in (False, True):
        with same_random_numbers(start):
            np.random.rand(), random.random()
            with contextlib.suppress(KeyError), same_random_numbers(start):
                assert (np.random.rand(), random.random()) == first
                if raises:
                    raise KeyError
            following = following or (np.random.rand(), random.random())
            if raises:
                assert following == (np.random.rand(), random.random())


# Moments.


class Scaled(torch.optim.Adam):
    """Not torch's: what state it makes shows after a step."""


class Bare(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"betas": (0.9, 0.99), "momentum": 0.9})

    def step(self, closure: Any = None) -> None:
        pass


SECOND_MOMENTS = {"Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta"}
MOMENTA = {"Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Muon"}
TORCHS = [
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "Adamax",
    "AdamW",
    "ASGD",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
]


@pytest.mark.parametrize("name", TORCHS)
def test_moments_are_asked_of_the_state(name: str) -> None:
    """ASGD's `alpha` and Adamax's `betas` were taken for second moments: it never preconditioned, without a word."""
    make = getattr(torch.optim, name)
    for kind, has, message in (
        (distopt.PreconditionedSAM, SECOND_MOMENTS, f"{name} has no second moments"),
        (distopt.MomentumSAM, MOMENTA, f"{name} has no momentum"),
    ):
        p, q = (torch.arange(1.0, 10.0).view(3, 3).double().requires_grad_() for _ in range(2))
        defaults = dict(make([q], lr=0.01).defaults)
        if name not in has:
            with pytest.raises(ValueError, match=message):
                kind(make([p], lr=0.01))
            continue
        sam, plain = kind(make([p], lr=0.01), rho=1.0), make([q], lr=0.01)
        assert sam.defaults == defaults and not sam.param_groups[0].keys() - plain.param_groups[0].keys()
        for optimizer, param in ((sam.optimizer, p), (plain, q)):  # the question has left no trace
            for _ in range(3):
                param.grad = param.detach().clone()
                optimizer.step()
        assert torch.equal(p, q)
        before, state = p.detach().clone(), sam.state[p]
        sam.perturb()
        moment = next(state[n] for n in ("exp_avg_sq", "square_avg", "sum", "exp_avg", "momentum_buffer") if n in state)
        if kind is distopt.MomentumSAM:
            along = -state["exp_avg" if "exp_avg" in state else "momentum_buffer"]
        else:
            along = p.grad / (moment.sqrt() + 1e-8)
        assert distance([p.detach() - before], [along / along.norm()]) < 1e-12


@pytest.mark.parametrize(
    ("kind", "message"),
    [(distopt.PreconditionedSAM, "Bare has no second moments"), (distopt.MomentumSAM, "Bare has no momentum")],
)
def test_an_optimizer_of_somebody_elses_is_asked_after_its_first_step(kind: Any, message: str) -> None:
    """It may have rules of its own for its parameters, so none is made up to ask it by."""
    for make in (Scaled, Bare):
        p = torch.ones(3, requires_grad=True)
        sam = kind(make([p]))
        sam.step(partial(squared, sam, p))
        if make is Scaled:
            sam.step(partial(squared, sam, p))
        else:
            with pytest.raises(ValueError, match=message):
                sam.step(partial(squared, sam, p))


def test_asking_does_not_run_hooks_or_a_schedule() -> None:
    p, calls = torch.ones(3, requires_grad=True), []
    optimizer = torch.optim.SGD([p], lr=torch.tensor(0.1), momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    distopt.MomentumSAM(optimizer)
    assert calls == [] and not optimizer.state and not getattr(optimizer, "_opt_called", False)
    assert schedule.get_last_lr()[0] == pytest.approx(0.1)
