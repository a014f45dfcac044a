"""The state of an optimizer is what its layout says: loaded, moved, copied, or refused before anything changes."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from distopt import layout
from tests.harness.distributed import run
from tests.harness.sharded import mesh

SHAPES = [(5, 3), (1,), (6, 2)]  # on two ranks even rows, odd rows, and rows that one of them lacks
EMPTY = [(0, 4), (4, 0), (0,)]


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        self.all = nn.ParameterList([torch.randn(shape, generator=numbers).to(dtype) for shape in shapes])

    def forward(self, step: int) -> Tensor:
        return sum((1 + i) * (p - 0.1 * step).square().sum() for i, p in enumerate(self.all))


def make(
    kind: str,
    dtype: torch.dtype = torch.float32,
    cls: Callable[..., Any] = distopt.LAMB,
    shapes: list[tuple[int, ...]] = SHAPES,
) -> tuple[nn.Module, Any]:
    """A model, the same on every rank and for each kind, and its optimizer."""
    model = Net(dtype, shapes)
    ranks = mesh((dist.get_world_size(),), ("shard",)) if dist.is_initialized() else None
    if kind == "fsdp2":
        fully_shard(model, mesh=ranks)
    if kind == "dtensor":  # without FSDP2's own hooks
        model.all = nn.ParameterList([distribute_tensor(p.detach(), ranks, [Shard(0)]) for p in model.all])
    opt = cls(model.parameters(), lr=0.01)
    if kind == "zero1":
        opt.bind(layout.zero1_layout(model, ranks))
    return model, opt


def train(model: nn.Module, opt: Any, steps: int = 3) -> None:
    for step in range(steps):
        opt.zero_grad()
        model(step).backward()
        distopt.clip_grad_norm_(opt, 5.0)
        opt.step()


def full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [full(p) for p in model.parameters()]


def contents(opt: Any) -> list[Any]:
    """All that a state dict holds, in full."""
    held = copy.deepcopy(opt.state_dict())
    state = [(k, name, full(v)) for k, values in held["state"].items() for name, v in values.items()]
    return [held["param_groups"], *state]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """To the last bit but those of float32 that depend on the order of a sum over ranks."""
    return all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(left, right, strict=True))


# A state dict, or a layout, that comes later.


def loaded(dtype: torch.dtype) -> list[Any]:
    """Whether the run is the unbroken one after a state dict of each kind was loaded into each other."""
    wrong: list[Any] = []
    kinds = ("plain", "zero1", "fsdp2")
    for here, there in [(a, b) for a in kinds for b in kinds]:
        model, opt = make(here, dtype)
        train(model, opt)
        other, loading = make(there, dtype)
        with torch.no_grad():
            for p, q in zip(other.parameters(), weights(model)):
                p.copy_(distribute_tensor(q, p.device_mesh, p.placements) if hasattr(p, "placements") else q)
        loading.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(model, opt)
        train(other, loading)
        laid_out = {hasattr(v, "placements") for s in loading.state.values() for k, v in s.items() if k != "step"}
        if not same(weights(model), weights(other)) or laid_out != {there != "plain"}:
            wrong.append((here, there, laid_out))
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_dict_of_any_layout_is_laid_out_as_the_optimizer_steps(dtype: torch.dtype) -> None:
    """A full state that was loaded under ZeRO-1 stayed full, each rank moved its rows, and a state dict had stale ones
    for all others."""
    assert run(2, loaded, dtype) == [[], []]


def bound_later() -> dict[str, Any]:
    found: dict[str, Any] = {}
    expected, of_expected = make("plain")
    train(expected, of_expected)
    train(expected, of_expected)

    model, opt = make("plain")
    train(model, opt)
    opt.bind(layout.zero1_layout(model, mesh((2,), ("shard",))))
    train(model, opt)
    found["bound to zero1 after steps"] = same(weights(model), weights(expected))
    opt.bind(layout.infer_layout(list(model.parameters())))
    train(model, opt)
    train(expected, of_expected)
    found["and back"] = same(weights(model), weights(expected))
    found["in full"] = not any(hasattr(v, "placements") for s in opt.state.values() for v in s.values())

    model, opt = make("plain")
    train(model, opt)
    fully_shard(model, mesh=mesh((2,), ("shard",)))
    opt.param_groups[0]["params"] = list(model.parameters())
    try:
        train(model, opt)
    except ValueError as error:
        found["parameters replaced after steps"] = str(error)

    for kind, shapes in (("zero1", [*SHAPES, *EMPTY, ()]), ("dtensor", [*SHAPES, *EMPTY])):
        for cls in (distopt.LAMB, distopt.LARS, distopt.AdamW):
            results = []
            for each in ("plain", kind):
                model, opt = make(each, cls=cls, shapes=shapes)
                sam = distopt.SAM(opt)
                for step in range(3):
                    for i, p in enumerate(model.parameters()):
                        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
                        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if each == "dtensor" else grad
                    sam.perturb()
                    sam.restore()
                    distopt.clip_grad_norm_(opt, 1.0)
                    opt.step()
                opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                opt.step()
                results.append(weights(model))
            found[f"without elements, {kind}, {cls.__name__}"] = same(*results)
    return found


def copied() -> dict[str, Any]:
    found: dict[str, Any] = {}
    model, opt = make("zero1", torch.bfloat16)
    train(model, opt)
    other, of_other = copy.deepcopy((model, opt))
    found["of the copied model"] = all(p is q for p, q in zip(of_other.param_groups[0]["params"], other.parameters()))
    before = weights(other)
    train(model, opt)
    found["not the model's"] = all(torch.equal(a, b) for a, b in zip(weights(other), before))
    train(other, of_other)
    found["zero1"] = all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))
    found["its layout"] = type(of_other.layout).__name__

    model, opt = make("fsdp2")
    train(model, opt)
    alone, unpickled = copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))
    for each in (alone, unpickled):
        for p, q in zip(opt.param_groups[0]["params"], each.param_groups[0]["params"]):
            q.grad = p.grad.clone()
        each.step()
    opt.step()
    found["fsdp2"] = [
        all(torch.equal(full(p), full(q)) for p, q in zip(model.parameters(), each.param_groups[0]["params"]))
        for each in (alone, unpickled)
    ]
    return found


def test_a_layout_that_is_bound_later_lays_out_the_state_also_without_elements() -> None:
    for found in run(2, bound_later):
        assert "replaced them" in found.pop("parameters replaced after steps")
        assert all(found.values()), found


def test_a_bound_optimizer_is_copied_with_its_layout() -> None:
    """deepcopy raised for process groups, and for DTensors that have a gradient; the copy forgot its layout."""
    for found in run(2, copied):
        assert found.pop("its layout") == "Zero1Layout"
        assert found.pop("fsdp2") == [True, True]
        assert all(found.values()), found


# What a state dict may not bring.


def spoiled() -> list[tuple[Callable[[dict[str, Any]], Any], str]]:
    return [
        (
            lambda d: d["state"][1].update(exp_avg=torch.ones(4)),
            r"exp_avg of parameter 1 of param group 0 .*\(4,\).*\(1,\)",
        ),
        (lambda d: d["state"][0].update(exp_avg_sq=torch.ones(15)), r"exp_avg_sq of parameter 0 .*\(15,\).*\(5, 3\)"),
        (lambda d: d["state"][2].pop("exp_avg"), r"state of parameter 2 of param group 0 lacks exp_avg \(it has"),
        (lambda d: d["state"][2].pop("step"), r"lacks step"),
        (lambda d: d["state"][0].update(exp_avg=[1.0]), r"is a list, not a tensor"),
        (lambda d: d["param_groups"][0]["params"].pop(), r"doesn't match the size of optimizer's group: group 0 has 2"),
        (lambda d: d["param_groups"].append(d["param_groups"][0]), r"different number of parameter groups: 2"),
        (lambda d: d["param_groups"][0].update(lr=math.nan), r"lr must be a finite number"),
        (lambda d: d["param_groups"][0].update(amsgrad=True), r"amsgrad"),
    ]


@pytest.mark.parametrize("at", range(len(spoiled())))
def test_a_load_that_fails_leaves_the_optimizer_as_it_was(at: int) -> None:
    """A state of another shape was taken, and the compiled kernels read and wrote beyond it."""
    spoil, message = spoiled()[at]
    model, opt = make("plain", cls=distopt.AdamW)
    train(model, opt)
    state_dict = copy.deepcopy(opt.state_dict())
    for values in state_dict["state"].values():
        values["exp_avg"].fill_(7.0)
    state_dict["param_groups"][0]["weight_decay"] = 0.3
    spoil(state_dict)
    before = contents(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state_dict)
    after = contents(opt)
    assert after[0] == before[0] and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(after[1:], before[1:])
    )


def test_a_tensor_that_is_put_into_the_state_is_checked_before_a_kernel_reads_it() -> None:
    model, opt = make("plain", cls=distopt.AdamW)
    train(model, opt)
    opt.state[model.all[0]]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 of 3 has shape \(3,\), its parameter \(5, 3\)"):
        opt.step()
    opt.state[model.all[0]]["exp_avg"] = torch.zeros(5, 3, dtype=torch.float64)
    opt.step()
    assert opt.state[model.all[0]]["exp_avg"].dtype == torch.float32


def test_missing_state_begins_with_zeros_and_momentum_may_begin_late() -> None:
    """As torch's: SGD's state has no step, a parameter may have none, and momentum may be switched on in mid-run."""
    model, opt = make("plain", cls=torch.optim.SGD)
    opt.param_groups[0]["momentum"] = 0.9
    train(model, opt)
    state_dict = copy.deepcopy(opt.state_dict())
    del state_dict["state"][1]
    ours = distopt.SGD(model.parameters(), lr=0.01)
    ours.load_state_dict(state_dict)
    assert [len(ours.state.get(p, {})) for p in model.parameters()] == [2, 0, 2]
    train(model, ours)
    opt.load_state_dict(ours.state_dict())

    plain = distopt.SGD(model.parameters(), lr=0.01)
    train(model, plain)
    plain.param_groups[0]["momentum"] = 0.9
    plain.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(model, plain)
    assert all("momentum_buffer" in plain.state[p] for p in model.parameters())


# By name to the end.


def test_named_parameters_are_filled_by_name() -> None:
    """torch fills by position, although both sides have names: of permuted groups each took another's moments."""
    model, _ = make("plain")
    named = list(model.named_parameters())
    opt = distopt.AdamW(named, lr=0.01)
    train(model, opt)
    wrapped = [(f"module.{name}", p) for name, p in reversed(named)]
    other = distopt.AdamW(wrapped, lr=0.5)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert other.param_groups[0]["param_names"] == [name for name, _ in wrapped]
    assert other.param_groups[0]["lr"] == 0.01
    assert all(torch.equal(opt.state[p]["exp_avg"], other.state[p]["exp_avg"]) for _, p in named)

    stranger = distopt.AdamW([("head", named[0][1]), *named[1:]], lr=0.5)
    with pytest.raises(ValueError, match=r"all\.0 is in param group 0 of the state dict only: .* delete param_names"):
        stranger.load_state_dict(copy.deepcopy(opt.state_dict()))


