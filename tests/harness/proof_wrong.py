"""Set-ups that ranks can make together and that are wrong, as `tests.harness.proof_right` for those that are right."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.harness.proof_right import ddp, hsdp
from tests.harness.proof_setups import Made, back, cut, data, lamb, line, net, ones_for, pair, wrong
from tests.harness.sharded import mesh


def _fsdp1(original: bool) -> Made:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=original)
        optimizer = lamb(model.parameters())
        back(model)
    return optimizer, model


@wrong("FSDP1")
def fsdp1_original_parameters() -> Made:
    return _fsdp1(True)


@wrong("FSDP1")
def fsdp1_flat_parameters() -> Made:
    return _fsdp1(False)


@wrong("has no memory any more|was replaced in its model by fully_shard|no parameter of LAMB has a gradient")
def fsdp2_optimizer_made_before() -> Made:
    model = net()
    optimizer = lamb(model.parameters())
    cut(model)
    back(model)
    return optimizer, None


@wrong("none of the optimizer's 6 parameters are the model's 6|was replaced in its model by fully_shard")
def fsdp2_optimizer_made_before_and_its_model() -> Made:
    model = net()
    optimizer = lamb(model.parameters())
    cut(model)
    back(model)
    return optimizer, model


@wrong("has no memory any more|was replaced in its model by fully_shard|no parameter of LAMB has a gradient")
def fsdp2_optimizer_made_after_a_forward_pass() -> Made:
    model = cut(net())
    with torch.no_grad():
        model(data())
    optimizer = lamb(model.parameters())
    back(model)
    return optimizer, None


@wrong("0.weight .*: ranks differ in the weights")
def megatron_plain_shards() -> Made:
    torch.manual_seed(dist.get_rank())
    first = nn.Linear(8, 8, bias=False)
    model = nn.Sequential(first, nn.LayerNorm(8))
    optimizer = lamb(model.parameters())
    model(torch.ones(2, 8)).square().sum().backward()
    return optimizer, model


@wrong("tensor_model_parallel")
def megatron_marked() -> Made:
    optimizer, model = megatron_plain_shards()
    next(model.parameters()).tensor_model_parallel = True
    return optimizer, model


@wrong("no majority|against all others", 4)
def zero1_over_other_ranks_than_ddp() -> Made:
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = DDP(net(), process_group=halves[dist.get_rank() % 2])
    optimizer = lamb(model.parameters())
    optimizer.bind(distopt.layout.zero1_layout(model.module, line()))
    back(model)
    return optimizer, model.module


@wrong("ranks step other parameters: number 0 of 6")
def other_order_of_other_shapes() -> Made:
    model = DDP(net())
    params = list(model.parameters())
    optimizer = lamb(params[::-1] if dist.get_rank() else params)
    back(model)
    return optimizer, None


def _swapped(params: list[Any]) -> list[Any]:
    """On other ranks than the first in another order, which no shape shows."""
    return [params[i] for i in ((2, 1, 0, 3) if dist.get_rank() else (0, 1, 2, 3))]


@wrong("layer 0 .*: ranks differ in the weights")
def other_order_of_equal_shapes_ddp() -> Made:
    model = DDP(pair())
    optimizer = lamb(_swapped(list(model.parameters())))
    back(model)
    return optimizer, None


@wrong("number 0 of 4 is 0.weight .* on rank 0, of 4 it is 1.weight")
def other_order_of_equal_shapes_fsdp2_named_by_the_model() -> Made:
    model = cut(pair())
    optimizer = lamb(_swapped(list(model.parameters())))
    back(model)
    return optimizer, model


@wrong("number 0 of 4 is 0.weight .* on rank 0, of 4 it is 1.weight")
def other_order_of_equal_shapes_fsdp2_named_by_the_groups() -> Made:
    model = cut(pair())
    optimizer = torch.optim.AdamW(_swapped(list(model.named_parameters())))
    back(model)
    return optimizer, None


@wrong("number 0 of 4 is 0.weight .* on rank 0, of 4 it is 1.weight")
def other_order_of_equal_shapes_fsdp2_named_in_a_group_of_ours() -> Made:
    model = cut(pair())
    names, params = zip(*_swapped(list(model.named_parameters())))
    optimizer = lamb([{"params": list(params), "param_names": list(names)}])
    back(model)
    return optimizer, None


@wrong(r"param group 0 has {'lr': 0.1} on rank 0, {'lr': 0.11} on rank 1")
def other_lr() -> Made:
    model = DDP(net())
    optimizer = lamb(model.parameters(), lr=0.11 if dist.get_rank() == 1 else 0.1)
    back(model)
    return optimizer, model


@wrong("number 4 of 6 is 4.weight .* on rank 0, of 4 it is nothing on rank 1")
def other_number_of_layers() -> Made:
    model = cut(net())
    optimizer = lamb(list(model.parameters())[: 6 - 2 * (dist.get_rank() == 1)])
    back(model)
    return optimizer, model


@wrong("ranks have other layouts, Zero1Layout on rank 0, ShardLayout on rank 1")
def bound_on_one_rank_only() -> Made:
    model = DDP(net())
    optimizer = lamb(model.parameters())
    layout = distopt.layout.zero1_layout(model.module, line())
    if dist.get_rank() == 0:
        optimizer.bind(layout)
    back(model)
    return optimizer, model.module


@wrong("ranks would communicate with others", 4)
def mesh_the_other_way_round_on_some_ranks() -> Made:
    upright = mesh((2, 2), ("replicate", "shard"))
    mesh((2, 2), ("x", "y"))
    turned = DeviceMesh("cpu", torch.arange(4).view(2, 2).T.contiguous(), mesh_dim_names=("replicate", "shard"))
    over = turned if dist.get_rank() in (1, 2) else upright
    p = nn.Parameter(DTensor.from_local(torch.ones(2, 4), over, [Replicate(), Shard(0)], run_check=False))
    ones_for([p])
    return lamb([p]), None


def flip(weight: Tensor, rank: int) -> None:
    if dist.get_rank() == rank:
        weight.data.view(torch.int32)[0, 5] ^= 1


@wrong("2.weight .*: ranks differ in the weights")
def bit_flip_ddp() -> Made:
    optimizer, model = ddp()
    flip(model.module[2].weight, 1)
    return optimizer, model


@wrong("2.weight .*: ranks differ in the weights: no majority among ranks 0, 1, 2, 3", 4)
def bit_flip_hsdp() -> Made:
    optimizer, model = hsdp()
    flip(model[2].weight.to_local(), 3)
    return optimizer, model


@wrong("layer 1 .*: ranks 0, 1.* have copies of the weights that differ")
def copies_of_a_norm_under_tensor_parallelism() -> Made:
    torch.manual_seed(0)
    weight = nn.Parameter(distribute_tensor(torch.randn(8, 8), line(), [Shard(0)]))
    own = torch.ones(8) + dist.get_rank() * 1e-6
    norm = nn.Parameter(DTensor.from_local(own, line(), [Replicate()], run_check=False))
    ones_for([weight, norm])
    return lamb([weight, norm]), None


@wrong("layer 1 .*: ranks 0, 1.* have copies of the gradient that differ")
def gradient_of_a_norm_under_tensor_parallelism() -> Made:
    """As of a norm under sequence parallelism, whose gradient nobody has reduced."""
    weight = nn.Parameter(distribute_tensor(torch.ones(8, 8), line(), [Shard(0)]))
    norm = nn.Parameter(distribute_tensor(torch.ones(8), line(), [Replicate()]))
    ones_for([weight, norm])
    norm.grad = DTensor.from_local(torch.ones(8) * (1 + dist.get_rank()), line(), [Replicate()], run_check=False)
    return lamb([weight, norm]), None


@wrong("0.weight .*: ranks differ in the gradient: .*has to be reduced")
def local_sgd() -> Made:
    model = DDP(net())
    optimizer = lamb(model.parameters())
    with model.no_sync():
        back(model)
    return optimizer, model


@wrong("0.weight .*: ranks differ in whether there is a gradient: .*use it on every rank")
def gradient_on_one_rank_only() -> Made:
    model = net()
    optimizer = lamb(model.parameters())
    ones_for(model.parameters())
    if dist.get_rank():
        model[0].weight.grad = None
    return optimizer, model


@wrong("other numbers of steps: 0.0 on rank 0, 5.0 on rank 1")
def other_step_count() -> Made:
    optimizer, model = ddp()
    optimizer.init_state()  # type: ignore[attr-defined]
    if dist.get_rank() == 1:
        optimizer.state[next(iter(optimizer.state))]["step"] += 5
    return optimizer, model


class Wrapper(Tensor):
    """As MXFP8's and torchao's weights: a tensor without elements of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*[a.inner if isinstance(a, Wrapper) else a for a in args], **(kwargs or {}))


