"""Muon: torch's, an SVD's, and the same bits however the matrices are sharded; two collectives for many of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import layout
from distopt.engine import DDP, FSDP2, Zero1
from distopt.layout.bucketed import bucket_layout
from distopt.layout.matrices import balance, matrices, with_owners
from distopt.optim.newton_schulz import newton_schulz, newton_schulz_cost
from distopt.plan.footprint import Param
from distopt.plan.matrices import matrix_wire, work_of_ranks
from tests.harness import checkpoints, oracles
from tests.harness.bits import full
from tests.harness.cells import some
from tests.harness.checkpoints import assert_equal, everything, start, train
from tests.harness.distributed import RankError, run
from tests.harness.engines import ENGINES
from tests.harness.matrix import FEW, TOLERANCE, Job
from tests.harness.matrix import trained as trained_on
from tests.harness.optimizers import distance, initial, pull
from tests.harness.sharded import mesh
from tests.test_checkpoint import first_half, second_half

# Tall, wide, square, fewer rows than ranks, one row, one column; a stack; a filter; a vector, which AdamW has.
SHAPES = ((48, 20), (9, 31), (16, 16), (2, 7), (1, 6), (6, 1), (5, 8, 6), (6, 4, 3, 2), (8,))
STEPS = 3


def groups(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Two groups of matrices with rates of their own, and one of vectors."""
    matrix = [p for p in params if p.ndim > 1]
    vectors = {"params": [p for p in params if p.ndim < 2], "rule": "adamw", "lr": 0.01}
    return [{"params": matrix[::2]}, {"params": matrix[1::2], "lr": 0.05, "weight_decay": 0.0}, vectors]


def test_the_defaults_the_steps_and_the_state_are_torchs() -> None:
    """In bfloat16 too; a state dict of torch's goes into ours and back, and both go on alike."""
    ours, theirs = ([p.requires_grad_() for p in initial((7, 5), (6, 30), (3, 3), dtype=torch.float32)] for _ in "ab")
    opt, peer = distopt.Muon(ours), torch.optim.Muon(theirs)
    assert {**opt.defaults, **peer.defaults} == opt.defaults
    for _ in range(2):
        for step in range(3):
            for params, each in ((ours, opt), (theirs, peer)):
                each.zero_grad()
                pull(params, step).backward()
                each.step()
        states = copy.deepcopy((opt.state_dict(), peer.state_dict()))
        opt.load_state_dict(states[1])
        peer.load_state_dict(states[0])
    # The weights differ by roundings of float32, which bfloat16 rarely shows: torch subtracts decay and step in turn.
    assert distance(ours, theirs) < 1e-5


def test_the_default_iterations_are_those_of_an_svd() -> None:
    params = [p.requires_grad_() for p in initial((40, 12), (7, 30), (3, 4, 5), (4, 3, 2, 2))]
    opt = distopt.Muon(params, lr=0.1, ns_dtype="float32")
    expected = oracles.muon(params, oracles.gradient_of(pull), 5, lr=0.1)
    for after in expected:
        opt.zero_grad()
        pull(params, len(opt.state) and int(opt.state[params[0]]["step"])).backward()
        opt.step()
        # Rounding of 1e-16, which five iterations stretch by up to 3.4^5.
        assert distance(params, after) < 1e-12


def test_singular_values_move_towards_one() -> None:
    matrix = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(newton_schulz(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7))
    assert 0.6 < values.min() < values.max() < 1.3


WAYS: dict[str, tuple[tuple[int, ...], tuple[Any, ...]]] = {
    "ddp": ((3,), ()),
    "zero1": ((3,), ()),
    "buckets": ((3,), ()),
    "rows": ((3,), (Shard(0),)),
    "columns": ((4,), (Shard(1),)),
    "hsdp": ((2, 2), (Replicate(), Shard(0))),
    "rows of columns": ((2, 2), (Shard(0), Shard(1))),
    "rows of rows": ((2, 2), (Shard(0), Shard(0))),
}


@lru_cache
def numbers(step: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=source) * torch.exp(torch.randn(shape, generator=source)) for shape in SHAPES]


