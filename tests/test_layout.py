"""ShardLayout: the norms of full parameters, the same on every rank and as without sharding, for one all-reduce."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import distopt
from distopt import layout
from distopt.layout import Segment, ShardLayout
from tests.harness.cells import some
from tests.harness.distributed import RankError, run
from tests.harness.sharded import EVERYWHERE, mesh, sharded, whole

everywhere = pytest.mark.parametrize(("kind", "world"), EVERYWHERE)


def norms_of(params: list[Tensor], *lists: list[Tensor]) -> list[list[float]]:
    """The norms by their layout of the parameters, or of other tensors that lie as they do."""
    lay = layout.infer_layout(params)
    shards = [[shard for p, t in zip(params, ts) for shard in lay.split(p, t)] for ts in lists or [params]]
    return [norms.tolist() for norms in lay.norms(lay.layers(params), *shards)]


def exact(params: list[Tensor]) -> list[float]:
    return [float(p.detach().double().norm()) for p in params]


# Norms of full parameters.


@torch.no_grad()
def norms_on(kind: str, dtype: torch.dtype) -> tuple[list[list[float]], list[tuple[str, int]]]:
    params = list(sharded(kind, dtype).parameters())
    where = [(str(getattr(p, "placements", "plain")), layout.local(p).numel()) for p in params]
    return norms_of(params, params, [-3.0 * p for p in params]), where


@everywhere
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-7)], ids=str)
def test_norms_are_those_of_full_layers(kind: str, world: int, dtype: torch.dtype, tolerance: float) -> None:
    """Some 20 numbers a layer; their rounding is all that may differ. The same bits on every rank."""
    expected = exact(list(whole(kind, dtype).parameters()))
    results = run(world, norms_on, kind, dtype)
    for (ours, tripled), _ in results:
        assert ours == pytest.approx(expected, rel=tolerance)
        assert tripled == pytest.approx([3.0 * norm for norm in expected], rel=tolerance)
        assert (ours, tripled) == tuple(results[0][0])


@everywhere
def test_the_layouts_are_what_their_names_say(kind: str, world: int) -> None:
    """Lest the tests of this file compare full models with full models."""
    wheres = [where for _, where in run(world, norms_on, kind, torch.float64)]
    placements = {placement for where in wheres for placement, _ in where}
    sizes = {numel for where in wheres for _, numel in where}
    assert (
        placements
        == {
            "replicated": {"plain"},
            "zero1": {"plain"},
            "fsdp2": {"(Shard(dim=0),)"},
            "mixed": {"(Shard(dim=0),)", "plain"},
            "hsdp": {"(Replicate(), Shard(dim=0))"},
            # Cut along both axes; along dp alone (down.bias); on a mesh of dp alone (norm).
            "tp_fsdp": {
                "(_StridedShard(dim=0, sf=2), Shard(dim=0))",
                "(Shard(dim=0), Shard(dim=1))",
                "(Shard(dim=0), Replicate())",
                "(Shard(dim=0),)",
            },
            "experts": {
                "(_StridedShard(dim=0, sf=2), Shard(dim=0))",  # by expert along both axes
                "(Shard(dim=1), Shard(dim=0))",
                "(Shard(dim=0), Replicate())",
                "(Shard(dim=0),)",  # over all ranks
            },
        }[kind]
    )
    if world > 1 and kind in ("fsdp2", "mixed", "hsdp"):
        assert 0 in sizes  # a row is not enough for all


PLACEMENTS = {
    "rows": [Shard(0), Shard(0)],
    "rows and columns": [Shard(0), Shard(1)],
    "rows along dp, equal along tp": [Shard(0), Replicate()],
    "columns along tp, equal along dp": [Replicate(), Shard(1)],
    "equal everywhere": [Replicate(), Replicate()],
    "plain": None,
}


@torch.no_grad()
def norms_beside(names: list[str], dims: tuple[int, ...]) -> list[float]:
    grid = mesh((2, 2), ("dp", "tp"))
    params = [placed(value, grid, PLACEMENTS[name]) for name, value in zip(names, values(len(names), dims))]
    return norms_of(params)[0]


def placed(value: Tensor, grid: DeviceMesh, placements: list[Placement] | None) -> Tensor:
    # Every rank has the value: none need be sent.
    return value if placements is None else distribute_tensor(value, grid, placements, src_data_rank=None)


def values(count: int, dims: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(dims, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(count)]


@pytest.mark.parametrize("dims", [(1, 3), (3, 1), (5, 5), (8, 4)], ids=str)
@pytest.mark.parametrize("others", [[], list(PLACEMENTS)], ids=["alone", "beside all others"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_element_counts_once_however_it_is_repeated(name: str, others: list[str], dims: tuple[int, ...]) -> None:
    """A layer that is replicated along an axis that shards another was counted once for each rank of that axis."""
    names = [name, *others]
    for norms in run(4, norms_beside, names, dims):
        assert norms == pytest.approx(exact(values(len(names), dims)), rel=1e-14)


@pytest.mark.parametrize("numel", [2_000, 65_536, 70_003, 10_000_000])
@pytest.mark.parametrize("spread", ["random", "equal"])
def test_norms_of_float32_are_right_for_large_layers(numel: int, spread: str) -> None:
    """torch 2.13 on the CPU sums a float32 tensor in a few long chains: its norm of 1e7 random numbers is off by 3e-4,
    of 5e7 by 4e-3, and of equal ones (as Adam makes them of zeros) by 4e-5 for 65,536 already; that would be the error
    of a trust ratio. In rows it is off by 3e-7 at any size."""
    if spread == "equal":
        large = torch.full((numel,), 4e-4)
    else:
        large = torch.randn(numel, generator=torch.Generator().manual_seed(0)).mul_(0.01)
    expected = math.sqrt(sum(float(piece.double().square().sum()) for piece in large.split(1_000_000)))
    transposed = large[:6000].view(20, -1).t()
    ((first, second),) = norms_of([large, transposed])
    assert first == pytest.approx(expected, rel=5e-7)
    assert second == pytest.approx(*exact([transposed]), rel=5e-7)


def on_equal_meshes() -> list[tuple[int, bool, int]]:
    """Two models, each on a mesh of its own: on how many meshes its parameters are, whether the norms are right, and
    how many collectives they cost."""
    results = []
    torch.manual_seed(0)  # the same weights on every rank, whatever ran before
    models = [nn.Sequential(nn.Linear(3, 37), nn.Linear(37, n)).double() for n in (41, 43)]
    for model in models:
        params = list(model.parameters())
        expected = exact(params)
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=grid)
        params = list(model.parameters())
        with CommDebugMode() as mode:
            (norms,) = norms_of(params)
        results.append(
            (len({id(p.device_mesh) for p in params}), norms == pytest.approx(expected), mode.get_total_counts())
        )
    return results


def test_equal_meshes_are_one() -> None:
    """torch 2.13 gives a parameter the mesh that an equal one had before, if its shape occurred there: the second HSDP
    model of a process was refused, its parameters being on two meshes."""
    assert run(4, on_equal_meshes)[0][1] == (2, True, 1)


def test_norms_of_bfloat16_are_summed_in_float32() -> None:
    """Summed in eight bits, the squares of ones would stop growing at 256."""
    ((norm,),) = norms_of([torch.ones(100_000, dtype=torch.bfloat16)])
    assert norm == pytest.approx(math.sqrt(100_000), rel=1e-6)


def test_a_norm_is_finite_where_its_square_is_not_in_float32() -> None:
    ((norm,),) = norms_of([torch.full((400, 1000), 4e16)])
    assert norm == pytest.approx(4e16 * math.sqrt(400_000), rel=1e-6)


def test_no_parameters_have_no_norms() -> None:
    assert norms_of([]) == [[]]
    assert norms_of([torch.empty(0, 3), torch.ones(())]) == [[0.0, 1.0]]


# inf and nan.


@torch.no_grad()
def spoiled(kind: str, name: str, value: float) -> list[float]:
    """The norms where the last element of one layer is not finite, which few ranks hold."""
    model = sharded(kind)
    shard = layout.local(model.get_parameter(name)).view(-1)
    indices = shard.new_tensor([shard.numel(), dist.get_rank()])
    everyone = [torch.empty_like(indices) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, indices)
    if dist.get_rank() == max(rank for rank, (numel, _) in enumerate(everyone) if numel):
        shard[-1] = value
    return norms_of(list(model.parameters()))[0]


@pytest.mark.parametrize(("kind", "name"), [("fsdp2", "part.scale"), ("mixed", "part.wide"), ("tp_fsdp", "up.bias")])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_inf_and_nan_reach_every_rank(kind: str, name: str, value: float) -> None:
    names = [n for n, _ in whole(kind, torch.float64).named_parameters()]
    for norms in run(4, spoiled, kind, name, value):
        assert [n for n, norm in zip(names, norms) if not math.isfinite(norm)] == [name]
        assert math.isnan(norms[names.index(name)]) == math.isnan(value)


# What is refused.


def partial() -> None:
    p = DTensor.from_local(torch.ones(3), mesh((2,), ("shard",)), [Partial()])
    layout.infer_layout([p])


def foreign_meshes() -> None:
    """Which ranks have the same experts, no mesh says."""
    flat, pairs = mesh((4,), ("shard",)), mesh((2, 2), ("dp", "ep"))["ep"]
    layout.infer_layout([placed(torch.ones(4, 4), flat, [Shard(0)]), placed(torch.ones(4, 4), pairs, [Shard(0)])])


def gradient_lies_elsewhere(placement: Placement | None, use: str) -> None:
    over = mesh((2,), ("shard",))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), over, [Shard(0)]))
    opt = distopt.LAMB([p])
    if placement is None:
        distopt.layout.infer_layout([p]).split(p, torch.ones(4, 4))
    p.grad = distribute_tensor(torch.ones(4, 4), over, [placement])
    {"step": opt.step, "clip": lambda: distopt.clip_grad_norm_(opt, 1.0), "perturb": distopt.SAM(opt).perturb}[use]()


REFUSALS: list[tuple[int, Any, tuple[Any, ...], str]] = [
    (2, partial, (), r"partial sums have no norm; redistribute"),
    (
        4,
        foreign_meshes,
        (),
        r"not axes of one.* no axis or mesh .* has full copies of all.*Replicate\(\)",
    ),
    *[
        (
            2,
            gradient_lies_elsewhere,
            (placement, use),
            r"belongs to a parameter with \(Shard\(dim=0\),\): redistribute it",
        )
        for placement in (Replicate(), Shard(1))
        for use in ("step", "clip", "perturb")
    ],
    (2, gradient_lies_elsewhere, (None, "step"), r"placements none \(plain\) belongs to a parameter with \(Shard"),
]


@pytest.mark.parametrize(("world", "what", "args", "message"), REFUSALS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_what_has_no_norm_is_refused(world: int, what: Any, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RankError) as error:
        run(world, what, *args)
    assert error.value.kind == "ValueError"
    assert re.search(message, error.value.message), error.value.message


# A layout that is bound: flat tensors that cut layers anywhere.


def test_split_gives_a_view_of_each_layer() -> None:
    flat = torch.arange(10.0)
    lay = ShardLayout({flat: (Segment(2, 0, 4), Segment(0, 5, 5))}, params=(torch.zeros(1),) * 3, device=flat.device)
    assert flat in lay
    assert torch.ones(10) not in lay
    assert lay.layers([flat, flat]) == [2, 0, 2, 0]
    first, second = lay.split(flat, flat)
    assert first.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert second.tolist() == [5.0, 6.0, 7.0, 8.0, 9.0]
    assert first.data_ptr() == flat.data_ptr()
    (norms,) = lay.norms([2, 0], [first, second])
    assert norms.tolist() == pytest.approx(exact([second, torch.zeros(1), first]), rel=1e-6)


# Collectives.

KINDS: dict[str, tuple[int, tuple[int, ...], list[Placement] | None]] = {
    "replicated": (4, (4,), None),
    "one rank": (1, (1,), [Shard(0)]),
    "fsdp2": (4, (4,), [Shard(0)]),
    "hsdp": (4, (2, 2), [Replicate(), Shard(0)]),
    "equal": (4, (2, 2), [Replicate(), Replicate()]),
    "tp_fsdp": (4, (2, 2), [Shard(0), Shard(1)]),
}
# By kind, the mesh axes that shard.
AXES = {"replicated": 0, "one rank": 0, "fsdp2": 1, "hsdp": 1, "equal": 0, "tp_fsdp": 2}
# What each does per axis.
ACTIONS = {
    "clip": 1,
    "grad_norms": 1,
    "perturb": 1,
    "SGD": 0,
    "Adagrad": 0,
    "RMSprop": 0,
    "Adam": 0,
    "AdamW": 0,
    "LAMB": 1,
    "LARS": 1,
    "clip and LAMB": 2,
    "clip and torch's AdamW": 1,
}
CLASSES = {cls.__name__: cls for cls in (distopt.Adagrad, distopt.RMSprop, distopt.Adam, distopt.AdamW, distopt.LAMB)}
CLASSES |= {"LARS": distopt.LARS, "clip and LAMB": distopt.LAMB, "clip and torch's AdamW": torch.optim.AdamW}


def collectives(kind: str, layers: int, groups: int) -> dict[str, list[int]]:
    """All that the rank's first and second of each action communicates."""
    _, shape, placements = KINDS[kind]
    over = mesh(shape, ("dp", "tp")[: len(shape)])
    counts = {}
    for action in ACTIONS:
        params = [nn.Parameter(placed(value, over, placements)) for value in values(layers, (3, 5))]
        for p in params:
            p.grad = p.detach().clone()
        cls = CLASSES.get(action, distopt.SGD)
        opt = cls([{"params": params[i::groups]} for i in range(groups)])
        sam = distopt.SAM(opt)
        distopt.prove_every(opt, steps=0)  # what a step without a proof sends
        counts[action] = []
        for _ in range(2):
            with CommDebugMode() as mode:
                if "clip" in action:
                    distopt.clip_grad_norm_(opt, 1.0)
                elif action == "grad_norms":
                    distopt.grad_norms(opt)
                elif action == "perturb":
                    sam.perturb()
                    sam.restore()
                if action not in ("clip", "grad_norms", "perturb"):
                    opt.step()
            counts[action].append(mode.get_total_counts())
    return counts


