"""SAM's two passes: gradients that one of them lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import SAM
from distopt.layout.fsdp2 import reshard
from tests.harness import oracles_sam
from tests.harness.distributed import run
from tests.harness.optimizers import distance, initial
from tests.harness.oracles import Grad, gradient_of
from tests.harness.sam_problems import LR, RHO, SHAPES
from tests.harness.sharded import mesh, reduce_scattered

STEPS = 8


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
    "AWP": (distopt.AWP, lambda: oracles_sam.awp(FIRST, RHO, SECOND)),
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
            optimizer.bind((distopt.layout.zero1_layout if kind == "zero1" else reduce_scattered)(model))
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
