"""Schedule-free optimizers: x for evaluation and y for training, on every layout, in checkpoints and by the loops."""

from __future__ import annotations

import copy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt.engine.train_step import update
from tests.harness import accelerated, matrix, oracles
from tests.harness.distributed import run
from tests.harness.engines import CPU, DEEPSPEED, ENGINES
from tests.harness.optimizers import ROWS, Row, distance, initial, named, pull
from tests.harness.sharded import full as gathered
from tests.harness.sharded import whole
from tests.harness.trainers import arguments, language_model, sequences
from tests.test_rules import leaves, trajectory

NAMES = ("sgd_schedule_free", "adamw_schedule_free")
every_name = pytest.mark.parametrize("name", NAMES)
STEPS = 8
EVALUATED = (3, 8)  # after these steps, and training continues in between
# float64: x = (y - (1 - beta) z) / beta magnifies a rounding of 1e-16 by 1 / beta, in each of a few changes of mode.
EXACT = 1e-13


def evaluated(row: Row, params: list[Tensor], steps: int) -> list[list[Tensor]]:
    """The x of every step, by the oracle."""
    row = Row(row.name, row.cls, row.kwargs, partial(row.oracle, evaluated=True))
    return row.expected(params, oracles.gradient_of(pull), steps)


@every_name
def test_eval_has_the_average_and_train_the_way_back(name: str) -> None:
    row, params = named(name), leaves()
    expected = evaluated(row, params, STEPS)
    opt = row.make(row.groups(params))
    opt.eval()  # before the first step x and y are the same
    opt.train()
    for step, ours in enumerate(trajectory(opt, params, STEPS)):
        y = [p.clone() for p in ours]
        opt.eval()
        opt.eval()  # a second call changes nothing
        assert distance([p.detach() for p in params], expected[step]) < EXACT
        opt.train()
        assert distance([p.detach() for p in params], y) < EXACT
    assert distance(y, expected[-1]) > 1e-3  # they differ, or nothing was tested


def test_the_average_is_that_of_the_iterates() -> None:
    """Without momentum's share of z in y there is a closed form: with a constant lr, x is the mean of all z."""
    (p,) = initial((4, 3))
    opt = distopt.SGDScheduleFree([p.requires_grad_()], lr=0.1, momentum=0.5)
    iterates = []
    for step in range(STEPS):
        p.grad = torch.full_like(p, step + 1.0)
        opt.step()
        iterates.append(opt.state[p]["z"].clone())
    opt.eval()
    assert distance([p.detach()], [torch.stack(iterates).mean(0)]) < EXACT


@every_name
def test_a_step_in_eval_mode_is_refused_and_changes_nothing(name: str) -> None:
    (p,) = initial((4, 3))
    opt = named(name).make([p.requires_grad_()])
    p.grad = torch.ones_like(p)
    opt.step()
    opt.eval()
    before = p.detach().clone(), {key: value.clone() for key, value in opt.state[p].items()}
    with pytest.raises(ValueError, match=r"ScheduleFree steps in train mode.*call optimizer\.train\(\)") as error:
        opt.step()
    assert "\n" not in str(error.value)
    assert torch.equal(p, before[0])
    assert all(torch.equal(opt.state[p][key], value) for key, value in before[1].items())
    opt.train()
    opt.step()


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"trust_ratio": True}, {"r": -1.0}, {"lr": -1.0}], ids=str)
def test_what_it_is_not_for_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        distopt.SGDScheduleFree([torch.ones(2, requires_grad=True)], **options)
    with pytest.raises(ValueError, match=r"betas\[0\] must be > 0"):
        distopt.AdamWScheduleFree([torch.ones(2, requires_grad=True)], betas=(0.0, 0.9))


@every_name
def test_a_frozen_parameter_is_evaluated_at_its_average_too(name: str) -> None:
    row, params = named(name), [p.requires_grad_() for p in initial((4, 3), (3,))]
    expected = evaluated(row, params, 3)[-1]
    opt = row.make(row.groups(params))
    list(trajectory(opt, params, 3))
    opt.zero_grad()
    params[1].requires_grad_(False)
    opt.eval()
    assert distance([p.detach() for p in params], expected) < EXACT


