"""Models, and the ways of sharding them that the tests of the core share: on each the update has to be the same."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distopt import ShardedOptimizer, layout
from tests.harness.experts import Experts, Routed
from tests.harness.optimizers import initial, target

# What each can be tried at; the three last need four ranks, as two by two.
WORLDS = {"replicated": (1, 2, 4), "zero1": (1, 2, 4), "fsdp2": (1, 2, 4), "mixed": (4,), "hsdp": (4,), "tp_fsdp": (4,)}
WORLDS["experts"] = (4,)
EVERYWHERE = [(kind, world) for kind, worlds in WORLDS.items() for world in worlds]
SAMPLES = 8  # of a batch, divided among the ranks


class Part(nn.Module):
    """A unit with parameters of 1, 3 and 5 rows, so that of four ranks some hold less than others and some nothing."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in dict(weight=(5, 3), bias=(5,), scale=(1,), wide=(3, 7), zero=(3, 2), frozen=(4, 2)).items():
            setattr(self, name, nn.Parameter(torch.empty(shape), requires_grad=name != "frozen"))

    def forward(self, samples: Tensor, step: int) -> Tensor:
        trained = [self.weight, self.bias, self.scale, self.wide * self.frozen.mean(), self.zero]
        return sum(toward(p, i, step, samples) for i, p in enumerate(trained))


class Toy(nn.Module):
    """A unit, weights that are tied, and `seldom`, which is used at every third step only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.part = Part()
        self.seldom = nn.Linear(3, 5)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, samples: Tensor, step: int) -> Tensor:
        """The mean loss of a batch."""
        loss = self.part(samples, step) + toward(self.embedding.weight, 9, step, samples)
        loss = loss + 0.1 * self.head(self.embedding.weight).square().mean()
        if step % 3 == 0:
            loss = loss + toward(self.seldom.weight, 5, step, samples) + toward(self.seldom.bias, 6, step, samples)
        return loss


class MLP(nn.Module):
    """For tensor parallelism to cut: `up` by rows, `down` by columns; `norm` and the bias of `down` it leaves whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 6)
        self.down = nn.Linear(6, 3)

    def forward(self, samples: Tensor, step: int) -> Tensor:
        x = torch.sin(torch.outer(samples, torch.arange(1, 6, dtype=samples.dtype)) + step)
        y = torch.cos(torch.outer(samples, torch.arange(1, 4, dtype=samples.dtype)) + step)
        return (self.down(self.up(self.norm(x)).tanh()) - 2.0 * y).square().sum(1).mean()


# Where the unsharded model is not Toy.
MODELS: dict[str, type[nn.Module]] = {"tp_fsdp": MLP, "experts": Routed}


def unsharded(kind: str) -> str:
    """A kind that has the model of this one, and that needs no ranks."""
    return kind if kind in MODELS else "replicated"


reduce_scattered = functools.partial(layout.zero1_layout, gradients="reduce_scatter")


def toward(p: Tensor, i: int, step: int, samples: Tensor) -> Tensor:
    """Half the squared distance to targets that move with the step, a little with the sample; the mean over samples.

    As in `tests.harness.optimizers.pull`, gradients start far from zero, so that float32 has nothing to hide behind.
    """
    moved = target(p, i, step) + 0.3 * torch.sin(samples).view(-1, *[1] * p.ndim)
    return 0.5 * (p - moved).square().sum() / len(samples) + 0.05 * p.mean().square()


class Fleet(nn.ModuleDict):
    """Models side by side that know nothing of each other: many optimizers for one exchange of gradients."""

    def forward(self, samples: Tensor, step: int) -> Tensor:
        return sum(model(samples, step) for model in self.values())


def whole(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The unsharded model, the same every time."""
    model = MODELS.get(kind, Toy)().to(dtype)
    params = list(model.parameters())
    with torch.no_grad():
        for p, value in zip(params, initial(*(tuple(p.shape) for p in params), dtype=dtype)):
            p.copy_(value)
        for name, p in model.named_parameters():
            if name.endswith("zero"):
                p.zero_()
    return model


def sharded(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model on this rank, in two units."""
    model = whole(kind, dtype)
    return shard(kind, model, [model.part] if isinstance(model, Toy) else [])


def shard(kind: str, model: nn.Module, units: Iterable[nn.Module] = ()) -> nn.Module:
    """Shards a model. `replicated`, `zero1`: not at all. `mixed`: FSDP2, but embedding and `seldom` are replicated."""
    world = dist.get_world_size()
    if kind == "tp_fsdp":
        grid = mesh((2, 2), ("dp", "tp"))
        for mlp in [module for module in model.modules() if isinstance(module, MLP)]:
            parallelize_module(mlp, grid["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return fully_shard(model, mesh=grid["dp"])
    if kind == "experts":
        grid = mesh((2, 2), ("dp_mod_ep", "ep"))
        for experts in [module for module in model.modules() if isinstance(module, Experts)]:
            experts.divide(grid)
        return fully_shard(model, mesh=mesh((world,), ("dp",)))
    if kind in ("fsdp2", "mixed", "hsdp"):
        over = mesh((2, 2), ("replicate", "shard")) if kind == "hsdp" else mesh((world,), ("shard",))
        for unit in units:
            fully_shard(unit, mesh=over)
        outside = [p for n, p in model.named_parameters() if kind == "mixed" and ("embedding" in n or "seldom" in n)]
        fully_shard(model, mesh=over, ignored_params=set(outside))
    return model


def bind(kind: str, opt: ShardedOptimizer, model: nn.Module) -> None:
    """What an engine does whose parameters do not tell how the optimizer steps them."""
    if kind == "zero1" and dist.is_initialized():
        opt.bind(layout.zero1_layout(model, mesh((dist.get_world_size(),), ("shard",))))


_meshes: dict[tuple[Any, ...], DeviceMesh] = {}


def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """Made once for a process, since each takes new connections between all ranks."""
    key = (shape, names)
    if key not in _meshes:
        _meshes[key] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[key]


def backward(model: nn.Module, kind: str, step: int) -> Tensor:
    """The gradient of the mean loss of the batch of a step, by all ranks together; returns that loss.

    Without a process group it is that of the whole batch: what the ranks have to agree with.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if kind == "tp_fsdp" and world > 1:
        rank, world = rank // 2, world // 2  # ranks along tp see the same samples
    dtype = next(model.parameters()).dtype
    samples = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
    loss = model(samples.chunk(world)[rank], step)
    loss.backward()
    loss = loss.detach().clone()
    if world > 1:
        local = [p.grad for p in model.parameters() if p.grad is not None and not hasattr(p, "placements")]
        flat = torch.cat([t.view(-1) for t in [loss, *local]])  # as DDP averages
        dist.all_reduce(flat)
        for t, mean in zip([loss, *local], flat.div_(dist.get_world_size()).split([t.numel() for t in [loss, *local]])):
            t.copy_(mean.view_as(t))
    return loss


@torch.no_grad()
def full(model: nn.Module) -> list[Tensor]:
    """Full copies of a model's parameters; every rank has to call it."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
    copies = [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]
    for unit in units:
        unit.reshard()
    return copies
