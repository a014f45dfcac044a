"""Trainings by gradients that are equal on every layout and at every number of ranks, for tests of equal bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distopt
from distopt import FunctionalSAM, layout
from distopt.kernels import cpu, dispatch
from distopt.layout.bucketed import bucket_layout
from tests.harness.optimizers import NARROW, ROWS, initial, named
from tests.harness.sams import EVERYONE, MEMBERS
from tests.harness.sharded import mesh

# Rows shorter and longer than a block of a sum and no multiple of it, of one element, fewer rows than ranks, long ones.
SHAPES = ((97, 89), (13, 300), (3, 700), (1031,), (7, 5, 3), (2, 1), (1,), (5000, 4))
# For moments in fewer bits: blocks of 32, 64 and 128, several in a row, fewer rows than ranks, and some without blocks.
BLOCKS = ((13, 96), (40, 64), (5, 8, 3, 16), (3, 1152), (2, 4128), (7, 5), (64,))
STEPS = 3
KINDS = {"ddp": (2, 3, 4), "zero1": (1, 2, 3, 4), "buckets": (1, 2, 3, 4), "fsdp2": (1, 2, 3, 4), "hsdp": (2, 4)}
WORLDS = [(kind, world) for kind, worlds in KINDS.items() for world in worlds]
_MEMBERS = [member for member in MEMBERS if member.cls is not FunctionalSAM]
# Every optimizer, and every member of SAM's family over every optimizer that it is tested with, or over one of them.
JOBS = {
    "every": [row.name for row in ROWS] + [f"{member.name} {base}" for member in _MEMBERS for base in member.bases],
    "some": [row.name for row in ROWS]
    + [f"{member.name} {member.bases[i % len(member.bases)]}" for i, member in enumerate(_MEMBERS)],
    "every_narrow": [row.name for row in NARROW],
    "some_narrow": [row.name for i, row in enumerate(NARROW) if i % 3 == i // 3 % 3],  # each rule in a form
}


@contextmanager
def way(name: str) -> Iterator[None]:
    """By the compiled kernels, or by the rules."""
    if name == "kernels":
        yield
        return
    with mock.patch.object(dispatch, "fits", lambda shards: []), mock.patch.object(cpu, "library", lambda: None):
        yield


@lru_cache
def numbers(step: int, which: int, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    """The full gradients of a pass of a step: over many orders of magnitude, so that every order of a sum shows."""
    source = torch.Generator().manual_seed(10 * step + which)
    return [torch.randn(s, generator=source) * torch.exp(2.0 * torch.randn(s, generator=source)) for s in shapes]


def shapes_of(job: str) -> tuple[tuple[int, ...], ...]:
    return BLOCKS if job in JOBS["every_narrow"] else SHAPES


def trained(kind: str, job: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """The full perturbed weights of every step, and the full weights and state after the last one."""
    seen, params, opt = optimized(kind, job, dtype, **options)
    state = [opt.state[p][name] for p in params for name in sorted(opt.state[p])]
    return seen + [full(t) for t in [*params, *state]]


def optimized(
    kind: str, job: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[Tensor], list[nn.Parameter], distopt.ShardedOptimizer]:
    """The full perturbed weights of every step, the parameters and their optimizer after the last one.

    Kind "columns" shards what it can along the second dimension.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    shape, axes = ((2, world // 2), ("replicate", "shard")) if kind == "hsdp" else ((world,), ("shard",))
    where = mesh(shape, axes) if kind in ("zero1", "buckets", "fsdp2", "hsdp", "columns") else None
    how = {"fsdp2": [Shard(0)], "hsdp": [Replicate(), Shard(0)], "columns": [Shard(1)]}.get(kind)

    def placed(full: Tensor) -> Tensor:
        by = [Shard(0)] if kind == "columns" and full.ndim < 2 else how
        return distribute_tensor(full, where, by, src_data_rank=None) if by else full.clone()

    params = [nn.Parameter(placed(p)) for p in initial(*shapes_of(job), dtype=dtype)]
    member, row = next(((m, r) for m, r in EVERYONE if f"{m.name} {r.name}" == job), (None, None))
    row = row or named(job)
    opt = row.make(row.groups(params), **options)
    if kind == "zero1":
        opt.bind(layout.zero1_layout(nn.ParameterList(params), where))
    if kind == "buckets":
        opt.bind(bucket_layout(params, where))
    sam = member.make(opt) if member else None
    seen: list[Tensor] = []

    def gradients(step: int, which: int) -> None:
        for i, (p, grad) in enumerate(zip(params, numbers(step, which, shapes_of(job)))):
            p.grad = placed(grad.to(dtype)) if (step + i) % 5 else None  # not every one in every step

    for step in range(STEPS):
        gradients(step, 0)
        if sam is not None:
            sam.perturb()
            seen += [full(p) for p in params]
            gradients(step, 1)
            sam.restore()
        distopt.clip_grad_norm_(opt, 1.0)
        (sam or opt).step()
    return seen, params, opt


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@lru_cache
def unsharded(by: str, job: str) -> list[Tensor]:
    assert not dist.is_initialized()
    with way(by):
        return trained("plain", job)


def on_ranks(kind: str, by: str, which: str) -> dict[str, list[Tensor]] | None:
    with way(by):
        found = {job: trained(kind, job) for job in JOBS[which]}
    return found if dist.get_rank() in (0, dist.get_world_size() - 1) else None
