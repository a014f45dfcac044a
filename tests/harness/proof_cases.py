"""Set-ups that ranks can make together, right ones and wrong ones, for `tests/test_proof.py`.

Each case makes an optimizer and runs a backward pass; it returns what to prove: the optimizer, and the model if it has
one that gives names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.harness.sharded import mesh

Made = tuple[torch.optim.Optimizer, nn.Module | None]


class Case(NamedTuple):
    """says: a regular expression of the error, None if there has to be none. worlds: at which it can be made."""

    make: Callable[[], Made]
    says: str | None
    worlds: tuple[int, ...]


CASES: dict[str, Case] = {}


def right(*worlds: int) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    return wrong(None, *worlds)


def wrong(says: str | None, *worlds: int) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(make: Callable[[], Made]) -> Callable[[], Made]:
        CASES[make.__name__] = Case(make, says, worlds or (2, 4))
        return make

    return add


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def pair() -> nn.Sequential:
    """Two layers of equal shapes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def data(step: int = 0) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def back(model: Any, step: int = 0) -> None:
    model(data(step)).square().mean().backward()


def lamb(params: Any, **options: Any) -> distopt.LAMB:
    return distopt.LAMB(params, **{"lr": 0.1, **options})


def ones_for(params: Any) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def grid() -> DeviceMesh:
    return mesh((2, dist.get_world_size() // 2), ("replicate", "shard"))


def line() -> DeviceMesh:
    return mesh((dist.get_world_size(),), ("shard",))


def cut(model: nn.Module, over: DeviceMesh | None = None, **options: Any) -> Any:
    return fully_shard(model, mesh=over or line(), **options)


# What is right.


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


def with_deepspeed(
    stage: int, model: nn.Module | None = None, dtype: str = "fp32", groups: Any = None, **more: Any
) -> tuple[Any, Any]:
    """The optimizer and DeepSpeed's engine, which has to be destroyed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
        model = model or net()
        optimizer = lamb(groups or model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": dtype == "bf16"},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, **more)
        optimizer.bind(distopt.layout.deepspeed_layout(engine))
    return optimizer, engine


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


# What is wrong.


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


def prove_each(names: list[str]) -> dict[str, str]:
    """What a proof of each case says on this rank; an empty string if nothing is wrong."""
    said = {}
    for name in names:
        torch.manual_seed(0)
        optimizer, model = CASES[name].make()
        engine = model if hasattr(model, "zero_optimization_stage") else None
        try:
            distopt.prove(optimizer, None if engine is not None else model, state=True)
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
        if engine is not None:
            engine.destroy()
    return said


def wide() -> nn.Sequential:
    """Rows that no number of ranks divides, three dimensions, and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 10), nn.Linear(10, 6), nn.Conv1d(3, 5, 3, bias=False), nn.Linear(3, 2))
    model[3].requires_grad_(False)
    return model


def fingerprints(dtype: str) -> dict[str, distopt.Fingerprint]:
    """Of the same model and state, however they are sharded."""
    world = dist.get_world_size()
    kinds = ["plain", "ddp", "zero1", "fsdp2", "tensor_parallel"] + ["hsdp"] * (world == 4)
    found = {}
    for kind in kinds:
        model: Any = wide().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        if kind in ("ddp", "zero1"):
            model = DDP(model)
        elif kind in ("fsdp2", "hsdp"):
            cut(model, grid() if kind == "hsdp" else None)
        elif kind == "tensor_parallel":
            parallelize_module(model, line(), {"0": ColwiseParallel(), "1": RowwiseParallel()})
        optimizer = lamb(model.parameters())
        if kind == "zero1":
            optimizer.bind(distopt.layout.zero1_layout(model.module, line()))
        found[kind] = _with_state(model, optimizer)
    for stage in (1, 2, 3) if world == 2 else ():
        model = wide()
        optimizer, engine = with_deepspeed(stage, model, dtype, [p for p in model.parameters() if p.requires_grad])
        found[f"deepspeed{stage}"] = _with_state(engine, optimizer)
        engine.destroy()
    return found


@torch.no_grad()
def _with_state(model: nn.Module, optimizer: distopt.LAMB) -> distopt.Fingerprint:
    """With a state that is not zero everywhere: the exp_avg of each weight is the weight."""
    optimizer.init_state()
    layout = optimizer.layout
    for owner in layout.segments:
        buffer = optimizer.state[owner]["exp_avg"]
        if owner.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters()):
            for to, weight in zip(layout.split(owner, buffer), layout.split(owner, owner.detach())):
                to.copy_(weight)
    return distopt.fingerprint(model, optimizer)


# Loops as people write them, with a proof at every step.


