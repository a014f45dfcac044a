"""ZeRO-1 on buckets: gradients, weights and state in ranges of flat buffers, and what a model may not do afterwards."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

import distopt
from benchmarks.collectives import Collectives
from distopt.checkpoint import load_checkpoint, save_checkpoint
from distopt.engine import Zero1
from distopt.engine.train_step import update
from distopt.layout import bucket, bucket_gradients, bucketed
from distopt.layout.bucketed import BucketLayout
from distopt.layout.range_shard import Range, boxes
from distopt.models.language_model import LanguageModel
from tests.harness.distributed import RankError, run
from tests.harness.engines import CONFIGS, CPU, batch, made, mean
from tests.harness.optimizers import distance
from tests.harness.sharded import mesh
from tests.test_zero1 import Mixed, trained, wrapped


def built(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Zero1, nn.Module, distopt.LAMB]:
    engine = Zero1("fp32", find_unused_parameters=True, **options)
    model = Mixed(dtype)
    engine.build(model, [model.seldom], lambda unit, device: None, CPU)
    optimizer = distopt.LAMB(trained(model), lr=0.1)
    return engine, engine.attach(model, optimizer, 1, 1.0), optimizer


def owned(layout: Any, p: Tensor) -> Tensor:
    """Whether each element is one that this rank steps."""
    mine = torch.zeros(p.shape, dtype=torch.bool)
    layout.split_local(p, mine)[0].fill_(True)
    return mine


def several_buckets() -> contextlib.AbstractContextManager[Any]:
    return mock.patch.multiple(bucket, _NUMEL=2**9, _SHARE=1)


# Where the ranges are.


def test_boxes_make_up_a_range() -> None:
    numbers = random.Random(0)
    for _ in range(2000):
        shape = tuple(numbers.randint(1, 4) for _ in range(numbers.randint(0, 4)))
        full = torch.arange(torch.Size(shape).numel()).view(shape)
        start = numbers.randint(0, full.numel())
        end, found = numbers.randint(start, full.numel()), []
        for offsets, sizes, first in boxes(shape, start, end):
            box = full[tuple(slice(at, at + size) for at, size in zip(offsets, sizes))].reshape(-1).tolist()
            assert box == list(range(first, first + len(box)))
            found += box
        assert found == list(range(start, end))


@pytest.mark.parametrize("world", [1, 2, 3, 64])
def test_ranges_cover_every_parameter_once_and_end_between_rows(world: int) -> None:
    shapes = [(97, 89), (13, 300), (1031,), (7, 5, 3), (2, 1), (1,), (), (0, 2), (64, 48), (300, 13)]
    found: dict[int, list[Range]] = {i: [] for i in range(len(shapes))}
    for rank in range(world):
        params = [nn.Parameter(torch.full(shape, float(i))) for i, shape in enumerate(shapes)]
        for each in bucket.make_buckets(params, world, rank):
            assert len(each.weights) % world == 0
            for p, at in zip(each.params, each.ranges):
                found[int(p.detach().view(-1)[0]) if p.numel() else 7].append(at)
    for i, ranges in found.items():
        row = max(1, torch.Size(shapes[i][1:]).numel())
        held = sorted(at for at in ranges if at.numel)
        assert sum(at.numel for at in held) == torch.Size(shapes[i]).numel()
        assert all(a.start + a.numel == b.start for a, b in itertools.pairwise(held))
        assert all(at.start % row == 0 for at in held)


# Gradients.


def accumulated(passes: str, set_to_none: bool, reduce_dtype: str | None) -> list[tuple[float, bool]]:
    """For each step: how far this rank's elements are from plain DDP's, and whether all others are nan."""
    with several_buckets():
        engine, model, optimizer = built(reduce_dtype=reduce_dtype)
    plain, seen = wrapped(), []
    for step in range(3):
        for each in (model, plain):
            each.zero_grad(set_to_none=set_to_none)
        for i, kind in enumerate(passes):
            arguments = dist.get_rank() + 10 * i + step, 0 if kind in "Uu" else 1
            with engine.sync(model, last=kind.isupper()):
                model(*arguments).backward()
            with contextlib.nullcontext() if kind.isupper() else plain.no_sync():
                plain(*arguments).backward()
        error, others = 0.0, dist.get_world_size() > 1
        for p, q in zip(trained(model), trained(plain), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None:
                mine = owned(optimizer.layout, p)
                error = max(error, distance([p.grad[mine]], [q.grad[mine]]) if mine.any() else 0.0)
                others &= bool(p.grad[~mine].isnan().all())
        seen.append((error, others))
        optimizer.step()
        model.load_state_dict(plain.module.state_dict())
    return seen


@pytest.mark.parametrize(("set_to_none", "dtype", "tolerance"), [(True, None, 1e-14), (False, "fp32", 1e-6)])
def test_gradients_are_those_of_ddp(set_to_none: bool, dtype: str | None, tolerance: float) -> None:
    """In micro-batches, exchanged several times, and where steps leave out parameters."""
    for passes in ("S", "SS", "nS", "SnS", "US", "uS", "SU", "UnS"):
        for seen in run(3, accumulated, passes, set_to_none, dtype):
            assert all(error < tolerance and others for error, others in seen), (passes, seen)


def left_out_by_some() -> list[bool]:
    """Whether there is a gradient, where one rank alone uses a parameter; and a step of it."""
    engine, model, optimizer = built()
    with engine.sync(model, last=True):
        model(1, step=dist.get_rank()).backward()
    optimizer.step()
    return [p.grad is not None for p in trained(model)]


def test_a_parameter_that_one_rank_uses_is_stepped_by_all() -> None:
    results = run(2, left_out_by_some)
    assert results[0] == results[1] and all(results[0])


def alone(last: bool) -> None:
    engine, model, optimizer = built()
    with engine.sync(model, last=last):
        model(dist.get_rank()).backward()
    if last:
        model(dist.get_rank()).backward()  # not inside of a pass of the engine
    optimizer.step()


@pytest.mark.parametrize("last", [True, False])
def test_gradients_of_one_rank_are_refused(last: bool) -> None:
    with pytest.raises(RankError, match="this rank's alone"):
        run(2, alone, last)


def left_out() -> None:
    engine = Zero1("fp32")
    model = Mixed()
    engine.build(model, [], lambda unit, device: None, CPU)
    with engine.sync(model, last=True):
        model(1, step=1).backward()


def test_a_pass_that_leaves_out_parameters_is_refused() -> None:
    with pytest.raises(RankError, match=r"left out 2 parameters.*engine\.find_unused_parameters=true"):
        run(2, left_out)


# Training.


def stepped(late: bool, sam: bool, gloo: bool) -> list[Tensor]:
    """The parameters after each step."""
    with contextlib.ExitStack() as stack:
        for module in (bucketed, bucket_gradients) if not gloo else ():
            stack.enter_context(mock.patch.object(module, "over_gloo", lambda *_: False))
        with several_buckets():
            engine, model, inner = built(overlap_gather=late)
        optimizer, after = distopt.SAM(inner, rho=0.5) if sam else inner, []
        for step in range(3):
            for again in range(1 + sam):
                engine.zero_grad(model, optimizer)
                perturbed = engine.perturbed(model, optimizer) if again else contextlib.nullcontext()
                with perturbed, engine.sync(model, last=True):
                    model(dist.get_rank(), step).backward()
            engine.step(model, optimizer, 1.0)
            after += [p.detach().clone() for p in engine.unwrap(model).parameters()]
        return after


def compared(sam: bool) -> tuple[list[float], list[Tensor]]:
    first, *others = [stepped(late, sam, gloo) for late, gloo in ((False, True), (True, True), (False, False))]
    return [distance(other, first) for other in others], first


@pytest.mark.parametrize(("world", "sam"), [(1, False), (3, False), (2, True)])
def test_ranks_agree_and_all_ways_to_send_are_the_same(world: int, sam: bool) -> None:
    """To the last bit between the ranks; over gloo, by the collectives of other backends, and with late gathers."""
    results = run(world, compared, sam)
    for distances, params in results:
        assert max(distances) < 1e-13
        assert all(torch.equal(p, q) for p, q in zip(params, results[0][1]))


def launched(gloo: bool) -> tuple[int, Counter[str]]:
    """The number of buckets, and what a step calls."""
    calls: Counter[str] = Counter()

    class Counts(Collectives):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[func.overloadpacket.__name__] += 1
            return super().__torch_dispatch__(func, types, args, kwargs)

    with contextlib.ExitStack() as stack:
        for module in (bucketed, bucket_gradients) if not gloo else ():
            stack.enter_context(mock.patch.object(module, "over_gloo", lambda *_: False))
        engine = Zero1("fp32")
        model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), engine)
        optimizer = distopt.AdamW(model.parameters(), lr=0.1)
        engine.attach(model, optimizer, 1, 1.0)
        update(engine, model, optimizer, [batch(0)])
        with Counts():
            update(engine, model, optimizer, [batch(1)])
    return len(optimizer.layout.buckets), calls  # type: ignore[attr-defined]


@pytest.mark.parametrize("gloo", [True, False])
def test_a_step_takes_a_few_calls_for_each_bucket(gloo: bool) -> None:
    """One message to each rank and each way, or one collective; one copy of the gradients; nothing is packed."""
    for buckets, calls in run(2, launched, gloo):
        assert buckets == 4
        if gloo:
            assert calls["send"] == calls["recv_"] == 2 * buckets
        else:
            assert calls["_reduce_scatter_base_"] == calls["_allgather_base_"] == buckets
        assert calls["_foreach_copy_"] == buckets
        assert calls["fill_"] <= 2 * buckets
        assert calls["copy_"] <= 2 * buckets


# Right or refused.


def replaced_by(change: str) -> None:
    engine = Zero1("fp32")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    engine.build(model, [], lambda unit, device: None, CPU)
    forward = model
    match change:
        case "to":
            model.double()
        case "assign":
            model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        case "parametrize":
            parametrize.register_parametrization(model[0], "weight", nn.Tanh())
        case "deepcopy":
            forward = copy.deepcopy(model)
            with torch.no_grad():
                forward(torch.ones(1, 4))
        case "optimizer":
            optimizer = distopt.SGD(model.parameters(), lr=0.1)
            engine.attach(model, optimizer, 1, 1.0)
            copy.deepcopy((model, optimizer))
        case "unknown":
            engine.sync(nn.Linear(1, 1), last=True)
    forward(torch.ones(1, 4, dtype=next(forward.parameters()).dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("to", r"shape \(2,\) has moved in memory.*model\.to\(\)"),
        ("assign", "4 parameters, the first 'weight', were replaced.*without assign=True"),
        ("parametrize", "1 parameters, the first 'weight', were replaced"),
        ("deepcopy", "is a copy of one that engine=zero1 has built"),
        ("optimizer", "bound to buffers of the model"),
        ("unknown", "was not built by engine=zero1"),
    ],
)
def test_what_takes_parameters_out_of_the_buffers_is_refused(change: str, message: str) -> None:
    with pytest.raises(RankError) as error:
        run(1, replaced_by, change)
    assert error.value.kind == "ValueError"
    assert re.search(message, error.value.message), error.value.message


def stays() -> bool:
    """What leaves parameters where they are: `to` the same device, a load in place, and a copy to look at."""
    engine, model, optimizer = built()
    model.to(CPU)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with engine.sync(model, last=True):
        model(0).backward()
    optimizer.step()
    with torch.no_grad():
        return bool(torch.equal(copy.deepcopy(model)(0), model(0)))


def test_other_uses_of_a_model_stay_possible() -> None:
    assert all(run(2, stays))


def state_of() -> dict[str, bool]:
    """Properties of a state buffer."""
    params = [nn.Parameter(torch.arange(30.0).view(5, 6)), nn.Parameter(torch.ones(7))]
    layout = bucketed.bucket_layout(params, mesh((dist.get_world_size(),), ("shard",)))
    master = layout.master(params[0])
    assert isinstance(layout, BucketLayout)
    clone = master.clone()
    clone.zero_()
    return {
        "shape": master.shape == (5, 6),
        "full": torch.equal(master.full_tensor(), params[0].detach()),  # type: ignore[attr-defined]
        "a clone has its own memory": torch.equal(master.full_tensor(), params[0].detach()),  # type: ignore[attr-defined]
        "cleared": bool((clone.full_tensor() == 0).all()),  # type: ignore[attr-defined]
        "dtype": master.double().to_local().dtype == torch.float64,  # type: ignore[attr-defined]
        "copied": torch.equal(copy.deepcopy(master).full_tensor(), params[0].detach()),  # type: ignore[attr-defined]
    }


def test_a_range_shard_is_a_tensor_of_the_full_shape() -> None:
    for found in run(2, state_of):
        assert all(found.values()), found


def proved(change: bool) -> distopt.Fingerprint:
    """A checksum at the start, and the proof after a step, perhaps of a model that one rank has changed."""
    engine, model, optimizer = built()
    optimizer.init_state()
    found = distopt.fingerprint(model, optimizer)
    with engine.sync(model, last=True):
        model(dist.get_rank()).backward()
    distopt.prove(optimizer, model=model, gradients=True)
    engine.step(model, optimizer, 1.0)
    if change and dist.get_rank() == 1:
        with torch.no_grad():
            model.all[0].add_(1e-9)
    distopt.prove(optimizer, model=model)
    return found


def test_the_proof_holds_and_checksums_know_no_ranks() -> None:
    (one,) = run(1, proved, False)
    assert all(found == one for found in run(3, proved, False))
    with pytest.raises(RankError, match=r"all\.0"):
        run(3, proved, True)


# bfloat16 weights.


def given_gradients() -> list[Tensor]:
    """Weights and masters after steps by gradients that are the same on all ranks."""
    numbers = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=numbers).bfloat16()) for s in ((97, 89), (1031,), (7, 5, 3), ())]
    optimizer = distopt.LAMB(params, lr=0.01)
    optimizer.bind(bucketed.bucket_layout(params, mesh((dist.get_world_size(),), ("shard",))))
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=numbers).bfloat16()
        distopt.clip_grad_norm_(optimizer, 1.0)
        optimizer.step()
    masters = [optimizer.state[p]["master"].full_tensor() for p in params]
    assert all(torch.equal(m.bfloat16(), p) for m, p in zip(masters, params))
    return [*(p.detach() for p in params), *masters]


def test_masters_are_the_same_bits_at_every_number_of_ranks() -> None:
    (one,) = run(1, given_gradients)
    for found in run(3, given_gradients):
        assert all(torch.equal(a, b) for a, b in zip(found, one))


def low(start: int, stop: int, source: Path | None, to: Path | None, dtype: str | None = "bf16") -> dict[str, Any]:
    """Steps of a run whose weights are of this dtype: its losses, its bytes, and the full float32 weights."""
    engine = Zero1(param_dtype=dtype)
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"], seed=start), engine)
    optimizer = distopt.AdamW(distopt.param_groups(model), lr=0.01)
    engine.attach(model, optimizer, 2, 1.0)
    if source is not None:
        load_checkpoint(source, model, optimizer)
    before = {n: _wide(optimizer, p) for n, p in model.named_parameters()}
    losses = [mean(update(engine, model, optimizer, list(batch(i).chunk(2)), 1.0).loss) for i in range(start, stop)]
    if to is not None:
        save_checkpoint(to, model, optimizer)
    held = [p.element_size() + p.grad.element_size() for p in model.parameters() if p.grad is not None]
    after = {n: _wide(optimizer, p) for n, p in model.named_parameters()}
    return {"losses": losses, "bytes": set(held), "before": before, "after": after}


def _wide(optimizer: distopt.AdamW, p: Tensor) -> Tensor:
    master = optimizer.state.get(p, {}).get("master")
    return p.detach().clone() if master is None else master.full_tensor().clone()


def test_bfloat16_weights_train_and_are_saved_in_float32(tmp_path: Path) -> None:
    """A run goes on, and one with float32 weights goes on from it, without the loss of a bit."""
    half = run(2, low, 0, 4, None, tmp_path / "half")[0]
    full = run(2, low, 0, 4, None, None, None)[0]
    assert half["bytes"] == {4} and full["bytes"] == {8}
    assert half["losses"] == pytest.approx(full["losses"], rel=0.01)  # of bfloat16's 2^-9 in each operation
    for world, dtype in ((4, "bf16"), (1, None)):
        for found in run(world, low, 4, 6, tmp_path / "half", None, dtype):
            assert all(torch.equal(p, half["after"][name]) for name, p in found["before"].items())


def test_bfloat16_weights_are_not_computed_in_float32() -> None:
    with pytest.raises(ValueError, match=r"engine\.param_dtype=bf16 computes in bfloat16: set engine\.precision=bf16"):
        Zero1("fp32", param_dtype="bf16")
