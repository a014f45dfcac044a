"""ZeRO-1 over DDP: which gradients are right after a reduce-scatter, and that no read of others goes unseen."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import layout
from distopt.engine import Zero1
from distopt.layout import param_sync, reduce_scatter
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import distance
from tests.harness.sharded import mesh, reduce_scattered

SHAPES = [(5, 3), (), (1,), (3, 7), (0, 2), (8, 2), (12,)]  # rows that divide by 2, 3, 4 or by none, and one or none


class Seldom(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((5, 3), 0.3, dtype=dtype))
        self.bias = nn.Parameter(torch.full((2,), 0.1, dtype=dtype))

    def forward(self, seed: int) -> Tensor:
        return sum(((seed + i / 3 + p) ** 2).sum() for i, p in enumerate(self.parameters()))


class Mixed(nn.Module):
    """One parameter of each shape, one frozen, and one that is used at step 0 only."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        drawn = [torch.randn(shape, generator=numbers, dtype=torch.float64).to(dtype) for shape in [*SHAPES, (6, 2)]]
        self.all = nn.ParameterList(drawn)
        self.seldom = Seldom(dtype)
        self.all[5].requires_grad_(False)

    def forward(self, seed: int, step: int = 0) -> Tensor:
        # Sums of thirds are not the same in another order.
        loss = sum((((i + seed) / 3 + p) ** 2).sum() for i, p in enumerate(self.all))
        return loss + self.seldom(seed) if step == 0 else loss


def wrapped(dtype: torch.dtype = torch.float64, view: bool = True, cap: float = 25.0) -> DistributedDataParallel:
    model = Mixed(dtype)
    return DistributedDataParallel(
        model, gradient_as_bucket_view=view, bucket_cap_mb=cap, find_unused_parameters=True, forward_sync_buffers=False
    )


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def alone(seeds: list[int], step: int, dtype: torch.dtype) -> list[Tensor | None]:
    """The mean gradient of these ranks, by plain autograd in one process."""
    model = Mixed(dtype)
    (sum(model(seed, step) for seed in seeds) / len(seeds)).backward()
    return [p.grad for p in trained(model)]


def rows(p: Tensor) -> Tensor:
    """Whether each element is in rows that this rank steps: as DTensor cuts them."""
    if p.ndim == 0:
        return torch.ones((), dtype=torch.bool)
    mine = torch.zeros(p.shape, dtype=torch.bool)
    chunks = torch.arange(p.shape[0]).chunk(dist.get_world_size()) if p.shape[0] else ()
    if dist.get_rank() < len(chunks):
        mine[chunks[dist.get_rank()]] = True
    return mine


def scattered_gradients(
    reduce_dtype: torch.dtype | None, dtype: torch.dtype, view: bool, cap: float
) -> tuple[list[float], bool]:
    """The largest differences of the rows that this rank steps over three steps; whether all others are nan."""
    model = wrapped(dtype, view, cap)
    layout.zero1_layout(model, reduce_dtype=reduce_dtype, gradients="reduce_scatter")
    world, rank = dist.get_world_size(), dist.get_rank()
    errors, others = [], True
    for step in range(3):  # after the first one DDP orders its buckets anew
        for p in model.parameters():
            p.grad = None
        with model.no_sync():
            (model(rank, step) / 2).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())  # this rank's own
        (model(rank + 10, step) / 2).backward()
        exact = [alone([*range(world)], step, dtype), alone([*range(10, 10 + world)], step, dtype)]
        for p, a, b in zip(trained(model), *exact, strict=True):
            if a is None or b is None:
                assert p.grad is None
                continue
            mine = rows(p)
            errors.append(distance([p.grad[mine].double()], [((a + b) / 2)[mine].double()]) if mine.any() else 0.0)
            others &= bool(p.grad[~mine].isnan().all())
    return errors, others


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("reduce_dtype", "dtype", "tolerance"),
    [
        (None, torch.float64, 1e-14),
        (torch.float32, torch.float64, 3e-7),
        (torch.bfloat16, torch.float32, 2**-8),  # each is rounded once, and summed in float32
        (torch.float32, torch.bfloat16, 2**-7),
    ],
    ids=str,
)
@pytest.mark.parametrize(("view", "cap"), [(True, 25.0), (False, 1e-4)], ids=["views", "copies, many buckets"])
def test_a_rank_has_the_mean_of_its_rows_and_nan_elsewhere(
    world: int, reduce_dtype: torch.dtype | None, dtype: torch.dtype, tolerance: float, view: bool, cap: float
) -> None:
    """Also after micro-batches without exchange, and for parameters that a step leaves out."""
    for errors, others in run(world, scattered_gradients, reduce_dtype, dtype, view, cap):
        assert max(errors) < tolerance
        assert others