@every_name
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_state_dict_continues_in_the_mode_it_was_saved_in(name: str, training: bool) -> None:
    row = named(name)
    params, again = ([p.requires_grad_() for p in initial((4, 3), (3,))] for _ in range(2))
    first, second = row.make(row.groups(params)), row.make(row.groups(again))
    list(trajectory(first, params, 3))
    first.train() if training else first.eval()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(again, params):
        p.data.copy_(q.data)
    assert [group["train_mode"] for group in second.param_groups] == [training] * 2
    for opt in (first, second):
        opt.train()
    for mine, theirs in zip(trajectory(first, params, 3), trajectory(second, again, 3)):
        assert all(torch.equal(p, q) for p, q in zip(mine, theirs))


def test_16_bit_weights_are_interpolated_in_their_masters() -> None:
    """In 16 bits y would come back rounded twice, and a small difference of x and y would be lost."""
    row, exact = named("adamw_schedule_free"), [p.requires_grad_() for p in initial((6, 5), dtype=torch.float32)]
    exact = [p.detach().bfloat16().float().requires_grad_() for p in exact]
    short = [p.detach().bfloat16().requires_grad_() for p in exact]
    optimizers = [row.make(params, lr=1e-4) for params in (exact, short)]
    for step in range(6):
        for p, q in zip(exact, short):
            p.grad = torch.sin(torch.arange(p.numel()) + step).view(p.shape).bfloat16().float()
            q.grad = p.grad.bfloat16()
        for opt in optimizers:
            opt.train()
            opt.step()
            opt.eval()
    for p, q in zip(exact, short):
        assert torch.equal(optimizers[1].state[q]["master"], p)
        assert torch.equal(q, p.bfloat16())


# Engines.


def losses(kind: str, name: str, precision: str = "fp32") -> list[float]:
    """The loss of one batch at x, after each of EVALUATED, as the model's forward pass sees the weights."""
    rank, world = dist.get_rank(), dist.get_world_size()
    options = {"find_unused_parameters": True} if kind in ("ddp", "zero1") else {}
    engine = ENGINES[kind](precision=precision, **options)
    toy = matrix.initial("fp32")
    model = engine.build(toy, [toy.part], lambda unit, device: None, CPU)
    row = named(name)
    optimizer = row.make(row.groups([*engine.unwrap(model).parameters()]))
    model = engine.attach(model, optimizer, 1, matrix.MAX_NORM)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = []
    for step in range(1, STEPS + 1):
        mine = matrix.batch(3 * step, dtype).chunk(world)[rank]
        assert update(engine, model, optimizer, [mine], matrix.MAX_NORM, partial(matrix.loss, 3 * step)).applied
        if step in EVALUATED:
            optimizer.eval()
            with torch.no_grad():
                found.append(float(model(matrix.batch(0, dtype), 0)))
            engine.refresh(model)
    if kind in DEEPSPEED:
        model.destroy()
    return found


@lru_cache
def unsharded(name: str) -> list[float]:
    model = matrix.initial("fp32")
    row = named(name)
    optimizer = row.make(row.groups([*model.parameters()]))
    found = []
    for step in range(1, STEPS + 1):
        optimizer.train()
        optimizer.zero_grad()
        model(matrix.batch(3 * step, torch.float32), 3 * step).backward()
        distopt.clip_grad_norm_(optimizer, matrix.MAX_NORM)
        optimizer.step()
        if step in EVALUATED:
            with torch.no_grad():
                at_y = float(model(matrix.batch(0, torch.float32), 0))
                optimizer.eval()
                found.append(float(model(matrix.batch(0, torch.float32), 0)))
            assert abs(found[-1] / at_y - 1.0) > 1e-3  # or the test below could not tell x from y
    return found


# float32: the order of sums; Adam's division by the root of a small square stretches it.
TOLERANCE = 1e-5


@every_name
@pytest.mark.parametrize(
    ("kind", "world"),
    [
        *[("zero1", 2), ("fsdp2", 2), ("deepspeed_zero1", 2), ("deepspeed_zero3", 2)],
        *[
            pytest.param(kind, world, marks=pytest.mark.matrix)
            for kind in ENGINES
            for world in (2, 3, 4)
            if kind != "hsdp" or world != 3
        ],
    ],
)
def test_every_engine_evaluates_at_the_average(kind: str, world: int, name: str) -> None:
    for found in run(world, losses, kind, name):
        assert found == pytest.approx(unsharded(name), rel=TOLERANCE)


