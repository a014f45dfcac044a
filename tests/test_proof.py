"""The proof: what is right passes, what is wrong is one sentence on every rank, and nothing hangs."""

from __future__ import annotations

import datetime
import re
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.proof import meeting, watch
from tests.harness.distributed import run
from tests.harness.proof_cases import prove_each
from tests.harness.proof_loops import loops
from tests.harness.proof_setups import CASES, back, data, lamb, net, ones_for, with_deepspeed
from tests.harness.proof_wrong import Wrapper


@pytest.mark.parametrize("world", [2, 4])
def test_set_ups(world: int) -> None:
    """Each case says the same on every rank: nothing if it is right, else what the case expects."""
    cases = {name: case for name, case in CASES.items() if world in case.worlds}
    answers = run(world, prove_each, list(cases))
    apart = {name: [said[name] for said in answers] for name in cases if len({said[name] for said in answers}) > 1}
    assert apart == {}
    said = answers[0]
    alarms = {name: said[name] for name, case in cases.items() if case.says is None and said[name]}
    assert alarms == {}
    unseen = {name: said[name] for name, case in cases.items() if case.says and not re.search(case.says, said[name])}
    assert unseen == {}


@pytest.mark.parametrize(
    ("world", "steps"), [(2, 3), *(pytest.param(world, 25, marks=pytest.mark.matrix) for world in (2, 3, 4))]
)
def test_loops_that_are_right_raise_no_alarm(world: int, steps: int) -> None:
    """With a proof of weights, gradients and state at every step; so has the matrix."""
    assert run(world, loops, steps) == [{}] * world


def _messages(kind: str) -> int:
    optimizer, model = CASES[kind].make()
    distopt.prove(optimizer, model)
    with CommDebugMode() as mode:
        distopt.prove(optimizer, model, state=True)
    return mode.get_total_counts()


@pytest.mark.parametrize(("kind", "count"), [("ddp", 2), ("fsdp2", 3), ("hsdp", 3), ("tensor_parallel_and_fsdp2", 6)])
def test_few_messages(kind: str, count: int) -> None:
    """Two over all ranks, and one for each axis that shards; with two axes one more for the copies along each."""
    assert run(4, _messages, kind) == [count] * 4


# When it proves.


def _steps_of(kind: str) -> Any:
    """What a set-up that is wrong from the first step on says when it steps, and whether its weights moved."""
    model = net(seed=dist.get_rank())
    optimizer: Any = lamb(model.parameters())
    if kind == "sam":
        optimizer = distopt.SAM(optimizer, rho=0.1)
    if kind == "torch":
        optimizer = torch.optim.AdamW(model.parameters())
        distopt.prove_every(optimizer, model, steps=1)
    if kind == "never":
        distopt.prove_every(optimizer, steps=0)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        if kind in ("closure", "sam"):
            optimizer.step(lambda: ones_for(model.parameters()) or 1.0)
        else:
            ones_for(model.parameters())
            optimizer.step()
        said = ""
    except ValueError as error:
        said = str(error)
    moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before))
    return said, moved


def _steps() -> dict[str, Any]:
    return {kind: _steps_of(kind) for kind in ("plain", "closure", "sam", "torch", "never")}


def test_the_first_step_proves_unless_told_otherwise() -> None:
    first, second = run(2, _steps)
    assert first == second
    assert first.pop("never") == ("", True)
    assert first.pop("torch")[0].startswith("0.weight ([16, 8], float32): ranks differ in the weights")
    for said, moved in first.values():
        assert said.startswith("layer 0 ([16, 8], float32): ranks differ in the weights")
        assert not moved


def _proofs(steps: int | None, taken: int) -> list[int]:
    """At which steps there is a proof; the first of them by the default if `steps` is left out."""
    optimizer, model = CASES["fsdp2"].make()
    proofs: list[int] = []
    if steps != -1:
        distopt.prove_every(optimizer, model, steps)
    with mock.patch("distopt.proof.watch.prove", lambda *args, **kwargs: proofs.append(step)):
        for step in range(taken):  # noqa: B007  (the lambda's)
            optimizer.step()
    return proofs


@pytest.mark.parametrize(("steps", "at"), [(-1, [0]), (None, [0]), (0, []), (1, [0, 1, 2, 3]), (3, [0, 3])])
def test_how_often(steps: int | None, at: list[int]) -> None:
    assert run(2, _proofs, steps, 4) == [at, at]


@pytest.mark.parametrize("steps", [-1, True, 2.5, "10"])
def test_steps_out_of_bounds(steps: Any) -> None:
    with pytest.raises(ValueError, match="steps must be an integer >= 0 or null, got"):
        distopt.prove_every(lamb(net().parameters()), steps=steps)


def _deepspeed_proofs() -> list[int]:
    """At which calls of `step` there is a proof: DeepSpeed calls it for each param group."""
    model = net()
    groups = distopt.param_groups(model)
    optimizer, engine = with_deepspeed(1, model, groups=groups)
    distopt.prove_every(optimizer, model, steps=2)
    calls: list[int] = []
    proofs: list[int] = []
    asked = watch.prove

    def proved(*args: Any, **kwargs: Any) -> Any:
        proofs.append(len(calls))
        return asked(*args, **kwargs)

    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings(), mock.patch("distopt.proof.watch.prove", proved):
        warnings.simplefilter("ignore")
        for step in range(3):
            engine.backward(engine(data(step)).square().mean())
            engine.step()
    engine.destroy()
    return [len(groups), len(calls), *proofs]