@pytest.mark.parametrize("cls", [distopt.AdamW, torch.optim.AdamW], ids=["distopt", "torch"])
def test_a_checkpoint_fills_reordered_groups_by_name(cls: Any, tmp_path: Any) -> None:
    model, _ = make("plain")
    opt = cls(list(model.parameters()), lr=0.01)
    train(model, opt)
    distopt.save_checkpoint(tmp_path / "saved", model, opt)
    other = cls(list(reversed(list(model.parameters()))), lr=0.5)
    distopt.load_checkpoint(tmp_path / "saved", model, other)
    assert all(torch.equal(opt.state[p]["exp_avg"], other.state[p]["exp_avg"]) for p in model.parameters())


def test_a_checkpoint_of_other_state_is_refused_before_weights_change(tmp_path: Any) -> None:
    model, opt = make("plain", cls=distopt.AdamW)
    train(model, opt)
    del opt.state[model.all[1]]["exp_avg"]
    opt.init_state = lambda: None  # which would make it
    distopt.save_checkpoint(tmp_path / "saved", model, opt)
    other, loading = make("plain", cls=distopt.AdamW)
    before = weights(other)
    with pytest.raises(ValueError, match=r"the state of all\.1 has no exp_avg in the checkpoint"):
        distopt.load_checkpoint(tmp_path / "saved", other, loading)
    assert all(torch.equal(a, b) for a, b in zip(weights(other), before))