def trained(way: str, ns_dtype: str, clips: bool) -> list[Tensor]:
    """The full weights and momenta after some steps, in which some parameters have no gradient, by small exchanges."""
    shape, placements = WAYS.get(way, ((), ()))
    where = mesh(shape, ("a", "b")[: len(shape)]) if shape else None

    def placed(value: Tensor) -> Tensor:
        if not placements:
            return value.clone()
        fits = [p if not p.is_shard() or value.ndim > p.dim else Replicate() for p in placements]
        return distribute_tensor(value.clone(), where, fits, src_data_rank=None)

    params = [nn.Parameter(placed(p)) for p in initial(*SHAPES, dtype=torch.float32)]
    opt = distopt.Muon(groups(params), lr=0.1, ns_dtype=ns_dtype)
    if way == "ddp":
        opt.bind(layout.ddp_layout(DistributedDataParallel(nn.ParameterList(params))))
    if way == "zero1":
        opt.bind(layout.zero1_layout(nn.ParameterList(params), where))
    if way == "buckets" and where is not None:
        opt.bind(bucket_layout(params, where))
    made = distopt.Muon._exchanges_of

    def small(self: distopt.Muon, where: layout.ShardLayout, layers: tuple[int, ...], limit: int) -> Any:
        return made(self, where, layers, 1500)

    with mock.patch.object(distopt.Muon, "_exchanges_of", small):
        for step in range(STEPS):
            for i, (p, grad) in enumerate(zip(params, numbers(step))):
                p.grad = placed(grad) if (step + i) % 4 else None
            if clips:
                distopt.clip_grad_norm_(opt, 10.0)
            opt.step()
    return [full(t) for t in [*params, *[opt.state[p]["momentum_buffer"] for p in params if p.ndim > 1]]]