def test_deepspeed_calls_step_for_each_group() -> None:
    assert run(2, _deepspeed_proofs) == [[2, 6, 1, 5]] * 2


def _alone() -> str:
    """Rank 0 proves, and rank 1 does not."""
    from torch.distributed.distributed_c10d import _get_default_store

    optimizer, model = CASES["ddp"].make()
    distopt.prove(optimizer, model)
    store, ranks = _get_default_store(), (0, 1)
    said = ""
    if dist.get_rank() == 0:
        timeout = store.timeout
        store.set_timeout(datetime.timedelta(seconds=1))
        try:
            distopt.prove(optimizer, model)
        except ValueError as error:
            said = str(error)
        finally:
            store.set_timeout(timeout)
    else:
        meeting._proofs[ranks] += 1  # as many as rank 0, for the next test
    dist.barrier()  # which would have met rank 0's message
    distopt.prove(optimizer, model)
    return said


def test_a_rank_that_proves_alone_is_told_so() -> None:
    first, second = run(2, _alone)
    assert re.match(r"rank 0 proves step 1 of LAMB, and ranks \[1\] do not, within 1 s: all have to", first)
    assert second == ""


def _apart() -> list[str]:
    """Two models in one world, each of two ranks."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = halves[dist.get_rank() // 2]
    said = []
    for group in (None, half):
        model = DDP(net(seed=dist.get_rank() // 2), process_group=half)
        optimizer = lamb(model.parameters())
        distopt.prove_every(optimizer, model, group=group)
        back(model)
        try:
            optimizer.step()
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_models_that_train_apart_say_so() -> None:
    first, *others = run(4, _apart)
    assert others == [first] * 3
    assert "tell distopt.prove_every which train together (group=)" in first[0]
    assert first[1] == ""


def _half() -> str:
    model = DDP(net())
    optimizer = lamb(model.module[0].parameters())
    back(model)
    with pytest.warns(UserWarning) as caught:
        assert distopt.prove(optimizer, model) == []
    return str(caught[0].message)


def test_an_optimizer_of_half_the_model_warns() -> None:
    for said in run(2, _half):
        assert said.startswith("4 trainable parameters of the model are not in the optimizer, the first is 2.weight:")


def _unused() -> list[str]:
    return distopt.prove(*CASES["unused_parameter"].make())


def test_parameters_without_a_gradient_are_returned() -> None:
    assert run(2, _unused) == [["unused.weight", "unused.bias"]] * 2


@pytest.mark.parametrize("name", ["wrapper", "meta", "freed", "tensor_model_parallel", "_is_flat_param"])
def test_what_one_process_sees(name: str) -> None:
    """Without others to ask, the local checks remain."""
    param: Any = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.SGD([param])
    if name == "wrapper":
        optimizer.param_groups[0]["params"] = [Wrapper(torch.ones(3, 3))]
    elif name == "meta":
        optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(3, 3, device="meta"))]
    elif name == "freed":
        param.untyped_storage().resize_(0)
    else:
        setattr(param, name, True)
    says = {
        "wrapper": "is a Wrapper",
        "meta": "on the meta device",
        "freed": "has no memory any more",
        "_is_flat_param": "FSDP1",
    }
    with pytest.raises(ValueError, match=says.get(name, name)):
        distopt.prove(optimizer)


# The state.


def _wrong_state(kind: str) -> str:
    optimizer, model = CASES["hsdp" if kind == "hsdp" else "zero1"].make()
    optimizer.init_state()  # type: ignore[attr-defined]
    weight = next(iter(optimizer.layout.segments))  # type: ignore[attr-defined]
    assert distopt.prove(optimizer, model, state=True) == []
    buffers = optimizer.state[weight]
    if kind == "hsdp" and dist.get_rank() == 0:
        buffers["exp_avg"].to_local().add_(1.0)
    if kind == "plain" and dist.get_rank() == 0:
        buffers["exp_avg"] = torch.zeros(weight.shape)
    if kind == "dtype" and dist.get_rank() == 1:
        buffers["exp_avg"] = buffers["exp_avg"].double()
    try:
        distopt.prove(optimizer, model, state=True)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("kind", "world", "says"),
    [
        ("hsdp", 4, r"0.weight .*: ranks differ in the state's exp_avg: .*load the same state"),
        ("plain", 2, r"rank 0: the state's exp_avg of a parameter of shape \(16, 8\) has 128 elements .* steps 64"),
        ("dtype", 2, "ranks have other state: .*float32.* on rank 0, .*float64.* on rank 1"),
    ],
)
def test_state_on_request(kind: str, world: int, says: str) -> None:
    heard = set(run(world, _wrong_state, kind))
    assert len(heard) == 1
    assert re.match(says, heard.pop())
