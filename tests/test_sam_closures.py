"""SAM and the closures of other people: Lightning's, and those that clear gradients in their own way."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from distopt import SAM
from tests.harness.distributed import run
from tests.harness.optimizers import distance
from tests.harness.sam_problems import Regression, every_kind
from tests.harness.sharded import mesh


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
    fit(LightningOptimizer(task.sam), task.loss, 3, 1)  # weights are as before, and it continues


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