# What does not change in mid-run.


@pytest.mark.parametrize("how", ["load", "unpickle", "deepcopy"])
def test_a_state_dict_is_the_same_after_one_was_loaded(how: str) -> None:
    """torch adds `differentiable` to the defaults, which went into the groups: a checkpoint of before lacked it."""
    model, opt = make("plain", cls=distopt.AdamW)
    train(model, opt)
    before = [set(group) for group in opt.state_dict()["param_groups"]]
    if how == "load":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt = pickle.loads(pickle.dumps(opt)) if how == "unpickle" else copy.deepcopy(opt)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.add_param_group({"params": [torch.ones(1, requires_grad=True)]})
    assert [set(group) for group in opt.state_dict()["param_groups"]] == before * 2


def test_steps_are_counted_in_float32_whatever_the_default() -> None:
    """In bfloat16 a count stops at 256."""
    weight = torch.ones(4, requires_grad=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        opt = distopt.AdamW([weight])
        weight.grad = torch.ones(4, dtype=torch.float32)
        for _ in range(300):
            opt.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert opt.state[weight]["step"].dtype == torch.float32
    assert float(opt.state[weight]["step"]) == 300


def test_the_cache_of_norms_is_bounded() -> None:
    """Each set of layers that had gradients left two tensors for ever: mixtures of experts have many."""
    params = [torch.randn(4, requires_grad=True) for _ in range(20)]
    opt = distopt.LAMB(params)
    draws, counts = random.Random(0), []
    for step in range(200):
        for p in params:
            p.grad = torch.ones(4) if draws.random() < 0.5 else None
        distopt.clip_grad_norm_(opt, 1.0)
        opt.step()
        if step in (99, 199):
            opt.zero_grad()
            gc.collect()
            counts.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("refused", ["sparse", "capturable", "shape"])
def test_a_step_that_is_refused_changes_nothing(refused: str) -> None:
    """The first group's steps were counted before the second's gradients were looked at."""
    weight, table = torch.ones(3, requires_grad=True), nn.Embedding(4, 2, sparse=refused == "sparse")
    groups = [{"params": [weight]}, {"params": [table.weight], "capturable": refused == "capturable"}]
    opt = distopt.LAMB(groups)
    weight.grad = torch.ones(3)
    opt.init_state()
    table(torch.tensor([1])).sum().backward()
    if refused == "shape":
        opt.state[table.weight]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"{refused}"):
        opt.step()
    assert float(opt.state[weight]["step"]) == 0.0 and torch.equal(weight.detach(), torch.ones(3))
    for use in (lambda: distopt.clip_grad_norm_(opt), distopt.SAM(opt).perturb) if refused == "sparse" else ():
        with pytest.raises(ValueError, match="sparse gradients have no sharded update"):
            use()