class Loop(NamedTuple):
    wrap: Callable[[nn.Module], Any]
    bind: Callable[[Any], Any] | None = None
    sam: Callable[[Any], Any] | None = None
    optimizer: Any = distopt.LAMB
    micro_batches: int = 1
    dtype: torch.dtype = torch.float32


def classifier(dtype: torch.dtype) -> nn.Sequential:
    """With an embedding, statistics of each rank's own batches, and dropout that is not the same on two ranks."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(40) if dtype == torch.float32 else nn.Identity()
    layers = [nn.Embedding(50, 24), nn.Flatten(), nn.Linear(24 * 6, 40), norm, nn.Dropout(0.2), nn.GELU()]
    return nn.Sequential(*layers, nn.LayerNorm(40), nn.Linear(40, 7)).to(dtype)


def _units(model: Any) -> Any:
    units = [model.module[0], model.module[2], model.module[7]]
    return distopt.layout.zero1_layout(model, line(), units=units, gradients="reduce_scatter")


def _mixed(model: nn.Module) -> Any:
    model[3] = nn.Identity()  # torch's batch norm takes no bfloat16 with statistics in float32
    return cut(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def _zero1(model: Any) -> Any:
    return distopt.layout.zero1_layout(model.module, line())


LOOPS: dict[str, Loop] = {
    "ddp": Loop(DDP),
    "ddp, three micro-batches": Loop(DDP, micro_batches=3),
    "ddp, bfloat16 weights": Loop(DDP, optimizer=distopt.AdamW, dtype=torch.bfloat16),
    "ddp, SAM": Loop(DDP, sam=lambda o: distopt.SAM(o, rho=0.05)),
    "ddp, SAM by own gradients": Loop(DDP, sam=lambda o: distopt.SAM(o, rho=0.05, scope="local")),
    "ddp, LookSAM": Loop(DDP, sam=lambda o: distopt.LookSAM(o, rho=0.05)),
    "ddp, torch's AdamW": Loop(DDP, optimizer=torch.optim.AdamW),
    "zero1": Loop(DDP, _zero1),
    "zero1, masters": Loop(DDP, _zero1, dtype=torch.bfloat16),
    "zero1, scattered, overlapped": Loop(DDP, _units),
    "zero1, scattered, SAM": Loop(
        DDP,
        lambda m: distopt.layout.zero1_layout(m, line(), gradients="reduce_scatter"),
        lambda o: distopt.SAM(o, rho=0.05),
    ),
    "fsdp2": Loop(cut),
    "fsdp2, mixed precision": Loop(_mixed),
    "fsdp2, SAM": Loop(cut, sam=lambda o: distopt.SAM(o, rho=0.05)),
    "ddp, torch's Adafactor": Loop(DDP, optimizer=torch.optim.Adafactor),
    "hsdp": Loop(lambda m: cut(m, grid())),
    "hsdp, SAM": Loop(lambda m: cut(m, grid()), sam=lambda o: distopt.SAM(o, rho=0.05)),
}


def loop(name: str, steps: int) -> str:
    """The alarm, if there is one."""
    chosen = LOOPS[name]
    model = chosen.wrap(classifier(chosen.dtype))
    plain = getattr(model, "module", model)
    groups = list(plain.parameters()) if "torch" in name else distopt.param_groups(plain)
    optimizer = chosen.optimizer(groups, lr=1e-2)
    if chosen.bind:
        optimizer.bind(chosen.bind(model))
    distopt.prove_every(optimizer, plain, steps=1, state=True)
    stepper = chosen.sam(optimizer) if chosen.sam else optimizer
    if chosen.sam:
        stepper.model = plain
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=2, total_steps=2 * steps)
    torch.manual_seed(100 + dist.get_rank())

    def loss() -> Tensor:
        x, y = torch.randint(0, 50, (8, 6)), torch.randint(0, 7, (8,))
        return nn.functional.cross_entropy(model(x).float(), y)

    def closure() -> Tensor:
        stepper.zero_grad()
        value = loss()
        value.backward()
        return value

    try:
        for _ in range(steps):
            if chosen.sam:
                stepper.step(closure)
            else:
                optimizer.zero_grad()
                for _ in range(chosen.micro_batches):
                    loss().backward()
                distopt.clip_grad_norm_(optimizer, 1.0)
                optimizer.step()
            schedule.step()
    except ValueError as error:
        return str(error)
    return ""


def loops(steps: int) -> dict[str, str]:
    """The alarms of all loops that this number of ranks can run."""
    names = [name for name in LOOPS if "hsdp" not in name or dist.get_world_size() == 4]
    return {name: said for name in names if (said := loop(name, steps))}
