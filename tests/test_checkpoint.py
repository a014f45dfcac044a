"""Checkpoints: a resumed run is the unbroken one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from distopt.checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint, save_checkpoint
from distopt.optim import schedules as schedules
from tests.harness.checkpoints import (
    HALF,
    OPTIMIZERS,
    STEPS,
    Net,
    assert_equal,
    everything,
    full,
    gradients,
    start,
    train,
    trained,
)
from tests.harness.distributed import run


def resume_bit_for_bit(folder: Path, engine: str, name: str) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    ends = []
    for save in (False, True):
        parts = start(engine, name, dropout=0.5, dtype=torch.float32)
        torch.manual_seed(10 + rank)
        train(*parts, 0, HALF)
        if save:
            before, grads = everything(*parts[:2]), gradients(parts[0])
            path = save_checkpoint(checkpoint_path(folder, HALF), *parts, extra={"step": HALF})
            assert_equal(everything(*parts[:2]), before)
            for was, now in zip(grads, gradients(parts[0])):
                assert np.array_equal(was, now)
        train(*parts, HALF, STEPS)
        ends.append(everything(*parts[:2]))
    assert_equal(ends[1], ends[0])

    parts = start(engine, name, dropout=0.5, dtype=torch.float32, seed=1)
    for p in parts[0].parameters():  # where gradients are, torch's own loading into a new optimizer does nothing
        p.grad = torch.ones_like(p)
    grads = gradients(parts[0])
    assert load_checkpoint(path, *parts) == {"step": HALF}
    for was, now in zip(grads, gradients(parts[0])):
        assert np.array_equal(was, now)
    train(*parts, HALF, STEPS)
    assert_equal(everything(*parts[:2]), ends[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit_without_process_group(tmp_path: Path, name: str) -> None:
    assert not dist.is_initialized()
    resume_bit_for_bit(tmp_path, "none", name)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path: Path, engine: str, name: str) -> None:
    run(2, resume_bit_for_bit, tmp_path, engine, name)


def first_half(path: Path, engine: str, name: str) -> None:
    parts = start(engine, name)
    train(*parts, 0, HALF)
    save_checkpoint(path, *parts)


def second_half(path: Path, engine: str, name: str) -> dict[str, np.ndarray]:
    parts = start(engine, name, seed=1)
    here = full(torch.get_rng_state())
    load_checkpoint(path, *parts)
    assert np.array_equal(full(torch.get_rng_state()), here)  # of other processes, so they are left alone
    train(*parts, HALF, STEPS)
    return everything(*parts[:2])


@pytest.mark.parametrize("name", ["lamb", "torch adamw"])
@pytest.mark.parametrize(
    ("engine", "world", "other_engine", "other_world"),
    [
        ("fsdp2", 2, "fsdp2", 4),
        ("fsdp2", 4, "none", 1),
        ("ddp", 2, "fsdp2", 4),
        ("hsdp", 4, "ddp", 2),
        ("none", 1, "fsdp2", 2),
    ],
)
def test_another_number_of_processes_or_engine_resumes_as_the_unbroken_run(
    tmp_path: Path, engine: str, world: int, other_engine: str, other_world: int, name: str
) -> None:
    """float64, so that only the order of sums differs."""

    def on(world: int, function: Callable, *args: Any) -> Any:
        return function(*args) if world == 1 else run(world, function, *args)[0]

    parts = start("none", name)
    train(*parts, 0, STEPS)
    expected = everything(*parts[:2])

    path = checkpoint_path(tmp_path, HALF)
    on(world, first_half, path, engine, name)
    got = on(other_world, second_half, path, other_engine, name)
    del expected["random"], got["random"]
    assert_equal(got, expected, tolerance=1e-12)


def after_evaluation(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    fully_shard(model, reshard_after_forward=False, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = distopt.LAMB(model.parameters(), lr=0.1)
    schedule = schedules.warmup_constant(optimizer, warmup_steps=1)

    def evaluate() -> Tensor:
        with torch.no_grad():
            loss = model(torch.ones(2, 5, dtype=torch.float64))
        assert not hasattr(model[0].weight, "placements")
        return loss

    train(model, optimizer, schedule, 0, HALF)
    expected = evaluate()
    save_checkpoint(path, model, optimizer, schedule)
    assert torch.equal(evaluate(), expected)
    train(model, optimizer, schedule, HALF, STEPS)
    assert not torch.equal(evaluate(), expected)
    load_checkpoint(path, model, optimizer, schedule)
    assert torch.equal(evaluate(), expected)


def test_fsdp2_after_an_evaluation_that_left_full_parameters_in_the_model(tmp_path: Path) -> None:
    """Without a backward pass reshard_after_forward=False leaves the model with parameters the optimizer has not."""
    run(2, after_evaluation, tmp_path / "a")


def save_with_files(path: Path) -> None:
    parts = start("fsdp2", "lamb")
    save_checkpoint(path, *parts, files={"config.json": b"{}" if dist.get_rank() == 0 else b"of another rank"})
    load_checkpoint(path, *parts)


def test_files_are_kept_and_a_checkpoint_is_not_complete_without_them(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    run(2, save_with_files, path)
    (file,) = path.glob("*/config.json")
    assert file.read_bytes() == b"{}"
    file.unlink()
    assert latest_checkpoint(tmp_path) == (None, ["step_00000001: config.json is missing"])


def test_names_do_not_depend_on_the_engine(tmp_path: Path) -> None:
    manifests = []
    for engine in ("ddp", "fsdp2"):
        run(2, first_half, tmp_path / engine, engine, "lamb")
        manifests.append(json.loads((tmp_path / engine / "manifest.json").read_text()))
    assert manifests[0]["parameters"] == manifests[1]["parameters"]
    assert manifests[0]["state"] == manifests[1]["state"]
    assert manifests[0]["parameters"]["first.weight"] == [[7, 5], "float64"]
    assert set(manifests[0]["state"]["idle"]) == {"exp_avg", "exp_avg_sq", "step"}
    assert (manifests[0]["optimizer"], manifests[0]["world_size"], manifests[0]["format"]) == ("LAMB", 2, 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_before_the_first_step_nothing_is_stepped_and_a_trained_optimizer_is_reset(tmp_path: Path, name: str) -> None:
    """torch's get_optimizer_state_dict takes a step with an optimizer whose state is empty."""
    model, optimizer, schedule = trained(name, steps=0)
    steps = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    path = save_checkpoint(tmp_path / "a", model, optimizer, schedule)
    assert steps == []
    assert all(not values.get("step", 0) for values in optimizer.state.values())
    if name.startswith("torch"):
        assert not optimizer.state
    train(model, optimizer, schedule, 0, HALF)
    load_checkpoint(path, model, optimizer, schedule)
    train(model, optimizer, schedule, 0, HALF)
    assert_equal(everything(model, optimizer), everything(*trained(name)[:2]))