def accumulated(passes: str, view: bool, set_to_none: bool) -> list[tuple[float, bool]]:
    """For each step: how far this rank's rows are from plain DDP's, and whether all others are nan.

    passes: in order, `S` for one that exchanges, `n` for one under no_sync, both of which leave `seldom` out; `U`, `u`
    for those that use every parameter.
    """
    scattered, plain = wrapped(view=view), wrapped(view=view)
    optimizer = distopt.SGD(trained(scattered), lr=0.1)
    optimizer.bind(layout.zero1_layout(scattered, gradients="reduce_scatter"))
    seen = []
    for step in range(3):
        for model in (scattered, plain):
            model.zero_grad(set_to_none=set_to_none)
            for i, kind in enumerate(passes):
                with contextlib.nullcontext() if kind.isupper() else model.no_sync():
                    model(dist.get_rank() + 10 * i + step, step=0 if kind in "Uu" else 1).backward()
        error, others = 0.0, True
        for p, q in zip(trained(scattered), trained(plain), strict=True):
            if q.grad is None:
                assert p.grad is None
                continue
            mine = rows(p)
            error = max(error, distance([p.grad[mine]], [q.grad[mine]]) if mine.any() else 0.0)
            others &= bool(p.grad[~mine].isnan().all())
        seen.append((error, others))
        optimizer.step()
        scattered.load_state_dict(plain.state_dict())
    return seen


@pytest.mark.parametrize("view", [True, False], ids=["views", "copies"])
@pytest.mark.parametrize("set_to_none", [True, False], ids=["none", "zeros"])
def test_gradients_may_be_exchanged_several_times_per_step(view: bool, set_to_none: bool) -> None:
    """Accelerate's own nlp_example accumulates so for large batches, and trained to nan: a pass added to the nan of the
    one before."""
    for passes in ("SS", "SSS", "SnS", "nSnS", "US", "SU", "uS", "SuS", "UnS"):
        for seen in run(3, accumulated, passes, view, set_to_none):
            assert all(error < 1e-14 and others for error, others in seen), (passes, seen)


def stepped_alone(then_exchanged: bool) -> float:
    """A step whose gradients were not exchanged, or were exchanged at last."""
    model = wrapped()
    optimizer = distopt.SGD(trained(model), lr=0.1)
    optimizer.bind(layout.zero1_layout(model, gradients="reduce_scatter"))
    model(dist.get_rank()).backward()
    optimizer.step()
    optimizer.zero_grad()
    with model.no_sync():
        model(dist.get_rank()).backward()
    if then_exchanged:
        model(dist.get_rank(), step=1).backward()
    distopt.clip_grad_norm_(optimizer, 1.0)
    optimizer.step()
    return sum(p.detach().sum().item() for p in model.parameters())


def test_a_step_with_gradients_of_one_rank_is_refused() -> None:
    """Each rank would step its rows by its own samples and send them as everybody's."""
    first, second = run(2, stepped_alone, True)
    assert first == second and math.isfinite(first)
    with pytest.raises(RankError, match=r"this rank's alone.*outside of no_sync, or use plain DDP") as error:
        run(2, stepped_alone, False)
    assert error.value.kind == "ValueError"


def joined(make: Callable[[DistributedDataParallel], Any]) -> None:
    model = wrapped()
    optimizer = distopt.SGD(trained(model), lr=0.1)
    optimizer.bind(make(model))
    with model.join():
        for _ in range(1 + dist.get_rank()):
            model(dist.get_rank()).backward()
            optimizer.step()


@pytest.mark.parametrize("make", [layout.zero1_layout, reduce_scattered])
def test_different_numbers_of_steps_are_refused_at_the_first(make: Callable[[DistributedDataParallel], Any]) -> None:
    """A rank without inputs takes no step, and the others waited for its rows for ever."""
    with pytest.raises(RankError, match=r"runs under Join.*even_batches=True") as error:
        run(2, joined, make)
    assert error.value.kind == "ValueError"


def steps(make: Callable[[DistributedDataParallel], Any], sam: bool) -> tuple[list[list[Tensor]], float]:
    """The parameters after each step, and the last norm."""
    model = wrapped()
    inner = distopt.LAMB(trained(model), lr=0.1)
    inner.bind(make(model))
    optimizer = distopt.SAM(inner, rho=0.5) if sam else inner
    after = []
    for step in range(4):
        for _ in range(1 + sam):
            optimizer.zero_grad()
            model(dist.get_rank(), step).backward()
            if sam and optimizer._perturbation is None:
                optimizer.perturb()
        if sam:
            optimizer.restore()
        norm = distopt.clip_grad_norm_(optimizer, 1.0).item()
        optimizer.step()
        assert inner.layout  # waits
        after.append([p.detach().clone() for p in model.parameters()])
    return after, norm


class Arrived:
    """The work of a reduce-scatter over gloo, which waits and, in torch 2.13, has no future."""

    def __init__(self, send: Tensor, group: dist.ProcessGroup) -> None:
        self.sum = torch.empty_like(send[0])
        dist.reduce_scatter_single(self.sum, send.view(-1), group=group)

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result([self.sum])
        return future