# Weights of 16 bits.


def small_steps(kind: str, steps: int) -> Tensor:
    model, opt = make(kind, torch.bfloat16, distopt.AdamW)
    for group in opt.param_groups:
        group.update(lr=1e-5, weight_decay=0.0)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
    return torch.cat([p.view(-1) for p in weights(model)])


def of_all_kinds() -> list[Tensor]:
    return [small_steps(kind, 400) for kind in ("plain", "zero1", "dtensor")]


def test_bfloat16_weights_train_alike_on_every_layout() -> None:
    """ZeRO-1 kept float32 masters and the others none: there, steps below half a unit in the last place were lost."""
    before = torch.cat([p.view(-1) for p in weights(make("plain", torch.bfloat16)[0])])
    (plain, zero1, dtensor), _ = run(2, of_all_kinds)
    assert torch.equal(plain, zero1) and torch.equal(plain, dtensor)
    exact = (before.float() - 400 * 1e-5).bfloat16()
    assert torch.allclose(plain.float(), exact.float(), rtol=2**-7) and (plain != before).float().mean() > 0.7


def test_a_weight_changed_from_outside_is_its_masters_new_value() -> None:
    """Weights that were loaded after the state was made were overwritten by the masters of before."""
    model, opt = make("plain", torch.bfloat16, distopt.SGD)
    train(model, opt)
    first = model.all[0]
    kept = opt.state[first]["master"].clone()
    with torch.no_grad():
        first[0] = 3.0
    opt.zero_grad()
    first.grad = torch.zeros_like(first)
    opt.step()
    assert torch.equal(first[0].detach(), torch.full((3,), 3.0, dtype=torch.bfloat16))
    assert torch.equal(
        opt.state[first]["master"][1:], kept[1:]
    )  # what bfloat16 does not hold of the others is not lost