@pytest.mark.parametrize("way", WAYS)
def test_given_equal_gradients_the_bits_are_those_of_one_rank(way: str) -> None:
    clips = "columns" not in way  # the norm is the same bits on layouts by rows alone
    for ns_dtype in ("bfloat16", "float32"):
        expected = trained("", ns_dtype, clips)
        for found in run(torch.Size(WAYS[way][0]).numel(), trained, way, ns_dtype, clips):
            assert [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("engine", some(["zero2", "deepspeed_zero2"], ENGINES))
def test_on_every_engine_it_is_the_unsharded_run(engine: str) -> None:
    """The cells of the equivalence matrix that `make test` leaves to `make matrix` with its other rows."""
    job = Job(engine, 2, "fp32", 2, "some", FEW)
    for params in run(2, trained_on, job, "muon"):
        assert distance(params, job.unsharded("muon")) < TOLERANCE["fp32"]


def collectives(count: int) -> list[int]:
    world = mesh((2,), ("a",))
    params = [nn.Parameter(distribute_tensor(p, world, [Shard(0)])) for p in initial(*[(8, 6)] * count)]
    opt = distopt.Muon(params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    with mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as calls:
        opt.step()
    return [calls.call_count]


def test_a_step_has_two_collectives_whatever_the_number_of_matrices() -> None:
    assert [run(2, collectives, count) for count in (1, 16)] == [[[2], [2]]] * 2


def llama_7b() -> Iterator[tuple[int, int]]:
    for _ in range(32):
        yield from [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def test_the_owners_of_llama_7b_have_equal_work() -> None:
    found = [m for layer, shape in enumerate(llama_7b()) for m in matrices(layer, shape)]
    for ranks in (8, 64):
        owned = with_owners(found, [{}] * ranks, newton_schulz_cost)
        assert balance(owned, ranks, newton_schulz_cost) < 1.05


def test_a_plan_has_the_work_of_the_ranks_and_what_travels() -> None:
    matrix = Param((64, 32), True, 1, work=newton_schulz_cost)
    units = [[matrix, Param((64,), True, 2)]] * 4
    assert work_of_ranks(units, 2) == [2 * newton_schulz_cost(64, 32)] * 2
    assert work_of_ranks([[Param((64, 32), True, 2)]], 2) == []
    # In bfloat16: each rank sends half of its half there, and half of its results back; under DDP its results.
    assert [c.sent for c in matrix_wire(FSDP2(), units, 2)] == [2 * 4 * 64 * 32 * 2 / 4]
    assert [c.sent for c in matrix_wire(Zero1(), units, 2)] == [2 * 4 * 64 * 32 * 2 / 4]
    assert [c.sent for c in matrix_wire(DDP(), units, 2)] == [4 * 64 * 32 * 2 / 2]


@pytest.mark.parametrize(
    ("engine", "world", "other", "ranks"),
    some([("fsdp2", 4, "zero1", 2)], [("fsdp2", 4, "zero1", 2), ("zero1", 3, "fsdp2", 2), ("hsdp", 4, "ddp", 2)]),
)
def test_a_checkpoint_resumes_on_another_engine(
    tmp_path: Path, engine: str, world: int, other: str, ranks: int
) -> None:
    """As the unbroken run on one rank, in float64, but for the order of sums."""
    run(world, first_half, tmp_path / "it", engine, "muon")
    (got, *_) = run(ranks, second_half, tmp_path / "it", other, "muon")
    parts = start("none", "muon")
    train(*parts, 0, checkpoints.STEPS)
    expected = everything(*parts[:2])
    for found in (got, expected):
        del found["random"], found["calls"]
    assert any(name.endswith("momentum_buffer") for name in got)
    assert_equal(got, expected, 1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ns_steps": 100}, "ns_steps must be an integer from 1 to 99, got 100"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients must be three numbers"),
        ({"adjust_lr_fn": "spectral"}, "adjust_lr_fn must be one of original, match_rms_adamw or null"),
        ({"ns_dtype": "float16"}, "ns_dtype must be one of bfloat16, float32"),
        ({"exchange_mib": 0}, "exchange_mib must be an integer >= 1"),
        ({"trust_ratio": True}, "have a size of their own"),
        ({"cautious": True}, "have a size of their own"),
        ({"capturable": True}, "has no kernel"),
        ({"moment": 0.9}, "unexpected keyword"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        distopt.Muon([torch.zeros(2, 2)], **options)


def test_a_vector_is_refused_and_named() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"^bias has shape \(2,\), and the rule 'muon' is for matrices"):
        distopt.Muon(model.named_parameters())
    opt = distopt.Muon([model.weight])
    with pytest.raises(ValueError, match="parameter 0 of the param group has shape"):
        opt.add_param_group({"params": [model.bias]})
    assert len(opt.param_groups) == 1


def test_a_group_has_the_options_of_its_own_rule() -> None:
    opt = distopt.Muon(groups([*initial(*SHAPES)]), lr=0.3, eps=1e-3, betas=(0.5, 0.6))
    muon, _, adamw = opt.param_groups
    assert (muon["rule"], muon["eps"], muon["lr"]) == ("muon", 1e-3, 0.3)
    assert (adamw["rule"], adamw["eps"], adamw["lr"], adamw["betas"]) == ("adamw", 1e-8, 0.01, (0.5, 0.6))


@pytest.mark.parametrize(("rule", "cls"), [("adamw", distopt.AdamW), ("lion", distopt.Lion)])
def test_a_group_with_another_rule_steps_as_the_optimizer_of_that_name(rule: str, cls: Any) -> None:
    """Bit for bit, and with its state; its neighbours are Muon's."""
    together, alone = ([p.requires_grad_() for p in initial((4, 3), (5,), dtype=torch.float32)] for _ in "ab")
    named: list[dict[str, Any]] = [{"params": together, "rule": rule}, {"params": initial((3, 3))}]
    opt = distopt.Muon(named, lr=0.1, betas=(0.8, 0.9))
    own = cls(alone, lr=0.1, betas=(0.8, 0.9), weight_decay=0.1)
    for step in range(3):
        for params, each in ((together, opt), (alone, own)):
            each.zero_grad()
            pull(params, step).backward()
            each.step()
    assert all(torch.equal(p, q) for p, q in zip(together, alone))
    assert [sorted(opt.state[p]) for p in together] == [sorted(own.state[p]) for p in alone]


def foreign() -> None:
    """Rows of one matrix, without a layout that says which ranks have the others."""
    flat = nn.Parameter(torch.ones(6))
    opt = distopt.Muon([torch.ones(4, 3)])
    opt.param_groups[0]["params"] = [flat]
    whole = torch.ones(4, 3)
    opt.bind(
        layout.ShardLayout({flat: (layout.Segment(0, 0, 6, 6 * dist.get_rank()),)}, params=(whole,), device=flat.device)
    )
    flat.grad = torch.ones(6)
    distopt.prove_every(opt, nn.Module(), steps=0)  # which finds it first
    opt.step()


def test_shards_that_make_up_no_matrix_are_refused() -> None:
    with pytest.raises(RankError, match=r"have 6 elements, the matrix 12: bind the layout that the engine made"):
        run(2, foreign)