# Checkpoints, at another number of processes and on another engine.


def half(path: Path, kind: str, name: str, training: bool, load: bool) -> list[Tensor]:
    """Steps 0 to 3, a save in a mode; or a load of it and steps 3 to 6. Returns the full x."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model: nn.Module = whole("replicated")
    if kind == "fsdp2":
        fully_shard(model)
    elif kind == "zero1":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    opt = named(name).make([*model.parameters()])
    if kind == "zero1":
        opt.bind(distopt.layout.zero1_layout(model))
    if load:
        distopt.load_checkpoint(path, model, opt)
        assert all(group["train_mode"] is training for group in opt.param_groups)
    for step in range(3, 6) if load else range(3):
        opt.train()
        opt.zero_grad()
        model(accelerated.batch(3 * step).chunk(world)[rank], 3 * step).backward()
        opt.step()
    if not load:
        opt.train() if training else opt.eval()
        distopt.save_checkpoint(path, model, opt)
    opt.eval()
    return gathered(model)


@every_name
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("here", "there"), [(("zero1", 2), ("plain", 1)), (("fsdp2", 2), ("zero1", 4))], ids=str)
def test_a_checkpoint_of_either_mode_continues_anywhere(
    name: str, training: bool, here: tuple[str, int], there: tuple[str, int], tmp_path: Path
) -> None:
    def on(where: tuple[str, int], load: bool) -> list[Tensor]:
        path = tmp_path / "plain" if where == ("plain", 0) else tmp_path / "saved"
        arguments = path, where[0], name, training, load
        return half(*arguments) if where[1] < 2 else run(where[1], half, *arguments)[0]

    on(here, False)
    half(tmp_path / "plain", "plain", name, training, False)
    expected = half(tmp_path / "plain", "plain", name, training, True)
    assert distance(on(there, True), expected) < 1e-12  # float64, and other orders of sums


# Accelerate, and the Trainer.


def through_accelerate(zero: int) -> list[Tensor]:
    accelerator = accelerated.start(gradient_accumulation_steps=1)
    rank, world = accelerator.process_index, accelerator.num_processes
    model = whole("replicated")
    model, optimizer = accelerator.prepare(model, named("adamw_schedule_free").make([*model.parameters()]))
    distopt.attach(accelerator, model, optimizer, zero_stage=zero)
    for step in range(4):
        optimizer.train()
        accelerator.backward(model(accelerated.batch(3 * step).chunk(world)[rank], 3 * step))
        optimizer.step()
        optimizer.zero_grad()
        optimizer.eval()
    return gathered(model)


def test_accelerate_passes_both_modes_on() -> None:
    model = whole("replicated")
    opt = named("adamw_schedule_free").make([*model.parameters()])
    for step in range(4):
        opt.zero_grad()
        model(accelerated.batch(3 * step), 3 * step).backward()
        opt.step()
    opt.eval()
    expected = [p.detach() for p in model.parameters()]
    for result in run(2, through_accelerate, 1):
        assert distance(result, expected) < accelerated.TOLERANCE


def test_the_trainer_saves_what_it_evaluates_and_resumes(tmp_path: Path) -> None:
    """Its own save_model and checkpoints have y, unless it has evaluated just before."""
    from datasets import Dataset
    from transformers import Trainer
    from transformers.modeling_utils import load_state_dict

    from distopt.integrations.transformers import ShardedTrainerMixin

    class Ours(ShardedTrainerMixin, Trainer):
        pass

    def made(**options: Any) -> Any:
        args = arguments(tmp_path, "ddp", save_steps=2, save_strategy="steps", **options)
        rows = sequences(4)
        data = Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")
        optimizer = (distopt.AdamWScheduleFree, {"lr": 1e-2})
        return Ours(language_model(), args, train_dataset=data, optimizer_cls_and_kwargs=optimizer)

    trainer = made()
    trainer.train()
    saved = load_state_dict(str(tmp_path / "checkpoint-4" / "model.safetensors"))
    trainer.optimizer.eval()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert all(torch.equal(saved[name], p) for name, p in weights.items() if name in saved)
    trainer.optimizer.train()
    assert any(not torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())

    resumed = made()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.optimizer.eval()
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, weights[name]), name


def test_every_row_of_them_is_here() -> None:
    assert [row.name for row in ROWS if "schedule_free" in row.name] == list(NAMES)
