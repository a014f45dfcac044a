"""Sharding that no placement tells: refused in a sentence, before anything moves; and what is right beside FSDP2."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import layout
from tests.harness.distributed import run
from tests.harness.optimizers import distance
from tests.harness.sharded import full, mesh, reduce_scattered

# One parameter, marked or made as libraries do it: all that an optimizer sees.


class Wrapped(Tensor):
    """As torchao's: another tensor inside, none of its elements at its own address."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*[a.inner if isinstance(a, Wrapped) else a for a in args], **(kwargs or {}))


def marked(**marks: Any) -> Callable[[], Tensor]:
    def make() -> Tensor:
        p = nn.Parameter(torch.ones(4, 4))
        for name, value in marks.items():
            setattr(p, name, value)
        return p

    return make


def freed() -> Tensor:
    p = nn.Parameter(torch.ones(4, 4))
    p.untyped_storage().resize_(0)
    return p


def wrapper() -> Tensor:
    return Wrapped(torch.ones(4, 4)).requires_grad_()


FOREIGN: list[tuple[Callable[[], Tensor], str]] = [
    (marked(_is_flat_param=True), "FSDP1.*fully_shard"),
    (marked(_fsdp_flattened=True), "FSDP1.*fully_shard"),
    (marked(tensor_model_parallel=True), r"tensor-parallel.*set the mark to False \(tensor_model_parallel=True\)"),
    (marked(model_parallel=True), "tensor-parallel.*DTensor"),
    (marked(allreduce=False), r"expert.*set the mark to True \(allreduce=False\)"),
    (marked(ds_tensor=torch.ones(8)), r"stage 3.*bind\(distopt.layout.deepspeed_layout\(engine\)\)"),
    (freed, "no memory any more.*before the first forward pass"),
    (wrapper, "is a Wrapped.*train the tensor that it wraps"),
]


@pytest.mark.parametrize(("make", "message"), FOREIGN, ids=lambda x: x if isinstance(x, str) else "")
def test_what_says_that_it_is_a_shard_is_refused(make: Callable[[], Tensor], message: str) -> None:
    """Each was stepped by the norm of what this rank has of it, or crashed the process by its address."""
    for kind in (distopt.LAMB, torch.optim.AdamW):
        inner: Any = kind([make()], lr=0.1)
        for use in (lambda: distopt.clip_grad_norm_(inner, 1.0), distopt.SAM(inner).perturb):  # noqa: B023
            with pytest.raises(ValueError, match=message):
                use()
    with pytest.raises(ValueError, match=message):
        distopt.LAMB([make()]).step()


def test_marks_of_full_weights_are_no_shards() -> None:
    """Megatron marks every parameter, and those that every rank has by the other value."""
    p = marked(tensor_model_parallel=False, allreduce=True, sequence_parallel=True, partition_dim=-1)()
    p.grad = torch.ones(4, 4)
    distopt.LAMB([p], lr=0.1, weight_decay=0.0).step()
    assert torch.allclose(p, torch.full((4, 4), 0.9))


def test_a_parameter_without_elements_has_no_memory_to_lose() -> None:
    p = nn.Parameter(torch.ones(0, 4))
    p.grad = torch.ones(0, 4)
    distopt.LAMB([p]).step()


# Models that are sharded for real.


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()