def not_over_gloo() -> contextlib.ExitStack:
    """Uses the collectives of other backends, which gloo has too."""
    stack = contextlib.ExitStack()
    for module in (reduce_scatter, param_sync):
        stack.enter_context(mock.patch.object(module, "over_gloo", lambda *_: False))
    stack.enter_context(mock.patch.object(reduce_scatter, "_reduce_scatter", Arrived))
    return stack


def compared(sam: bool) -> tuple[float, float, list[Tensor]]:
    def with_units(model: Any) -> Any:
        return layout.zero1_layout(model, units=[model.module.seldom], gradients="reduce_scatter")

    whole, norm = steps(layout.zero1_layout, sam)
    others = [steps(make, sam) for make in (reduce_scattered, with_units)]
    with not_over_gloo():
        others += [steps(make, sam) for make in (layout.zero1_layout, reduce_scattered, with_units)]
    differences = [distance(a, b) for after, _ in others for a, b in zip(after, whole, strict=True)]
    return max(differences), max(abs(other / norm - 1) for _, other in others), others[0][0][-1]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("sam", [False, True], ids=["", "SAM"])
def test_training_is_that_of_full_gradients(world: int, sam: bool) -> None:
    """Ranks agree to the last bit, a parameter without rows too; over gloo and by the collectives of other backends."""
    results = run(world, compared, sam)
    for difference, norm, params in results:
        assert difference < 1e-12
        assert norm < 1e-13
        assert all(torch.equal(p, q) for p, q in zip(params, results[0][2]))


# A read of rows in flight does not go unnoticed.


def reads() -> dict[str, bool]:
    """Returns which reads see NaN."""
    model = wrapped()
    optimizer = distopt.SGD(trained(model), lr=0.1)
    bound = layout.zero1_layout(model, units=[model.module.seldom], gradients="reduce_scatter")
    optimizer.bind(bound)
    seen = {}

    def bad(tensors: Any) -> bool:
        return any(not t.isfinite().all() for t in tensors)

    model(dist.get_rank()).backward()
    seen["torch's clip"] = bad([torch.nn.utils.clip_grad_norm_(copies(model), 1.0)])
    seen["distopt's clip"] = bad([distopt.clip_grad_norm_(optimizer, 1.0)])
    model(dist.get_rank()).backward()  # without zero_grad
    seen["torch's clip of a sum"] = bad([torch.nn.utils.clip_grad_norm_(copies(model), 1.0)])
    seen["distopt's clip of a sum"] = bad([distopt.clip_grad_norm_(optimizer)])

    def step() -> None:
        optimizer.zero_grad()
        model(dist.get_rank()).backward()
        optimizer.step()

    step()
    seen["weights on their way"] = bad(model.parameters())
    seen["state dict"] = bad(model.state_dict().values())
    step()
    saved = {name: value + 1 for name, value in copy.deepcopy(model.state_dict()).items()}
    step()
    model.load_state_dict(saved)
    bound.sync.wait()
    seen["loaded"] = distance(list(model.state_dict().values()), list(saved.values())) > 0
    step()
    seen["the next step"] = bad([distopt.clip_grad_norm_(optimizer)])
    seen["asked"] = bad(model.parameters())
    return seen


def copies(model: nn.Module) -> list[Tensor]:
    """Returns parameters with copies of the gradients, since torch's function would overwrite all of them."""
    found = [nn.Parameter(p.detach().clone()) for p in trained(model)]
    for mine, p in zip(found, trained(model)):
        mine.grad = p.grad.clone()
    return found


def test_a_read_of_rows_in_flight_shows() -> None:
    for seen in run(2, reads):
        assert seen == {
            "torch's clip": True,
            "distopt's clip": False,
            "torch's clip of a sum": True,
            "distopt's clip of a sum": False,
            "weights on their way": True,
            "state dict": False,
            "loaded": False,
            "the next step": False,
            "asked": False,
        }


# Refusals.


def bare() -> None:
    layout.zero1_layout(nn.Linear(2, 2), gradients="reduce_scatter")


def hooked() -> None:
    model = wrapped()
    layout.zero1_layout(model, gradients="reduce_scatter")
    layout.zero1_layout(model, gradients="reduce_scatter")


def on_other_ranks() -> None:
    layout.zero1_layout(wrapped(), mesh((1, 2), ("replicate", "shard"))["replicate"], gradients="reduce_scatter")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (bare, r"hook of DDP, got Linear: wrap it, or use gradients='all_reduce'"),
        (hooked, r"has a communication hook already.*use gradients='all_reduce'"),
        (on_other_ranks, r"its ranks in the same order"),
    ],
)
def test_models_that_cannot_be_scattered_are_refused(what: Callable[[], None], message: str) -> None:
    with pytest.raises(RankError) as error:
        run(2, what)
    assert error.value.kind == "ValueError"
    assert re.search(message, error.value.message), error.value.message


@pytest.mark.parametrize("dtype", ["fp16", "bfloat16", torch.bfloat16, 16])
def test_unknown_reduce_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=rf"engine\.reduce_dtype must be one of fp32, bf16 or null, got {dtype!r}"):
        Zero1(reduce_dtype=dtype)
