"""What a step keeps of weights and state is theirs: whatever replaces them, and their memory, is seen by the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import distopt
from distopt.layout import infer, infer_layout, layout_of, local_parts
from distopt.optim import kept
from tests.harness.distributed import run
from tests.harness.optimizers import distance, initial, pull
from tests.harness.sharded import backward, full, mesh, shard, whole

SHAPES = ((4, 6), (5,), (2, 3), (0, 3))


def moved(opt: Any, params: list[Tensor]) -> None:
    """The weights get other memory under the same object, as by `module.to`, a swap or a load by assignment."""
    for p in params:
        p.data = p.data.clone()


def rounded(opt: Any, params: list[Tensor]) -> None:
    """As memory of fewer bits, which needs masters from here on; and one parameter back again."""
    for p in params:
        p.data = p.data.bfloat16()
    params[1].data = params[1].data.float()


def turned(opt: Any, params: list[Tensor]) -> None:
    """As memory that is not contiguous, which no kernel takes."""
    for p in params:
        p.data = p.data.clone().t().contiguous().t() if p.ndim == 2 else p.data


def state_moved(opt: Any, params: list[Tensor]) -> None:
    for p in params:
        opt.state[p]["exp_avg"].data = opt.state[p]["exp_avg"].data.clone()


def state_replaced(opt: Any, params: list[Tensor]) -> None:
    opt.state[params[0]]["exp_avg"] = opt.state[params[0]]["exp_avg"].clone()
    opt.state[params[1]] = {name: value.clone() for name, value in opt.state[params[1]].items()}


def loaded(opt: Any, params: list[Tensor]) -> None:
    opt.load_state_dict(opt.state_dict())


def cleared(opt: Any, params: list[Tensor]) -> None:
    opt.state.clear()


def thawed(opt: Any, params: list[Tensor]) -> None:
    params[2].requires_grad_(not params[2].requires_grad)


def other_options(opt: Any, params: list[Tensor]) -> None:
    opt.param_groups[0].update(betas=(0.5, 0.6), maximize=True, trust_ratio=True, lr=0.3)


def in_place(opt: Any, params: list[Tensor]) -> None:
    with torch.no_grad():
        for p in params:
            p.mul_(0.5)
            opt.state[p]["exp_avg_sq"].add_(0.1)


EVENTS = (moved, rounded, turned, state_moved, state_replaced, loaded, cleared, thawed, other_options, in_place)


def trained(event: Callable[..., None], keeps: bool, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Two steps, an event, two steps; a parameter has no gradient in one step before and in one after it."""
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
    opt = distopt.AdamW(params, lr=0.1)
    with monkeypatch.context() as patched:
        if not keeps:
            patched.setattr(kept.KeptShards, "hold", lambda *_: False)
        for step in range(6):
            if step == 3:
                event(opt, params)
            pull(params, step).backward()
            if step % 3 == 1:
                params[0].grad = None
            opt.step()
            opt.zero_grad()
    return [p.detach() for p in params] + [s for p in params for s in opt.state[p].values()]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_whatever_changes_is_seen_by_the_next_step(event: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = trained(event, True, monkeypatch), trained(event, False, monkeypatch)
    assert all(map(torch.equal, found, expected))


def test_a_group_that_is_added_steps_too() -> None:
    first, second = (torch.ones(3, requires_grad=True) for _ in range(2))
    opt = distopt.AdamW([first], lr=0.1)
    for step in range(2):
        first.grad = second.grad = torch.ones(3)
        opt.step()
        if not step:
            opt.add_param_group({"params": [second], "lr": 0.5})
    assert second.tolist() == pytest.approx([0.495] * 3)


def test_what_is_kept_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    original = kept.KeptShards.__init__
    monkeypatch.setattr(kept.KeptShards, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
    opt = distopt.LAMB([{"params": params[:2]}, {"params": params[2:]}])
    for step in range(3):
        pull(params, step).backward()
        opt.step()
    assert len(made) == 2


def on_shards(keeps: bool) -> list[Tensor]:
    """FSDP2, whose local tensors are replaced under the same parameters by a load that assigns."""
    if not keeps:
        kept.KeptShards.hold = lambda *_: False  # type: ignore[method-assign]
    model = shard("fsdp2", whole("fsdp2"))
    opt = distopt.AdamW(list(model.parameters()), lr=0.1)
    for step in range(5):
        if step == 2:
            values = {name: (0.5 * value).clone() for name, value in model.state_dict().items()}
            model.load_state_dict(values, assign=True)
        if step == 3:
            model._apply(lambda t: t.clone())
        opt.zero_grad()
        backward(model, "fsdp2", step)
        opt.step()
    return full(model)


def test_local_tensors_that_are_replaced_are_seen() -> None:
    original = kept.KeptShards.hold
    (found, _), (expected, _) = run(2, on_shards, True), run(2, without_keeping, on_shards)
    assert distance(found, expected) == 0.0
    assert kept.KeptShards.hold is original


def without_keeping(function: Callable[[bool], list[Tensor]]) -> list[Tensor]:
    original = kept.KeptShards.hold
    try:
        return function(False)
    finally:
        kept.KeptShards.hold = original  # type: ignore[method-assign]


def count_inferences() -> list[int]:
    """How often the layout of torch's optimizer is inferred: once, and again for other parameters."""
    over, calls, counts = mesh((dist.get_world_size(),), ("shard",)), [0], []
    params = [nn.Parameter(DTensor.from_local(torch.ones(2, 3), over, [Shard(0)], run_check=False)) for _ in range(3)]
    opt = torch.optim.SGD(params[:2], lr=0.1)
    original = infer.infer_layout

    def counted(given: Any) -> Any:
        calls[0] += 1
        return original(given)

    infer.infer_layout = counted
    try:
        for step in range(4):
            for p in params:
                p.grad = torch.ones_like(p)
            if step == 2:
                opt.add_param_group({"params": params[2:]})
            distopt.clip_grad_norm_(distopt.SAM(opt), 1.0)
            assert layout_of(opt).params == tuple(p for group in opt.param_groups for p in group["params"])
            counts.append(calls[0])
    finally:
        infer.infer_layout = original
    return counts


def test_the_layout_of_an_optimizer_of_torch_is_inferred_once() -> None:
    assert run(2, count_inferences) == [[1, 1, 2, 2]] * 2


def private_name() -> bool:
    over = mesh((dist.get_world_size(),), ("shard",))
    param = nn.Parameter(DTensor.from_local(torch.ones(2, 3), over, [Shard(0)], run_check=False))
    (part,) = local_parts([param])
    assert param._spec.placements is param.placements  # type: ignore[attr-defined]
    return type(part) is Tensor and part.data_ptr() == param.to_local().data_ptr() and part.shape == (2, 3)


def other_placements() -> str:
    """A gradient of other placements, after two steps in which it had those of its parameter."""
    over = mesh((dist.get_world_size(),), ("shard",))
    param = nn.Parameter(DTensor.from_local(torch.ones(2, 3), over, [Shard(0)], run_check=False))
    opt = distopt.AdamW([param], lr=0.1)
    for step in range(3):
        param.grad = DTensor.from_local(torch.ones(2, 3), over, [Shard(0)], run_check=False)
        if step == 2:
            param.grad = param.grad.redistribute(placements=[Replicate()])
            try:
                opt.step()
            except ValueError as error:
                return str(error)
        opt.step()
    return ""


def test_a_gradient_whose_placements_change_is_refused() -> None:
    assert all("redistribute it before the optimizer sees it" in said for said in run(2, other_placements))


def test_the_private_names_of_a_dtensor_are_those_of_torch_2_13() -> None:
    assert run(2, private_name) == [True, True]


def test_a_layout_that_is_kept_keeps_no_optimizer() -> None:
    import gc
    import weakref

    opt = torch.optim.SGD([torch.ones(2, requires_grad=True)], lr=0.1)
    assert layout_of(opt) is layout_of(opt)
    assert infer_layout(opt.param_groups[0]["params"]) is not layout_of(opt)
    reference = weakref.ref(opt)
    del opt
    gc.collect()
    assert reference() is None