def batch(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(step)
    samples = [torch.randn(8, n, generator=numbers, dtype=torch.float64) for n in (8, 4)]
    x, y = (s.chunk(world)[rank] for s in samples)
    return x, y


def loss(model: nn.Module, step: int = 0, rank: int = 0, world: int = 1) -> Tensor:
    x, y = batch(step, rank, world)
    return (model(x) - y).square().mean()


def fsdp1(orig: bool) -> tuple[nn.Module, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=orig)
    return model, distopt.LAMB(model.parameters(), lr=0.1)


def made_before(tensor_parallel: bool) -> tuple[nn.Module, Any]:
    model = net()
    if tensor_parallel:  # its parameters are DTensors, which fully_shard replaces all the same
        parallelize_module(model, mesh((1, 2), ("dp", "tp"))["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = distopt.LAMB(model.parameters(), lr=0.1)
    return fully_shard(model, mesh=mesh((1, 2), ("dp", "tp"))["dp"] if tensor_parallel else None), optimizer


def made_after_a_forward_pass(state: bool) -> tuple[nn.Module, Any]:
    model = fully_shard(net())
    with torch.no_grad():
        model(torch.ones(1, 8, dtype=torch.float64))
    optimizer = distopt.LAMB(model.parameters(), lr=0.1)
    if state:  # while the unsharded copies still have their memory
        optimizer.init_state()
    return model, optimizer


WRONG: dict[str, tuple[Callable[[Any], tuple[nn.Module, Any]], Any, str]] = {
    "FSDP1, original": (fsdp1, True, "FSDP1"),
    "FSDP1, flat": (fsdp1, False, "FSDP1"),
    "made before": (made_before, False, "replaced in its model by fully_shard"),
    "made before, TP": (made_before, True, "replaced in its model by fully_shard"),
    "made after a forward pass": (made_after_a_forward_pass, False, "no memory any more"),
    "with state": (made_after_a_forward_pass, True, "no memory any more"),
}


def refusals() -> dict[str, str]:
    """What `step` says of each after a backward pass."""
    said = {}
    for name, (make, arg, _) in WRONG.items():
        model, optimizer = make(arg)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(model, 0, dist.get_rank(), 2).backward()
        try:
            optimizer.step()
            said[name] = "stepped"
        except ValueError as error:
            said[name] = str(error)
    return said


def test_models_whose_parameters_are_others_are_refused_on_every_rank() -> None:
    """FSDP1 stepped by norms of one rank's part; the others got no gradient, and did not move, without a word."""
    first, second = run(2, refusals)
    assert first == second
    for name, (*_, message) in WRONG.items():
        assert message in first[name], name
        assert "\n" not in first[name]


# DDP over some of the ranks: two models are trained side by side.


def beside_each_other(scattered: bool) -> list[Tensor]:
    half = dist.get_rank() // 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = DistributedDataParallel(net(), process_group=groups[half])
    optimizer = distopt.LAMB(model.parameters(), lr=0.1)
    optimizer.bind((reduce_scattered if scattered else layout.zero1_layout)(model))
    for step in range(3):
        optimizer.zero_grad()
        loss(model, 10 * half + step, dist.get_rank() % 2, 2).backward()
        distopt.clip_grad_norm_(optimizer, 0.1)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("scattered", [False, True])
def test_zero1_is_sharded_over_the_ranks_of_ddp(scattered: bool) -> None:
    """Rows were sharded over all ranks: each model got half of its rows from the other."""
    expected = []
    for half in range(2):
        model = net()
        optimizer = distopt.LAMB(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            loss(model, 10 * half + step).backward()
            distopt.clip_grad_norm_(optimizer, 0.1)
            optimizer.step()
        expected.append([p.detach() for p in model.parameters()])
    for rank, params in enumerate(run(4, beside_each_other, scattered)):
        assert distance(params, expected[rank // 2]) < 1e-12


def another_mesh() -> str:
    model = DistributedDataParallel(net(), process_group=[dist.new_group([r]) for r in range(2)][dist.get_rank()])
    try:
        layout.zero1_layout(model, mesh((2,), ("shard",)))
    except ValueError as error:
        return str(error)
    return "taken"


def test_a_mesh_of_others_than_the_ranks_of_ddp_is_refused() -> None:
    for rank, said in enumerate(run(2, another_mesh)):
        assert f"rows are of ranks [0, 1], and DDP exchanges gradients among ranks [{rank}]" in said


# Experts, sharded along an axis of their own, beside layers that are sharded along all axes flattened into one.


def beside_experts(one_mesh: bool) -> list[float]:
    grid, flat = mesh((2, 2), ("ep", "dp")), mesh((4,), ("shard",))
    values = [torch.arange(1.0, 97.0, dtype=torch.float64).view(4, 4, 6), torch.ones(8, 4, dtype=torch.float64)]
    experts = distribute_tensor(values[0], grid, [Shard(0), Shard(1)], src_data_rank=None)
    over, placements = (grid, [Replicate(), Shard(0)]) if one_mesh else (flat, [Shard(0)])
    dense = distribute_tensor(values[1], over, placements, src_data_rank=None)
    params = [nn.Parameter(p) for p in (experts, dense)]
    for p in params:
        p.grad = p.detach().clone()
    distopt.LAMB(params, lr=0.1, weight_decay=0.0).step()
    # Adam's first direction is 1 in each element, and the ratio |p| / |direction| brings it to the length of p.
    return [float((p.detach().full_tensor() - value).norm() / value.norm()) for p, value in zip(params, values)]


@pytest.mark.parametrize("one_mesh", [True, False])
def test_experts_are_right_beside_others_on_their_mesh_or_on_another(one_mesh: bool) -> None:
    for moved in run(4, beside_experts, one_mesh):
        assert moved == pytest.approx([0.1, 0.1], rel=1e-5)


# Sequence parallelism: the gradients of norms are sums over the ranks that nobody has added up yet.


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)).tanh())


def in_sequence() -> Normed:
    model = Normed().double()
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    parallelize_module(model, mesh((2,), ("shard",)), plan)
    return model


def train_in_sequence(kind: str, tensor_parallel: bool) -> tuple[list[Tensor], list[float], bool]:
    """The weights, the norms of the gradients, and whether any gradient came as partial sums."""
    model = in_sequence() if tensor_parallel else Normed().double()
    inner: Any = (torch.optim.AdamW if kind == "torch" else distopt.LAMB)(model.parameters(), lr=0.05)
    optimizer = distopt.SAM(inner, rho=0.1) if kind == "sam" else inner
    norms, partial = [], False

    def backward(step: int) -> None:
        for i in range(2):  # accumulated: the second adds partial sums to partial sums
            x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(10 * step + i), dtype=torch.float64)
            output = model(distribute_tensor(x, mesh((2,), ("shard",)), [Shard(1)]) if tensor_parallel else x)
            total = output.square().sum() / x.numel()
            (total.full_tensor() if tensor_parallel else total).backward()

    for step in range(3):
        optimizer.zero_grad()
        backward(step)
        grads = [p.grad for p in model.parameters()]
        partial |= any(g.placements[0].is_partial() for g in grads if isinstance(g, DTensor))
        if kind == "sam":
            optimizer.perturb()
            optimizer.zero_grad()
            backward(step)
            optimizer.restore()
        norms.append(float(distopt.clip_grad_norm_(optimizer, 0.01)))
        optimizer.step()
    return full(model), norms, partial


@pytest.mark.parametrize("kind", ["ours", "torch", "sam"])
def test_partial_gradients_are_added_up(kind: str) -> None:
    """They were refused, where torch's own optimizers add them up."""
    expected, norms, _ = train_in_sequence(kind, False)
    for params, ours, partial in run(2, train_in_sequence, kind, True):
        assert partial
        assert ours == pytest.approx(norms, rel=1e-12)
        assert distance(params, expected) < 1e-10
