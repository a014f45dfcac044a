"""Checkpoints: a resumed run is the unbroken one, no checkpoint is lost, whatever is killed or full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
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
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
from distopt.optim import schedules as schedules
from tests.harness.distributed import run

HALF, STEPS, ROWS = 3, 6, 8
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": distopt.AdamW,
    "lamb": distopt.LAMB,
    "torch adamw": torch.optim.AdamW,
    "torch sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, dampening=0.3),
}


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and, on four ranks, empty; a parameter that never has a gradient."""

    def __init__(self, dropout: float = 0.0, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 3)
        self.idle = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.norm(self.dropout(torch.tanh(self.first(x)))))


def start(engine: str, name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    """A model on an engine, its optimizer and schedule, before the first step."""
    torch.manual_seed(seed)
    model: nn.Module = Net(dropout).to(dtype)
    if engine == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif engine in ("fsdp2", "hsdp"):
        world = dist.get_world_size()
        shape, axes = ((2, world // 2), ("replicate", "shard")) if engine == "hsdp" else ((world,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups = [{"params": [p for p in model.parameters() if p.ndim == dims]} for dims in (2, 1)]
    optimizer = OPTIMIZERS[name](groups, lr=0.02 * (1 + seed))
    return model, optimizer, schedules.warmup_cosine(optimizer, warmup_steps=2, total_steps=STEPS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, first: int, last: int) -> None:
    """Steps on batches that depend on the step alone; every rank takes its rows."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(ROWS, n, generator=generator).to(dtype)[rank::world] for n in (5, 3))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()


def full(value: Any) -> np.ndarray:
    value = value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
    return value.detach().clone().numpy()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """All that a step reads, whole, by name; and where torch's random numbers are."""
    found = {"random": full(torch.get_rng_state())}
    for name, value in model.state_dict().items():
        found[name.removeprefix("module.")] = full(value)
    for name, p in model.named_parameters():
        for buffer, value in optimizer.state.get(p, {}).items():
            found[f"{name.removeprefix('module.')}:{buffer}"] = full(value)
    for i, group in enumerate(optimizer.param_groups):
        found[f"lr {i}"], found[f"initial_lr {i}"] = full(group["lr"]), full(group["initial_lr"])
    return found


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def gradients(model: nn.Module) -> list[np.ndarray | None]:
    return [None if p.grad is None else full(p.grad) for p in model.parameters()]


# A resumed run is the unbroken one.


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
def test_another_number_of_processes_or_engine_goes_on_as_the_unbroken_run(
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


def test_fsdp2_after_an_evaluation_that_left_whole_parameters_in_the_model(tmp_path: Path) -> None:
    """Without a backward pass reshard_after_forward=False leaves the model with parameters the optimizer has not."""
    run(2, after_evaluation, tmp_path / "a")


def save_with_files(path: Path) -> None:
    parts = start("fsdp2", "lamb")
    save_checkpoint(path, *parts, files={"config.json": b"{}" if dist.get_rank() == 0 else b"of another rank"})
    load_checkpoint(path, *parts)


def test_files_are_kept_and_a_checkpoint_is_not_complete_without_them(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    run(2, save_with_files, path)
    assert (path / "config.json").read_bytes() == b"{}"
    (path / "config.json").unlink()
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
    assert (manifests[0]["optimizer"], manifests[0]["world_size"], manifests[0]["format"]) == ("LAMB", 2, 1)


def trained(name: str = "lamb", steps: int = HALF, **options: Any) -> tuple:
    parts = start("none", name, **options)
    train(*parts, 0, steps)
    return parts


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
    """State by rows, as DTensors of the whole parameter's shape; the parameters stay whole on every rank (ZeRO-1)."""

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


def test_the_state_of_torch_s_adamw_goes_on_in_ours(tmp_path: Path) -> None:
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


def test_the_state_of_a_parameter_that_is_frozen_now_is_kept(tmp_path: Path) -> None:
    model, optimizer, schedule = trained()
    path = save_checkpoint(tmp_path / "a", model, optimizer, schedule)
    other, new, new_schedule = trained(steps=0, seed=1)
    other.first.requires_grad_(False)
    load_checkpoint(path, other, new, new_schedule)
    assert_equal(everything(other, new), everything(model, optimizer))


# What does not fit is refused, and nothing is changed.


def test_of_another_model(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a", *trained())

    def refused(change: Callable[[nn.Module], None], message: str) -> None:
        model = Net().double()
        change(model)
        before = [full(p) for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model, distopt.LAMB(model.parameters(), lr=0.1))
        assert all(np.array_equal(full(p), was) for p, was in zip(model.parameters(), before))

    def widen(model: nn.Module) -> None:
        model.first = nn.Linear(5, 9).double()

    refused(widen, r"first.weight is \[7, 5\] in the checkpoint, \[9, 5\] in the model")
    refused(lambda model: model.float(), "idle is float64 in the checkpoint, float32 in the model")
    refused(lambda model: delattr(model, "norm"), "norm.weight is in the checkpoint, not in the model")
    refused(lambda model: setattr(model, "more", nn.Linear(1, 1)), "more.weight is in the model, not in the checkpoint")


def test_of_another_optimizer_or_schedule(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a", *trained())
    momentum = save_checkpoint(tmp_path / "b", (model := Net()), distopt.SGD(model.parameters(), lr=0.1, momentum=0.9))

    def refused(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model, optimizer, **options)

    double = Net().double()
    weights, others = ([p for p in double.parameters() if p.ndim == dims] for dims in (2, 1))
    refused(
        path,
        double,
        distopt.SGD(double.parameters(), lr=0.1),
        r"is of LAMB \(state: exp_avg, exp_avg_sq, step\), this run has SGD \(state: step\)",
    )
    refused(
        momentum,
        model,
        distopt.SGD(model.parameters(), lr=0.1),
        r"is of SGD \(state: momentum_buffer, step\), this run has SGD \(state: step\)",
    )
    refused(path, double, distopt.LAMB(double.parameters(), lr=0.1), "has 2 param groups, the optimizer 1")
    swapped = distopt.LAMB([{"params": weights[:-1]}, {"params": [*others, weights[-1]]}], lr=0.1)
    refused(path, double, swapped, "last.weight is in param group 0 of the checkpoint only")
    fits = distopt.LAMB([{"params": weights}, {"params": others}], lr=0.1)
    constant = torch.optim.lr_scheduler.ConstantLR(fits)
    refused(path, double, fits, "has WarmupLR, this run has ConstantLR", schedule=constant)
    foreign = distopt.LAMB(Net().parameters(), lr=0.1)
    refused(path, double, foreign, r"parameters of the optimizer are not the model's, the first of shape \[2, 3\]")


@pytest.mark.parametrize("extra", [{"path": Path("x")}, {"pair": (1, 2)}, {1: "one"}, {"loss": float("nan")}])
def test_an_extra_that_json_would_change_is_refused(tmp_path: Path, extra: dict) -> None:
    with pytest.raises(ValueError, match="extra must be"):
        save_checkpoint(tmp_path / "a", *trained(steps=0), extra=extra)
    assert not any(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a checkpoint: choose another name"):
        save_checkpoint(tmp_path, *trained(steps=0))
    assert (tmp_path / "notes.txt").read_text() == "mine"


# Complete or not there: the folders.


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """A folder with the checkpoints of steps 100, 200 and 300."""
    first = save_checkpoint(checkpoint_path(tmp_path / "all", 100), *trained(steps=1), extra={"step": 100})
    for step in (200, 300):
        shutil.copytree(first, checkpoint_path(first.parent, step))
    return first.parent


def test_the_newest_complete_one_is_found_and_newer_broken_ones_are_told(checkpoints: Path) -> None:
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_00000300", [])
    os.truncate(checkpoints / "step_00000300" / "__0_0.distcp", 10)
    size = json.loads((checkpoints / "step_00000300" / "manifest.json").read_text())["files"]["__0_0.distcp"]
    truncated = f"step_00000300: __0_0.distcp is 10 bytes, the manifest says {size}"
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_00000200", [truncated])
    (checkpoints / "step_00000200" / ".metadata").unlink()
    missing = "step_00000200: .metadata is missing"
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_00000100", [truncated, missing])
    (checkpoints / "step_00000100" / "manifest.json").unlink()
    path, lines = latest_checkpoint(checkpoints)
    assert path is None and lines[2] == "step_00000100: it has no manifest.json, so it was not written to its end"
    assert latest_checkpoint(checkpoints / "nothing") == (None, [])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "files": 3}', '{"format": 7, "files": {}}', "\0"])
def test_a_manifest_that_cannot_be_read_is_one_line(checkpoints: Path, content: str) -> None:
    (checkpoints / "step_00000300" / "manifest.json").write_text(content)
    path, (line,) = latest_checkpoint(checkpoints)
    assert path == checkpoints / "step_00000200"
    assert line.startswith("step_00000300: it") and "\n" not in line
    with pytest.raises(ValueError, match=r"step_00000300 is not a complete checkpoint: it"):
        load_checkpoint(checkpoints / "step_00000300", *trained(steps=0))


def test_what_a_killed_save_has_left_is_told_unless_it_was_saved_before(checkpoints: Path) -> None:
    for name in ("step_00000300.tmp", "step_00000350.tmp", "step_00000050.tmp"):
        (checkpoints / name).mkdir()
    line = "step_00000350.tmp: it was not written to its end"
    assert latest_checkpoint(checkpoints) == (checkpoints / "step_00000300", [line])


def test_a_broken_one_is_replaced(checkpoints: Path) -> None:
    path = checkpoints / "step_00000300"
    os.truncate(path / "training.pt", 0)
    save_checkpoint(path, *trained(steps=1))
    assert latest_checkpoint(checkpoints) == (path, [])
    assert len(os.listdir(checkpoints)) == 3


def test_pruning_keeps_the_newest_complete_ones_and_what_is_newer(checkpoints: Path) -> None:
    for name in ("step_00000100.old", "step_00000400.tmp", "step_00000500", "step_00000050.tmp", "step_00000090"):
        shutil.copytree(checkpoints / "step_00000100", checkpoints / name)
    for name in ("step_00000500", "step_00000090"):
        (checkpoints / name / "manifest.json").unlink()
    (checkpoints / "notes").mkdir()
    prune_checkpoints(checkpoints, keep=3)
    assert sorted(os.listdir(checkpoints)) == [
        "notes",
        "step_00000100",
        "step_00000200",
        "step_00000300",
        "step_00000500",
    ]
    prune_checkpoints(checkpoints, keep=1)
    assert sorted(os.listdir(checkpoints)) == ["notes", "step_00000300", "step_00000500"]
    for keep in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="keep must be an integer >= 1"):
            prune_checkpoints(checkpoints, keep=keep)


def test_a_folder_that_is_not_ours_is_left_with_a_warning(checkpoints: Path) -> None:
    (checkpoints / "step_00000001").mkdir()
    (checkpoints / "step_00000001" / "thesis.tex").touch()
    with pytest.warns(RuntimeWarning, match="step_00000001 could not be removed: it is not a checkpoint"):
        prune_checkpoints(checkpoints, keep=1)
    assert sorted(os.listdir(checkpoints)) == ["step_00000001", "step_00000300"]


def only_rank_0_prunes(folder: Path) -> None:
    if dist.get_rank() == 1:
        prune_checkpoints(folder, keep=1)
        assert len(os.listdir(folder)) == 3
    dist.barrier()
    if dist.get_rank() == 0:
        prune_checkpoints(folder, keep=1)
        assert os.listdir(folder) == ["step_00000300"]


def test_only_rank_0_prunes(checkpoints: Path) -> None:
    run(2, only_rank_0_prunes, checkpoints)


# Whatever happens while a checkpoint is written.

KILLED = """
import os, signal, sys
from pathlib import Path
import torch, distopt
from distopt.checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
assert "torch.distributed.checkpoint" not in sys.modules, "import distopt must not wait for it"

folder = Path(sys.argv[1])
path = checkpoint_path(folder, 2)
model = torch.nn.Linear(3, 2)
optimizer = distopt.LAMB(model.parameters(), lr=0.1)

def save(value):
    torch.nn.init.constant_(model.weight, value)
    save_checkpoint(path, model, optimizer, extra={"value": value})

def at_operation(kill, function, *args):
    '''Runs in a child that is killed at its kill-th operation on the folder; whether it came to its end before.'''
    child = os.fork()
    if child == 0:
        seen = 0
        def count(event, args):
            nonlocal seen
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"):
                seen += 1
                if seen == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        try:
            function(*args)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), f"failed at operation {kill}"
    return status == 0

def found():
    newest, broken = latest_checkpoint(folder)
    assert newest is not None and broken == [], (newest, broken)
    value = load_checkpoint(path, model, optimizer)["value"]
    assert (model.weight == value).all()
    return value

save(0.0)
value, kill, ended = 0.0, 0, False
while not ended:
    kill += 1
    ended = at_operation(kill, save, value + 1)
    assert found() in (value, value + 1), kill
    value = found()
assert found() == value and os.listdir(folder) == [path.name], os.listdir(folder)
print("saving:", kill - 1, "operations,", int(value), "replaced")

for step in (3, 4):
    path = checkpoint_path(folder, step)
    save(float(step))
kill, ended = 0, False
while not ended:
    kill += 1
    ended = at_operation(kill, prune_checkpoints, folder, 1)
    assert found() == 4.0
assert os.listdir(folder) == [path.name], os.listdir(folder)
print("pruning:", kill - 1, "operations")
"""


def test_killed_at_any_operation_on_the_disk_no_checkpoint_is_lost(tmp_path: Path) -> None:
    """Each time a real SIGKILL, one operation later, in a save over the only checkpoint there is."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    operations = int(done.stdout.split()[1])
    assert operations > 20, done.stdout


def disk_full_on(full_rank: int, folder: Path) -> tuple[str, list[str]]:
    parts = start("fsdp2", "lamb")
    path = save_checkpoint(checkpoint_path(folder, 1), *parts, extra={"good": True})
    train(*parts, 0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RuntimeError) as caught:
            save_checkpoint(path, *parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path, *parts) == {"good": True}
    dist.barrier()
    return str(caught.value), os.listdir(folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_rank_cannot_write_all_raise_alike_and_the_former_checkpoint_stays(tmp_path: Path, rank: int) -> None:
    """The kernel refuses files of more than 1000 bytes to one rank."""
    results = run(2, disk_full_on, rank, tmp_path)
    assert results[0] == results[1]
    assert f"rank {rank}: OSError: [Errno 27] File too large" in results[0][0]
    assert results[0][1] == ["step_00000001"]


def nowhere_to_write(path: Path) -> str:
    with pytest.raises(RuntimeError) as caught:
        save_checkpoint(path, *start("ddp", "lamb"))
    return str(caught.value)


def test_where_the_folder_cannot_be_made_all_ranks_raise_alike(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    results = run(2, nowhere_to_write, tmp_path / "file" / "step_00000001")
    assert results[0] == results[1] and "rank 0: NotADirectoryError" in results[0]


def slow_rename(folder: Path) -> None:
    rename = os.rename
    if dist.get_rank() == 0:
        os.rename = lambda *args: (time.sleep(0.3), rename(*args))
    try:
        path = save_checkpoint(checkpoint_path(folder, 1), *start("fsdp2", "lamb"))
        assert latest_checkpoint(folder) == (path, [])
    finally:
        os.rename = rename


def test_no_rank_goes_on_before_the_checkpoint_has_its_name(tmp_path: Path) -> None:
    run(2, slow_rename, tmp_path)


def load_elsewhere(path: Path, extra: dict[str, Any]) -> str:
    parts = start("fsdp2", "lamb")
    with pytest.raises(ValueError) as caught:
        if extra:
            save_checkpoint(path, *parts, extra=extra if dist.get_rank() else {})
        else:
            load_checkpoint(path, *parts)
    return str(caught.value)


def test_what_is_refused_is_refused_on_every_rank(tmp_path: Path) -> None:
    for extra, message in (({}, "there is no such folder"), ({"rank": 1}, "extra must be the same on every rank")):
        results = run(2, load_elsewhere, tmp_path / "a", extra)
        assert results[0] == results[1] and message in results[0]