MODELS = [(3, 1), (3, 3), (15, 3)]  # layers and param groups
QUICK = [("fsdp2", (3, 1)), ("fsdp2", (3, 3)), *((kind, (15, 3)) for kind in KINDS)]


@pytest.mark.parametrize(("kind", "model"), some(QUICK, itertools.product(KINDS, MODELS)))
def test_collectives_do_not_grow_with_the_model(kind: str, model: tuple[int, int]) -> None:
    for counts in run(KINDS[kind][0], collectives, kind, *model):
        assert counts == {action: [per_axis * AXES[kind]] * 2 for action, per_axis in ACTIONS.items()}


def counted() -> list[int]:
    """What the counter sees: our own calls, those that DTensor makes, and those that torch's norm makes."""
    p = distribute_tensor(torch.ones(4, 4), mesh((4,), ("shard",)), [Shard(0)])
    calls = [
        lambda: dist.all_reduce(torch.ones(3)),
        lambda: dist.broadcast(torch.ones(3), 0),
        lambda: dist.all_gather([torch.ones(3) for _ in range(4)], torch.ones(3)),
        lambda: p.full_tensor(),
        lambda: torch.linalg.vector_norm(p).full_tensor(),
        lambda: p * 2,
    ]
    totals = []
    for call in calls:
        with CommDebugMode() as mode:
            call()
        totals.append(mode.get_total_counts())
    return totals


def test_the_counter_sees_plain_and_functional_collectives() -> None:
    """Or the zeros above would mean nothing."""
    assert run(4, counted) == [[1, 1, 1, 1, 1, 0]] * 4
