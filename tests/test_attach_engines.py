"""`distopt.attach` in Accelerate scripts with FSDP2, DeepSpeed and tensor parallelism."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distopt
from tests.harness.accelerated import (
    ACCUMULATION,
    STEPS,
    TOLERANCE,
    TOLERANCE_DEEPSPEED,
    batch,
    lamb,
    prepared,
    reference,
    start,
    start_deepspeed,
    start_fsdp,
    train,
)
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import distance
from tests.harness.sharded import full, mesh, whole


def train_fsdp2(zero: int, folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters of the unbroken run, and of one that was saved and loaded."""
    accelerator = start_fsdp(reshard=zero == 3)
    script = prepared(accelerator, zero)
    train(accelerator, *script, range(STEPS // 2))
    accelerator.save_state(str(folder))
    train(accelerator, *script, range(STEPS // 2, STEPS))
    accelerator = start_fsdp(reshard=zero == 3)
    again = prepared(accelerator, None)
    accelerator.load_state(str(folder))
    train(accelerator, *again, range(STEPS // 2, STEPS))
    return full(script[0]), full(again[0])


def load_fsdp2(folder: Path) -> list[Tensor]:
    accelerator = start_fsdp()
    script = prepared(accelerator, 3)
    accelerator.load_state(str(folder))
    train(accelerator, *script, range(STEPS // 2, STEPS))
    return full(script[0])


@pytest.mark.parametrize("zero", [2, 3])
def test_fsdp2_is_the_unsharded_run(zero: int, tmp_path: Path) -> None:
    for unbroken, resumed in run(2, train_fsdp2, zero, tmp_path):
        assert distance(unbroken, reference()) < TOLERANCE
        assert distance(resumed, reference()) < TOLERANCE
    assert not (tmp_path / "distopt").exists()
    for world in (1, 4):
        for params in run(world, load_fsdp2, tmp_path):
            assert distance(params, reference()) < TOLERANCE, world


def prepared_deepspeed(stage: int, zero: int | None, model: nn.Module) -> tuple[Any, Any, Any]:
    """The accelerator, DeepSpeed's engine and the schedule of a script, attached."""
    accelerator = start_deepspeed(stage)
    inner = lamb(model)
    engine, optimizer = accelerator.prepare(model, inner)
    schedule = distopt.warmup_cosine(inner, warmup_steps=2, total_steps=STEPS)
    accelerator.register_for_checkpointing(schedule)
    distopt.attach(accelerator, engine, optimizer, zero_stage=zero)
    return accelerator, engine, schedule


def steps_deepspeed(accelerator: Any, engine: Any, schedule: Any, steps: range) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    rank, world = accelerator.process_index, accelerator.num_processes
    for step in steps:
        for part in batch(3 * step).float().chunk(ACCUMULATION):
            with accelerator.accumulate(engine):
                accelerator.backward(engine(part.chunk(world)[rank], 3 * step))
        schedule.step()
    return [safe_get_full_fp32_param(p).detach().clone() for p in engine.module.parameters() if p.requires_grad]


def train_deepspeed(stage: int, zero: int | None) -> list[Tensor]:
    script = prepared_deepspeed(stage, zero, whole("replicated", torch.float32))
    params = steps_deepspeed(*script, range(STEPS))
    script[1].destroy()
    return params


@pytest.mark.parametrize(("stage", "zero"), [(2, 2), (3, None)])
def test_deepspeed_is_the_unsharded_run(stage: int, zero: int | None) -> None:
    expected = [p for p, like in zip(reference(), whole("replicated").parameters()) if like.requires_grad]
    for params in run(2, train_deepspeed, stage, zero):
        assert distance(params, expected) < TOLERANCE_DEEPSPEED


class Plain(nn.Module):
    """Stage 3 of DeepSpeed 0.19.8 raises, after loading, where a module uses another one's parameters as Toy does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))

    def forward(self, samples: Tensor, step: int) -> Tensor:
        return (self.layers(samples[:, None]) - step).square().mean()


def save_deepspeed(stage: int, folder: Path) -> list[Tensor]:
    script = prepared_deepspeed(stage, stage, Plain())
    steps_deepspeed(*script, range(STEPS // 2))
    script[0].save_state(str(folder))
    params = steps_deepspeed(*script, range(STEPS // 2, STEPS))
    script[1].destroy()
    return params


def load_deepspeed(stage: int, folder: Path) -> list[Tensor]:
    script = prepared_deepspeed(stage, stage, Plain())
    script[0].load_state(str(folder))
    params = steps_deepspeed(*script, range(STEPS // 2, STEPS))
    script[1].destroy()
    return params


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_deepspeed_saved_resumes_bit_for_bit_or_is_refused(stage: int, tmp_path: Path) -> None:
    """At another number of processes DeepSpeed itself raises; `distopt.save_checkpoint` is for that."""
    unbroken = run(2, save_deepspeed, stage, tmp_path)
    for params, expected in zip(run(2, load_deepspeed, stage, tmp_path), unbroken):
        assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
    with pytest.raises(RankError, match="used a DP world size of 2 but the current world size is 1"):
        run(1, load_deepspeed, stage, tmp_path)


def told_of_clipping(clipping: float | str) -> list[str]:
    accelerator = start_deepspeed(1, clipping)
    model = whole("replicated", torch.float32)
    model, optimizer = accelerator.prepare(model, lamb(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distopt.attach(accelerator, model, optimizer)
    model.destroy()
    return [str(w.message) for w in caught if "clip" in str(w.message)]


def test_clipping_that_nobody_asked_for_is_told() -> None:
    """Accelerate 1.15 fills in a norm of 1.0, under DeepSpeed alone: another training, without a word."""
    assert run(1, told_of_clipping, 1.0) == [[]]
    ((said,),) = run(1, told_of_clipping, "auto")
    assert "clips gradients to a norm of 1.0, which Accelerate chose and nobody asked for" in said


class Perceptron(nn.Sequential):
    """`tp_size` is what Accelerate asks a model for that is tensor-parallel."""

    def __init__(self, over: Any = None) -> None:
        torch.manual_seed(0)
        super().__init__(nn.LayerNorm(8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.double()
        if over is not None:
            parallelize_module(self, over, {"1": ColwiseParallel(), "3": RowwiseParallel()})
            self.tp_size = 2


def train_perceptron(model: nn.Module, optimizer: Any, steps: range) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        distopt.clip_grad_norm_(optimizer, 0.1)
        optimizer.step()
    return full(model)


def train_tensor_parallel(folder: Path, over_all: bool) -> list[list[Tensor]]:
    """The weights, and those of a run that another one's save_state resumed."""
    from accelerate.utils import ParallelismConfig

    results = []
    for first in (True, False):
        accelerator = start(gradient_accumulation_steps=1)
        grid = mesh((2,), ("tp",)) if over_all else mesh((1, 2), ("dp", "tp"))
        # Accelerate 1.15 takes tensor parallelism for accelerators only; this is all that lacks.
        accelerator.state.parallelism_config = ParallelismConfig(tp_size=2)
        accelerator.state.device_mesh = grid
        model = Perceptron(grid["tp"] if over_all else mesh((2, 1), ("dp", "tp"))["tp"])
        model, optimizer = accelerator.prepare(model, distopt.LAMB(model.parameters(), lr=0.05))
        distopt.attach(accelerator, model, optimizer)
        if first:
            train_perceptron(model, optimizer, range(2))
            accelerator.save_state(str(folder))
        else:
            accelerator.load_state(str(folder))
        results.append(train_perceptron(model, optimizer, range(2, 4)))
    return results


def test_tensor_parallelism_alone_is_the_unsharded_run(tmp_path: Path) -> None:
    """It was refused, although its parameters tell their layout."""
    model = Perceptron()
    expected = train_perceptron(model, distopt.LAMB(model.parameters(), lr=0.05), range(4))
    for results in run(2, train_tensor_parallel, tmp_path, True):
        for params in results:
            assert distance(params, expected) < TOLERANCE


def test_tensor_parallelism_beside_what_nobody_exchanges_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="nor tensor parallelism over all processes"):
        run(2, train_tensor_parallel, tmp_path, False)