@wrong("rank 1: parameter 0 of 6 is a Wrapper")
def wrapper_subclass_on_one_rank() -> Made:
    optimizer = lamb(net().parameters())
    params = optimizer.param_groups[0]["params"]
    ones_for(params)
    if dist.get_rank() == 1:
        params[0] = Wrapper(torch.randn(16, 8))
    return optimizer, None


@wrong("1.weight .*: ranks differ in the weights")
def experts_as_plain_tensors() -> Made:
    torch.manual_seed(0)
    router = nn.Linear(8, 8)
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(router, nn.Linear(8, 8))
    optimizer = lamb(model.parameters())
    ones_for(model.parameters())
    return optimizer, model


@wrong("gradients of Sequential|gradients of .* have not been reduced")
def fsdp2_gradients_never_reduced() -> Made:
    model = cut(net())
    optimizer = lamb(model.parameters())
    model.set_requires_gradient_sync(False)
    back(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p) * (1 + dist.get_rank())
    return optimizer, model


@wrong("no parameter of LAMB has a gradient on any rank, the first is 0.weight")
def no_gradient_at_all() -> Made:
    model = DDP(net())
    return lamb(model.parameters()), model


@wrong("not the full parameter")
def layout_that_says_too_little() -> Made:
    """A flat tensor on each rank, of which nobody says that it goes on where the other's ends."""
    world, rank = dist.get_world_size(), dist.get_rank()
    full = nn.Parameter(torch.ones(4 * world))
    flat = nn.Parameter(full.detach()[4 * rank : 4 * rank + 4].clone())
    ones_for([flat])
    optimizer = lamb([flat])
    segments = {flat: (distopt.layout.Segment(layer=0, start=0, numel=4),)}
    optimizer.bind(distopt.layout.ShardLayout(segments, (full,), flat.device, (dist.group.WORLD,)))
    return optimizer, None
