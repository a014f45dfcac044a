"""Set-ups that ranks can make together and that are right.

Each makes an optimizer and runs a backward pass; it returns what to prove: the optimizer, and the model if it has one
that gives names.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.harness.proof_setups import Made, back, cut, data, grid, lamb, line, net, ones_for, right, with_deepspeed
from tests.harness.sharded import mesh


@right()
def ddp() -> Made:
    model = DDP(net())
    optimizer = lamb(model.parameters())
    back(model)
    return optimizer, model


@right()
def ddp_accumulated() -> Made:
    model = DDP(net())
    optimizer = lamb(model.parameters())
    with model.no_sync():
        back(model)
    back(model, 1)
    return optimizer, model


@right()
def fsdp2() -> Made:
    model = cut(net())
    optimizer = lamb(model.parameters())
    back(model)
    return optimizer, model


@right(4)
def hsdp() -> Made:
    model = cut(net(), grid())
    optimizer = lamb(model.parameters())
    back(model)
    return optimizer, model


@right()
def fsdp2_accumulated_without_exchange() -> Made:
    model = cut(net())
    optimizer = lamb(model.parameters())
    model.set_requires_gradient_sync(False)
    back(model)
    model.set_requires_gradient_sync(True)
    back(model, 1)
    return optimizer, model


@right()
def zero1() -> Made:
    model = DDP(net())
    optimizer = lamb(model.parameters())
    optimizer.bind(distopt.layout.zero1_layout(model.module, line()))
    back(model)
    return optimizer, model.module


def _overlapped() -> tuple[distopt.LAMB, Any]:
    model = DDP(net())
    optimizer = lamb(model.parameters())
    units = [model.module[0], model.module[2], model.module[4]]
    optimizer.bind(distopt.layout.zero1_layout(model, line(), units=units, gradients="reduce_scatter"))
    back(model)
    optimizer.step()
    return optimizer, model


@right()
def zero1_overlapped() -> Made:
    optimizer, model = _overlapped()
    optimizer.zero_grad()
    back(model, 1)
    return optimizer, model.module


@right()
def zero1_overlapped_and_not_waited_for() -> Made:
    """Others' rows are nan until someone waits."""
    optimizer, model = _overlapped()
    assert any(p.isnan().any() for p in model.parameters())
    return optimizer, model.module


@right()
def sam_by_own_gradients() -> Made:
    model = DDP(net())
    sam = distopt.SAM(lamb(model.parameters()), rho=0.1, scope="local")
    with model.no_sync():
        back(model)
    sam.perturb()
    sam.zero_grad()
    back(model)
    sam.restore()
    return sam, model


@right()
def batch_norm_of_each_rank() -> Made:
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    model = DDP(inside, forward_sync_buffers=False)
    optimizer = lamb(model.parameters())
    back(model)
    return optimizer, model


@right()
def low_rank_adapters() -> Made:
    base = net().requires_grad_(False)
    model = cut(nn.Sequential(base, nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)))
    optimizer = lamb(distopt.param_groups(model))
    back(model)
    return optimizer, model


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = net(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@right()
def unused_parameter() -> Made:
    model = Unused()
    cut(model.used)
    cut(model.unused)
    optimizer = lamb(model.parameters())
    back(model)
    return optimizer, model


@right()
def tensor_parallel() -> Made:
    model = net()
    parallelize_module(model, line(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = lamb(model.parameters())
    model(torch.ones(4, 8)).square().mean().backward()
    return optimizer, model


@right(4)
def tensor_parallel_and_fsdp2() -> Made:
    both = mesh((2, 2), ("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 6), nn.LayerNorm(6))
    parallelize_module(model, both["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    cut(model, both["dp"])
    optimizer = lamb(model.parameters())
    model(torch.ones(4, 8)).square().mean().backward()
    return optimizer, model


@right()
def experts_as_dtensors() -> Made:
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = nn.Parameter(distribute_tensor(torch.randn(4, 6, 6), line(), [Shard(0)]))
    model.router = nn.Parameter(distribute_tensor(torch.randn(4, 6), line(), [Replicate()]))
    model.wide = nn.Parameter(distribute_tensor(torch.randn(3, 6, 10), line(), [Shard(2)]))
    optimizer = lamb(model.parameters())
    ones_for(model.parameters())
    return optimizer, model


@right()
def torch_optimizer() -> Made:
    model = cut(net())
    optimizer = torch.optim.AdamW([(name, p) for name, p in model.named_parameters()])
    back(model)
    return optimizer, None


def _deepspeed(stage: int) -> Made:
    optimizer, engine = with_deepspeed(stage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.backward(engine(data()).square().mean())
    return optimizer, engine


@right(2)
def deepspeed1() -> Made:
    return _deepspeed(1)


@right(2)
def deepspeed2() -> Made:
    return _deepspeed(2)


@right(2)
def deepspeed3() -> Made:
    return _deepspeed(3)