def test_a_checkpoint_does_not_tell_whether_sam_was_around_the_optimizer(tmp_path: Path) -> None:
    model, optimizer, schedule = trained("lamb")
    for i, (saved, loaded) in enumerate([(distopt.SAM, lambda inner: inner), (lambda inner: inner, distopt.SAM)]):
        path = save_checkpoint(tmp_path / str(i), model, saved(optimizer), schedule)
        other, inner, other_schedule = trained("lamb", steps=0, seed=1)
        load_checkpoint(path, other, loaded(inner), other_schedule)
        assert_equal(everything(other, inner), everything(model, optimizer))


class ShardedState(distopt.LAMB):
    """State by rows, as DTensors of the full parameter's shape; the parameters stay full on every rank (ZeRO-1)."""

    def init_slot(self, layout: Any, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        return distribute_tensor(torch.zeros_like(param), init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)])


def sharded_state(path: Path, save: bool) -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    model = Net()
    optimizer = ShardedState(model.parameters(), lr=0.1)
    optimizer.init_state()
    for i, state in enumerate(optimizer.state.values()):
        for value in (state["exp_avg"], state["exp_avg_sq"]):
            rows = torch.arange(value.numel(), dtype=torch.float32).reshape(value.shape) + i
            value.copy_(distribute_tensor(rows if save else -rows, value.device_mesh, value.placements))
        state["step"] = torch.tensor(float(save) + i)
    (save_checkpoint if save else load_checkpoint)(path, model, optimizer)
    assert all(state["exp_avg"].placements == (Shard(0),) for state in optimizer.state.values())
    return {f"{i}:{name}": full(t) for i, state in enumerate(optimizer.state.values()) for name, t in state.items()}


def test_state_that_is_sharded_where_its_parameters_are_not(tmp_path: Path) -> None:
    (expected, _) = run(2, sharded_state, tmp_path / "a", True)
    for world in (2, 4):
        for got in run(world, sharded_state, tmp_path / "a", False):
            assert_equal(got, expected)


