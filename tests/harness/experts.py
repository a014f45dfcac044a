"""A model of experts, and its division by expert parallelism and FSDP2, as torchtitan arranges it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor


class Experts(nn.Module):
    """Five experts, in stacks that expert parallelism divides into three and two; `common` is replicated along `ep`.

    Every rank has the tokens of all ranks of its `ep` group, adds up the outputs of its own experts, and the group adds
    up those: what an exchange of routed tokens comes to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ep: DeviceMesh | None = None
        for name, shape in dict(up=(5, 4, 3), down=(5, 2, 4), zero=(5, 2), common=(4,), frozen=(5, 1)).items():
            setattr(self, name, nn.Parameter(torch.empty(shape), requires_grad=name != "frozen"))

    def divide(self, grid: DeviceMesh) -> None:
        """As torchtitan does: by expert along `ep`, and then FSDP2 over the ranks that have the same experts."""
        self.ep = grid["ep"]
        for name, p in [*self.named_parameters()]:
            placement = Replicate() if name == "common" else Shard(0)
            placed = distribute_tensor(p.detach(), self.ep, [placement], src_data_rank=None)
            setattr(self, name, nn.Parameter(placed, requires_grad=p.requires_grad))
        columns = {self.down}
        fully_shard(self, mesh=grid["dp_mod_ep"], shard_placement_fn=lambda p: Shard(1) if p in columns else None)
        self.set_gradient_divide_factor(dist.get_world_size())  # its gradients are sums over `ep` already
        self.set_force_sum_reduction_for_comms(True)  # gloo has no product in its sums

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
        stacks = [self.up, self.down, self.zero, self.frozen]
        if self.ep is None:
            return self.mixed(x, gates, self.common, *stacks)
        tokens = [DTensor.from_local(t, self.ep, [Shard(0)]).redistribute(placements=[Replicate()]) for t in (x, gates)]
        x, gates, common = (t.to_local(grad_placements=[Partial()]) for t in (*tokens, self.common))
        gates = gates.chunk(self.ep.size(), dim=1)[self.ep.get_local_rank()]
        out = self.mixed(x, gates, common, *(p.to_local() for p in stacks))
        return DTensor.from_local(out, self.ep, [Partial()]).redistribute(placements=[Shard(0)]).to_local().clone()

    @staticmethod
    def mixed(x: Tensor, gates: Tensor, common: Tensor, *stacks: Tensor) -> Tensor:
        up, down, zero, frozen = stacks
        inner = (torch.einsum("ni,eoi->neo", x, up) + common).tanh()
        out = torch.einsum("neo,epo->nep", inner, down) + zero * frozen
        return (gates.unsqueeze(-1) * out).sum(1)


class Routed(nn.Module):
    """Experts between layers that FSDP2 shards over all ranks, and a shared one that every third step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(5, 3)
        self.gate = nn.Linear(3, 5, bias=False)
        self.experts = Experts()
        self.shared = nn.Linear(3, 2)
        self.head = nn.Linear(2, 3)

    def forward(self, samples: Tensor, step: int) -> Tensor:
        x = torch.sin(torch.outer(samples, torch.arange(1, 6, dtype=samples.dtype)) + step)
        y = torch.cos(torch.outer(samples, torch.arange(1, 4, dtype=samples.dtype)) + step)
        x = self.embedding(x).tanh()
        out = self.experts(x, self.gate(x).softmax(1))
        if step % 3 == 0:
            out = out + self.shared(x)
        return 3.0 * (self.head(out) - 2.0 * y).square().sum(1).mean()