def test_state_dicts_of_16_bit_parameters_go_both_ways() -> None:
    model, opt = make("plain", torch.bfloat16, torch.optim.AdamW)
    train(model, opt)
    other, ours = make("plain", torch.bfloat16, distopt.AdamW)
    other.load_state_dict(model.state_dict())
    ours.load_state_dict(copy.deepcopy(opt.state_dict()))
    ours.init_state()
    for p, q in zip(other.parameters(), model.parameters()):
        assert torch.equal(ours.state[p]["master"], q.detach().float())
        assert torch.equal(ours.state[p]["exp_avg"], opt.state[q]["exp_avg"].float())
    train(other, ours)
    opt.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(model, opt)

    wide, again = make("plain", torch.float32, distopt.AdamW)
    again.load_state_dict(
        copy.deepcopy(ours.state_dict())
    )  # its weights are what it steps: a master would stand beside
    train(wide, again)
    assert not any("master" in again.state[p] for p in wide.parameters())


def test_masters_are_in_a_checkpoint_and_are_made_where_it_has_none(tmp_path: Any) -> None:
    model, opt = make("plain", torch.bfloat16, distopt.AdamW)
    train(model, opt)
    distopt.save_checkpoint(tmp_path / "ours", model, opt)
    other, loading = make("plain", torch.bfloat16, distopt.AdamW)
    distopt.load_checkpoint(tmp_path / "ours", other, loading)
    assert all(torch.equal(opt.state[p]["master"], loading.state[q]["master"]) for p, q in zip(model.all, other.all))

    model, opt = make("plain", torch.bfloat16, torch.optim.AdamW)
    train(model, opt)
    distopt.save_checkpoint(tmp_path / "torch", model, opt)
    distopt.load_checkpoint(tmp_path / "torch", other, loading)
    loading.init_state()
    assert all(torch.equal(p.detach().float(), loading.state[q]["master"]) for p, q in zip(model.all, other.all))


def of_the_family(dtype: torch.dtype) -> list[bool]:
    """Whether each member trains alike on every layout, with a full state dict loaded on the way."""
    warnings.simplefilter("ignore")  # of rounding: the perturbations are small
    results = []
    names = ("SAM", "PreconditionedSAM", "MomentumSAM", "FriendlySAM", "LookSAM")
    for member in (getattr(distopt.sam, name) for name in names):
        ends = []
        for kind in ("plain", "zero1", "fsdp2"):
            model, opt = make(kind, dtype, distopt.AdamW)
            sam = member(opt, rho=0.5)

            def closure(model: nn.Module = model, opt: Any = opt) -> Tensor:
                opt.zero_grad()
                loss = model(1)
                loss.backward()
                return loss

            for step in range(4):
                if step == 2:
                    held = opt.state_dict()
                    whole = {k: {n: full(v) for n, v in values.items()} for k, values in held["state"].items()}
                    sam.load_state_dict(held | {"state": whole})
                sam.step(closure)
            ends.append(weights(model))
        results += [bool(all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(ends[0], e))) for e in ends[1:]]
    return results


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sam_perturbs_and_restores_16_bit_weights_with_masters(dtype: torch.dtype) -> None:
    """Directions of float32 state did not fit float16 weights, and overflowed in them."""
    assert run(2, of_the_family, dtype) == [[True] * 10] * 2


def test_a_frozen_parameter_keeps_its_state() -> None:
    """All that had state were frozen after a load: the state was taken for that of replaced parameters."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = distopt.Adagrad([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    again = distopt.Adagrad([param], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    optimizer.zero_grad()
    param.requires_grad_(False)
    again.step()
    assert again.state[param]["step"] == 1.0


def test_a_parameter_that_is_thawed_has_a_count() -> None:
    """A rule without buffers had nothing to see the change by."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = distopt.SGD(params, lr=0.1)
    params[1].requires_grad_(False)
    for _ in range(2):
        params[0].grad = torch.ones(3)
        optimizer.step()
    params[1].requires_grad_(True).grad = torch.ones(3)
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [3.0, 1.0]