class Counting(nn.Linear):
    """A module with state that is no tensor."""

    count = 0

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int) -> None:
        self.count = state


def test_a_model_s_extra_state_comes_back(tmp_path: Path) -> None:
    models = [Counting(3, 2), Counting(3, 2)]
    models[0].count = 5
    optimizers = [distopt.LAMB(model.parameters(), lr=0.1) for model in models]
    load_checkpoint(save_checkpoint(tmp_path / "a", models[0], optimizers[0]), models[1], optimizers[1])
    assert models[1].count == 5 and torch.equal(models[1].weight, models[0].weight)


def test_the_state_of_torch_s_adamw_continues_in_ours(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a", *trained("torch adamw"))
    parts = trained("adamw", steps=0, seed=1)
    load_checkpoint(path, *parts)
    train(*parts, HALF, STEPS)
    expected, got = everything(*trained("torch adamw", STEPS)[:2]), everything(*parts[:2])
    assert_equal({name: got[name] for name in expected}, expected, tolerance=1e-12)


def test_hyper_parameters_come_back_and_can_be_set_after_loading(tmp_path: Path) -> None:
    model, optimizer, schedule = trained()
    path = save_checkpoint(tmp_path / "a", model, optimizer, schedule)
    other, new, new_schedule = trained(steps=0, seed=1)
    assert new.param_groups[0]["lr"] != optimizer.param_groups[0]["lr"]
    load_checkpoint(path, other, new, new_schedule)
    assert [group["lr"] for group in new.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert (new_schedule.last_epoch, new_schedule.base_lrs) == (schedule.last_epoch, schedule.base_lrs)


def grouped(cls: type[torch.optim.Optimizer], *parts: list[Tensor]) -> torch.optim.Optimizer:
    return cls([{"params": part, "weight_decay": 0.1 * i} for i, part in enumerate(parts)], lr=0.1)


def test_param_groups_that_are_kept_may_divide_the_parameters_otherwise(tmp_path: Path) -> None:
    """Apart, together and in another order: the state of each parameter is its own, and the options stay."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2), nn.Linear(2, 4)
    both = nn.Sequential(*model)
    first, second, third, fourth = params = list(both.parameters())
    saved = grouped(distopt.AdamW, [first, second], [third, fourth])
    both(torch.ones(3)).sum().backward()
    saved.step()
    distopt.save_checkpoint(tmp_path / "state", both, saved)
    for parts in ([[first], [fourth, second], [third]], [[third, first, fourth, second]]):
        loaded = grouped(distopt.AdamW, *parts)
        loaded.param_groups[0]["lr"] = 0.5
        distopt.load_checkpoint(tmp_path / "state", both, loaded, keep_groups=True)
        assert [group["lr"] for group in loaded.param_groups] == [0.5, *[0.1] * (len(parts) - 1)]
        assert [group["weight_decay"] for group in loaded.param_groups] == [0.1 * i for i in range(len(parts))]
        assert [group["params"] for group in loaded.param_groups] == parts
        for p in params:
            assert torch.equal(loaded.state[p]["exp_avg"], saved.state[p]["exp_avg"])
        with pytest.raises(ValueError, match="param group"):
            distopt.load_checkpoint(tmp_path / "state", both, grouped(distopt.AdamW, *parts))


def test_groups_with_other_counts_are_not_joined(tmp_path: Path) -> None:
    both = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    parts = [list(module.parameters()) for module in both]
    saved = grouped(distopt.AdamW, *parts)
    saved.param_groups[1]["sam_steps"] = 3
    distopt.save_checkpoint(tmp_path / "state", both, saved)
    with pytest.raises(ValueError, match=r"param group 0 joins groups of the checkpoint that differ.*leave them apart"):
        distopt.load_checkpoint(tmp_path / "state", both, grouped(distopt.AdamW, parts[0] + parts[1]), keep_groups=True)


def test_the_state_of_a_parameter_that_is_frozen_now_is_kept(tmp_path: Path) -> None:
    model, optimizer, schedule = trained()
    path = save_checkpoint(tmp_path / "a", model, optimizer, schedule)
    other, new, new_schedule = trained(steps=0, seed=1)
    other.first.requires_grad_(False)
    load_checkpoint(path, other, new, new_schedule)
    assert_equal(everything(other, new), everything(model, optimizer))
