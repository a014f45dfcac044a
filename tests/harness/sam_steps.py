"""Steps of SAM on a loss of outputs that bend with the weights, in one process and on every layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distopt import SAM
from distopt.layout import local
from tests.harness.optimizers import Row, initial, target
from tests.harness.sams import Member, Task
from tests.harness.sharded import SAMPLES, Fleet

STEPS = 7  # two cycles of the longest interval, and one more


def outputs(params: list[Tensor], step: int) -> Tensor:
    mean = sum(p.mean() for p in params)
    return torch.cat([(p + 0.05 * p**2 + 0.05 * mean).reshape(-1) for p in params])


def criterion(found: Tensor, step: int) -> Tensor:
    return 0.5 * (found - target(found, 1, step)).square().sum() + 0.02 * found.mean() ** 4


TASK = Task(outputs, criterion)


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tensors = [*initial((), (7,), (5, 3), (4, 6), dtype=dtype), torch.zeros(4, 3, dtype=dtype)]
    return [t.requires_grad_() for t in [*tensors, initial((3, 4), dtype=dtype)[0].t()]]


def one_pass(sam: SAM, params: list[Tensor], step: int) -> Tensor:
    sam.zero_grad()
    loss = sam.loss(outputs(params, step), lambda found: criterion(found, step))
    loss.backward()
    return loss


def by_closure(sam: SAM, run_pass: Callable[[], Any]) -> Any:
    return sam.step(run_pass)


def by_verbs(sam: SAM, run_pass: Callable[[], Any]) -> Any:
    loss = run_pass() if sam.needs_ascent_gradient else None
    sam.perturb()
    if sam.ascends or not sam.needs_ascent_gradient:
        second = run_pass()
        loss = loss if sam.needs_ascent_gradient else second
    sam.restore()
    sam.step()
    return loss


def steps(sam: SAM, params: list[Tensor], first: int, last: int) -> None:
    for step in range(first, last):
        by_closure(sam, partial(one_pass, sam, params, step))


def started(member: Member, row: Row, params: list[Tensor]) -> SAM:
    return member.make(row.make(member.groups(row, params)))


def values(tensors: Any) -> list[Tensor]:
    return [local(t).detach().clone() for t in tensors]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def state_of(sam: SAM) -> list[Tensor]:
    """All numbers of the state, and the count of steps."""
    found = [state[name] for _, state in sorted(sam.state_dict()["state"].items()) for name in sorted(state)]
    return [*values(found), torch.tensor(sam.param_groups[0].get("sam_steps", 0))]


class Losses(Fleet):
    """Models side by side, each with the losses of a batch's samples, two by two, as its outputs."""

    def forward(self, samples: Tensor, step: int) -> dict[str, Tensor]:
        return {n: torch.stack([model(pair, step) for pair in samples.split(2)]) for n, model in self.items()}


def bent(losses: Tensor) -> Tensor:
    """A loss of those outputs whose slope depends on them; functional SAM is no SAM here."""
    return 10.0 * torch.log1p(losses).mean()


def samples_of(kind: str, step: int) -> Tensor:
    """This rank's part of a batch; without a process group all of it."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if kind == "tp_fsdp" and world > 1:
        rank, world = rank // 2, world // 2  # ranks along tp see the same samples
    batch = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return batch.chunk(world)[rank]


class Wrapped(nn.Module):
    """Parameters, and their loss of a rank's own target, for DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(leaves()[1:5])

    def forward(self, step: Tensor) -> Tensor:
        return own_loss(list(self.weights), int(step))


def own_loss(params: list[Tensor], step: int) -> Tensor:
    return criterion(outputs(params, step), step) / (1 + step % 100)


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])
