"""A leg of a case on real ranks, with distopt."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import layout
from tests.harness.search.case import Case, Event, Group, Step, standing
from tests.harness.search.model import Model, batch, criterion
from tests.harness.sharded import mesh, reduce_scattered

# How a model is laid out, and the world sizes at which it can be.
WORLDS = {
    "plain": (1, 2, 3),
    "ddp": (1, 2, 3),
    "zero1": (1, 2, 3, 4),
    "zero1_scattered": (1, 2, 3, 4),
    "fsdp2": (1, 2, 3, 4),
    "hsdp": (4,),
    "tensor": (2, 3),  # DTensors that are sharded along any dimension, by tensor parallelism
    "tensor_fsdp2": (4,),
}
FSDP = ("fsdp2", "hsdp", "tensor_fsdp2")
DDP = ("ddp", "zero1_scattered")
ZERO1 = ("zero1", "zero1_scattered")


class Run:
    """The training of one rank in one leg."""

    def __init__(self, case: Case, leg: int, folder: str) -> None:
        self.case, self.leg, self.folder = case, case.legs[leg], folder
        self.taken = sum(len(other.steps) for other in case.legs[:leg])
        now = standing(case, leg)
        self.model, self.wrapped = self._model(now.frozen)
        self.params = self.model.by_index()
        self.frozen = now.frozen
        self.layout = None  # once for a leg, so that a parameter that is frozen for a while belongs to it
        if self.leg.layout in ZERO1:
            describe = layout.zero1_layout if self.leg.layout == "zero1" else reduce_scattered
            self.layout = describe(self.wrapped, mesh((self.leg.world,), ("shard",)))
        groups = [Group(g.params[::-1], g.options) if self.leg.permuted else g for g in now.groups]
        self.optimizer, self.stepper = self._made([self._group(group) for group in groups])
        if leg:
            distopt.load_checkpoint(f"{folder}/{leg}", self.model, self.stepper)
        self.number = leg

    def steps(self) -> list[list[Tensor]]:
        """The unsharded weights after each step."""
        weights = []
        warnings.filterwarnings("ignore", "no parameter of .* has a gradient on any rank")
        for step in self.leg.steps:
            for event in step.events:
                self._event(event)
            self._step(step)
            self.taken += 1
            weights.append(self.weights())
        if self.number + 1 < len(self.case.legs):
            distopt.save_checkpoint(f"{self.folder}/{self.number + 1}", self.model, self.stepper)
        return weights

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in self.model.by_index()]

    # Making

    def _model(self, frozen: set[int]) -> tuple[Model, nn.Module]:
        """The model on this rank, and what its forward pass is called by."""
        kind, world = self.leg.layout, self.leg.world
        model = Model(self.case.params, getattr(torch, self.case.dtype))
        for i in frozen:
            model.by_index()[i].requires_grad_(False)
        if kind == "tensor":
            _distribute(model, mesh((world,), ("tp",)), lambda p: p.ndim > 0 and p.numel() > 0)
        if kind == "tensor_fsdp2":
            # Nor does FSDP2 take shards of one column, of which the other rank has none.
            _distribute(model, mesh((2, 2), ("dp", "tp"))["tp"], lambda p: p.ndim > 1 and p.shape[-1] > 1)
        if kind in FSDP:
            names = {"hsdp": (("replicate", "shard"), None), "tensor_fsdp2": (("dp", "tp"), "dp")}
            axes, over = names.get(kind, (("shard",), None))
            grid = mesh((world,) if len(axes) == 1 else (2, 2), axes)
            grid = grid[over] if over else grid
            # FSDP2 of torch 2.13 refuses 0-D parameters, and fails in the backward pass of empty ones.
            pairs = zip(self.case.params, model.by_index())
            ignored = {q for p, q in pairs if p.ignored or q.ndim == 0 or q.numel() == 0}
            fully_shard(model.unit, mesh=grid, ignored_params=ignored)
            fully_shard(model, mesh=grid, ignored_params=ignored)
        if kind in DDP:
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
            return model, wrapped
        return model, model

    def _group(self, group: Group) -> dict[str, Any]:
        return {"params": [self.params[i] for i in group.params], **group.options}

    def _made(self, groups: list[dict[str, Any]]) -> tuple[torch.optim.Optimizer, Any]:
        """An optimizer, and what steps: itself or SAM around it."""
        case = self.case
        cls = getattr(torch.optim if case.torch else distopt, case.optimizer)
        optimizer = cls(groups, **case.options)
        if self.layout is not None:
            optimizer.bind(self.layout)
        stepper = getattr(distopt, case.sam)(optimizer, **case.sam_options) if case.sam else optimizer
        return optimizer, stepper

    # Events

    def _event(self, event: Event) -> None:
        match event:
            case ("set", group, name, value):
                for one in self.optimizer.param_groups if group is None else [self.optimizer.param_groups[group]]:
                    one[name] = value
            case ("freeze", i):
                self._freeze(i, True)
            case ("thaw", i):
                self._freeze(i, False)
            case ("add", group):
                self.stepper.add_param_group(self._group(group))
            case ("average",):
                self.optimizer.eval()
                self.optimizer.train()
            case ("reload",):
                self._renew(self.stepper.state_dict())
            case ("through torch",):
                same = [{"params": group["params"]} for group in self.optimizer.param_groups]
                peer = getattr(torch.optim, self.case.optimizer)(same)
                peer.load_state_dict(self.stepper.state_dict())
                self._renew(peer.state_dict())

    def _renew(self, state: dict[str, Any]) -> None:
        """A new optimizer that is given a copy of the state of the old one."""
        kept = ("params", "rule")  # a group of vectors is Muon's by its rule alone
        groups = [{name: group[name] for name in kept if name in group} for group in self.optimizer.param_groups]
        self.optimizer, self.stepper = self._made(groups)
        self.stepper.load_state_dict(copy.deepcopy(state))

    def _freeze(self, i: int, frozen: bool) -> None:
        self.frozen = self.frozen | {i} if frozen else self.frozen - {i}
        self.params[i].requires_grad_(not frozen)
        if frozen:
            self.params[i].grad = None

    # Steps

    def _step(self, step: Step) -> None:
        sam = self.case.sam
        if sam is None:
            self._pass(step.unused)
        elif self.case.closure:
            passes = iter([step.unused, step.second])
            self.stepper.step(lambda: self._pass(next(passes)))
            return
        else:
            if sam != "MomentumSAM":
                self._pass(step.unused)
            ascends = self.stepper.ascends
            self.stepper.perturb()
            if sam == "MomentumSAM":
                self._pass(step.unused)
            elif ascends:
                self._pass(step.second)
            self.stepper.restore()
        if self.case.max_norm is not None:
            distopt.clip_grad_norm_(self.stepper, self.case.max_norm)
        self.stepper.step()

    def _pass(self, unused: Sequence[int]) -> Tensor:
        """Clears the gradients, and leaves those of the whole batch."""
        self.stepper.zero_grad()
        used = [i for i in range(len(self.case.params)) if i not in unused]
        if all(i in self.frozen for i in used):  # autograd has nothing to do
            return torch.zeros(())
        loss_of = partial(criterion, params=self.case.params, used=used, step=self.taken)
        samples = self._samples()
        outputs = self.wrapped(samples, used)
        loss = self.stepper.loss(outputs, loss_of) if self.case.sam else loss_of(outputs)
        loss.backward()
        if self.leg.layout not in (*DDP, "tensor"):
            self._average([p.grad for p in self.params if p.grad is not None and not self._exchanged(p)])
        return loss.detach()

    def _exchanged(self, p: Tensor) -> bool:
        """Whether FSDP2 has averaged the gradient."""
        if self.leg.layout == "tensor_fsdp2":  # of a parameter that it ignores, a DTensor of the other axis is left
            return "dp" in (p.device_mesh.mesh_dim_names or ())  # type: ignore[attr-defined]
        return isinstance(p, DTensor)

    def _samples(self) -> Tensor:
        samples = batch(self.taken).to(getattr(torch, self.case.dtype))
        if self.leg.layout == "tensor":  # each rank has a part of the weights and all samples
            return samples
        if self.leg.layout == "tensor_fsdp2":
            return samples.chunk(2)[dist.get_rank() // 2]
        return samples.chunk(self.leg.world)[dist.get_rank()]

    def _average(self, grads: Sequence[Tensor]) -> None:
        """As DDP does, for parameters that are unsharded along the axis of the data."""
        if not grads or self.leg.world == 1:
            return
        group = mesh((2, 2), ("dp", "tp"))["dp"].get_group() if self.leg.layout == "tensor_fsdp2" else None
        parts = [g.to_local() if isinstance(g, DTensor) else g for g in grads]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat, group=group)
        for part, mean in zip(parts, flat.div_(dist.get_world_size(group)).split([part.numel() for part in parts])):
            part.copy_(mean.view_as(part))


def _distribute(model: Model, over: Any, cut: Callable[[Tensor], bool]) -> None:
    """Makes DTensors of the parameters: sharded along their last dimension, or replicated."""
    for module in (model, model.unit):
        made: dict[Tensor, nn.Parameter] = {}
        for name, p in module._parameters.items():
            assert p is not None
            if p not in made:
                placement = Shard(p.ndim - 1) if cut(p) else Replicate()
                made[p] = nn.Parameter(distribute_tensor(p.detach(), over, [placement]), p.requires_grad)
            module._parameters[name] = made[p]


def run_leg(case: Case, leg: int, folder: str) -> list[list[Tensor]]:
    """On every rank: the unsharded weights after each step of that leg."""
    return Run(case, leg, folder).steps()
