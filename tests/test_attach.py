"""`distopt.attach` in real Accelerate scripts: DDP and ZeRO-1."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt import layout
from tests.harness import jobs
from tests.harness.accelerated import (
    ACCUMULATION,
    STEPS,
    TOLERANCE,
    batch,
    lamb,
    prepared,
    reference,
    start,
    start_fsdp,
    train,
)
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import distance
from tests.harness.sharded import full, whole
from tests.test_attach_engines import Perceptron


def told(zero: int | None) -> list[int]:
    """The batches that batch norm has counted, after each step of SAM."""
    accelerator = start(gradient_accumulation_steps=1)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    sam = distopt.SAM(distopt.AdamW(model.parameters()))
    norm = model[1]
    model, optimizer = accelerator.prepare(model, sam)
    distopt.attach(accelerator, model, optimizer, zero_stage=zero)
    counted = []
    for _ in range(2):
        accelerator.backward(model(torch.randn(5, 3)).square().sum())
        with sam.perturbed():
            sam.zero_grad()
            accelerator.backward(model(torch.randn(5, 3)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        counted.append(int(norm.num_batches_tracked))
    return counted


@pytest.mark.parametrize("zero", [None, 1])
def test_sam_is_told_of_the_model(zero: int | None) -> None:
    """Its second pass moved the statistics of batch norm."""
    assert run(2, told, zero) == [[1, 2]] * 2


def computes(precision: str, zero: int | None) -> tuple[torch.dtype | None, torch.dtype | None]:
    """What SAM is told that weights are computed with; and one that was told before."""
    found = []
    for own in (None, torch.float16):
        accelerator = start_fsdp(mixed_precision=precision) if zero == 3 else start(mixed_precision=precision)
        model = whole("replicated")
        sam = distopt.SAM(lamb(model))
        sam.compute_dtype = own
        model, optimizer = accelerator.prepare(model, sam)
        distopt.attach(accelerator, model, optimizer, zero_stage=zero)
        found.append(sam.compute_dtype)
    return found[0], found[1]


@pytest.mark.parametrize("zero", [None, 1, 3])
@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16)])
def test_sam_is_told_what_weights_are_computed_with(
    precision: str, dtype: torch.dtype | None, zero: int | None
) -> None:
    """Or it would never warn of a perturbation that is lost in rounding."""
    assert run(2, computes, precision, zero) == [(dtype, torch.float16)] * 2


def friendly_under_a_scale() -> None:
    accelerator = start()
    model = whole("replicated")
    model, optimizer = accelerator.prepare(model, distopt.FriendlySAM(lamb(model)))
    accelerator.scaler = torch.amp.GradScaler("cpu")
    distopt.attach(accelerator, model, optimizer)


def test_friendly_sam_under_a_loss_scale_is_refused() -> None:
    with pytest.raises(
        RankError, match=r"FriendlySAM remembers gradients.*loss scale.*use mixed_precision=bf16"
    ) as error:
        run(1, friendly_under_a_scale)
    assert error.value.kind == "ValueError"


def train_whole(zero: int | None) -> tuple[list[Tensor], int]:
    """The parameters, and how many numbers of state this rank holds."""
    accelerator = start()
    model, optimizer, schedule = prepared(accelerator, zero)
    train(accelerator, model, optimizer, schedule, range(STEPS))
    held = sum(layout.local(state["exp_avg"]).numel() for state in optimizer.state.values())
    return full(model), held


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("zero", [None, 1])
def test_ddp_is_the_unsharded_run(zero: int | None, world: int) -> None:
    trained = sum(p.numel() for p in whole("replicated").parameters() if p.requires_grad)
    results = run(world, train_whole, zero)
    for params, _ in results:
        assert distance(params, reference()) < TOLERANCE
    assert sum(held for _, held in results) == trained * (1 if zero == 1 else world)


def exchanged(how: str) -> tuple[bool, list[float], str, list[Tensor]]:
    """Whether a rank has gradients of its rows only; norms to clip by, and the parameters after steps without."""
    from accelerate.utils import GradientAccumulationPlugin
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    each = {"gradient_accumulation_plugin": GradientAccumulationPlugin(ACCUMULATION, sync_each_batch=True)}
    accelerator = start(**({"gradient_accumulation_steps": 1} | each if how == "sync_each_batch" else {}))
    model = whole("replicated")
    model, optimizer = accelerator.prepare(model, lamb(model))
    if how == "hook":
        model.register_comm_hook(None, allreduce_hook)
    if how == "scaler":
        accelerator.scaler = object()
    distopt.attach(accelerator, model, optimizer, zero_stage=1)
    accelerator.scaler = None
    norms, refused = [], ""
    rank, world = accelerator.process_index, accelerator.num_processes
    for part in batch(0).chunk(ACCUMULATION):
        with accelerator.accumulate(model):
            accelerator.backward(model(part.chunk(world)[rank], 0))
    params = [p for p in model.parameters() if p.grad is not None]
    rows = any(p.grad.isnan().any() for p in params)
    for some in (params, params[1:3], params[2:3], [], model.parameters()):
        norms.append(float(accelerator.clip_grad_norm_(some, 1e9)))
    try:
        accelerator.clip_grad_norm_(params, 1e9, norm_type=1)
    except ValueError as error:
        refused = str(error)
    optimizer.step()
    return bool(rows), norms, refused, full(model)


@pytest.mark.parametrize("how", ["rows", "hook", "scaler", "sync_each_batch"])
def test_gradients_are_of_rows_where_all_who_read_them_can_be_told(how: str) -> None:
    """A script's own hook of DDP and a loss scaler need full ones; a sum of exchanged gradients does not.
    `accelerator.clip_grad_norm_` is right in all cases, for some of the parameters too."""
    model = whole("replicated")
    optimizer = lamb(model)
    model(batch(0), 0).backward()
    params = [p for p in model.parameters() if p.grad is not None]
    expected = [float(nn.utils.get_total_norm([p.grad for p in some])) for some in (params, params[1:3], params[2:3])]
    optimizer.step()
    for rows, norms, refused, after in run(2, exchanged, how):
        assert rows == (how in ("rows", "sync_each_batch"))
        assert norms == pytest.approx([*expected, 0.0, expected[0]], rel=1e-12)
        assert ("norm_type=1 under zero_stage=1" in refused) == rows
        assert distance(after, [p.detach() for p in model.parameters()]) < TOLERANCE


def loops(how: str) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters after a loop of Accelerate's own, with zero_stage=1 and with zero_stage=0."""
    from accelerate.local_sgd import LocalSGD

    after = []
    for zero in (1, 0):
        accelerator = start(gradient_accumulation_steps=1)
        model = whole("replicated")
        model, optimizer = accelerator.prepare(model, distopt.AdamW(model.parameters(), lr=0.01))
        distopt.attach(accelerator, model, optimizer, zero_stage=zero)
        with LocalSGD(accelerator, model, local_sgd_steps=2, enabled=how == "LocalSGD") as local_sgd:
            for step in (0, 3):  # that use every parameter
                for part in batch(step).chunk(2):
                    mine = part.chunk(accelerator.num_processes)[accelerator.process_index]
                    accelerator.backward(model(mine, step) / 2)
                optimizer.step()
                optimizer.zero_grad()
                local_sgd.step()
        after.append(full(model))
        accelerator.free_memory()
    return after[0], after[1]


def test_loops_that_exchange_in_their_own_way() -> None:
    """Accelerate's examples/nlp_example.py exchanges each backward pass of a step, and was trained to nan; LocalSGD
    exchanges none."""
    for ours, plain in run(2, loops, "nlp_example"):
        assert distance(ours, plain) < TOLERANCE
    with pytest.raises(RankError, match=r"this rank's alone.*LocalSGD.*zero_stage=0"):
        run(2, loops, "LocalSGD")


def train_sam() -> tuple[list[Tensor], list[Tensor]]:
    """Two steps of SAM with a closure, sharded by attach and unsharded."""
    accelerator = start()
    model, optimizer, _ = prepared(accelerator, 1, sam=True)
    alone = whole("replicated")
    single = distopt.SAM(lamb(alone))
    distopt.warmup_cosine(single, warmup_steps=2, total_steps=STEPS)
    rank, world = accelerator.process_index, accelerator.num_processes
    for step in (0, 3):

        def closure(step: int = step) -> None:
            optimizer.zero_grad()
            accelerator.backward(model(batch(step).chunk(world)[rank], step) * ACCUMULATION)

        def unsharded(step: int = step) -> None:
            single.zero_grad()
            alone(batch(step), step).backward()

        optimizer.step(closure)
        single.step(unsharded)
    return full(model), full(alone)


def test_sam_inside_is_the_unsharded_run() -> None:
    for params, expected in run(2, train_sam):
        assert distance(params, expected) < TOLERANCE


def train_alone(file: Path) -> None:
    """`python script.py`: no launcher, no process group."""
    warnings.simplefilter("error")
    assert "RANK" not in os.environ and not dist.is_initialized()
    accelerator = start()
    script = prepared(accelerator, 1)
    train(accelerator, *script, range(STEPS))
    torch.save(full(script[0]), file)


def test_without_a_launcher(tmp_path: Path) -> None:
    # Its own process: to end the group of one of the pool leaves DeepSpeed's tests in it with groups that are gone.
    process = jobs.fork(train_alone, tmp_path / "params")
    process.join(60)
    assert process.exitcode == 0
    assert distance(torch.load(tmp_path / "params"), reference()) < TOLERANCE


def clipped_by_us(zero: int) -> tuple[list[float], list[Tensor]]:
    accelerator = start(gradient_accumulation_steps=1)
    model = Perceptron()
    model, optimizer = accelerator.prepare(model, distopt.LAMB(model.parameters(), lr=0.05))
    distopt.attach(accelerator, model, optimizer, zero_stage=zero)
    norms = []
    for step in range(2):
        optimizer.zero_grad()
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x.chunk(2)[accelerator.process_index]).square().mean().backward()
        norms.append(float(distopt.clip_grad_norm_(optimizer, 0.1)))  # Accelerate's wrapper, which has no layout
        optimizer.step()
    return norms, [p.detach() for p in model.parameters()]


def test_the_layout_is_found_inside_of_a_prepared_optimizer() -> None:
    """The norm was nan, which the gradients of other ranks' rows are, and so was the update."""
    for (norms, params), (expected, unsharded) in zip(run(2, clipped_by_us, 1), run(2, clipped_by_us, 0)):
        assert norms == pytest.approx(expected, rel=1e-12)
        assert distance(params, unsharded) < TOLERANCE
