"""The optimizer on the host: the same bits as on the device, wherever weights are changed in between, and its bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.engine import FSDP2, Zero1
from distopt.engine.train_step import update
from distopt.layout.bucketed import HostBucketLayout
from distopt.layout.infer import _wire
from distopt.models.language_model import LanguageModel
from distopt.plan.cost import GIB
from distopt.plan.plan import format_plan
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, ENGINES, batch, full, made
from tests.harness.language_models import Settings, train
from tests.test_buckets import several_buckets
from tests.test_plan import plan_of

LANGUAGE_MODEL = LanguageModel("llama", CONFIGS["llama"])
SETTINGS = {
    "LAMB": Settings(optimizer="LAMB", micro_batches=2),
    "SAM": Settings(sam="SAM", optimizer="LAMB"),
    "ASAM": Settings(sam="ASAM"),
    "bf16": Settings(optimizer="LAMB", precision="bf16"),
    "bf16 weights": Settings(optimizer="LAMB", precision="bf16", engine={"param_dtype": "bf16"}),
    "late": Settings(optimizer="LAMB", engine={"overlap_gather": True}),
}
CELLS = [
    (kind, world, name)
    for kind, worlds in {"zero1": (1, 2, 3), "fsdp2": (1, 2, 3), "zero2": (2,), "hsdp": (2, 4)}.items()
    for world in worlds
    for name in SETTINGS
    if kind == "zero1" or not SETTINGS[name].engine
]
QUICK = [("zero1", 1, "LAMB"), ("zero1", 3, "bf16 weights"), ("zero1", 2, "SAM"), ("fsdp2", 2, "LAMB")]


def trained(kind: str, settings: Settings, offload: bool) -> tuple[list[float], list[float], dict[str, Tensor]]:
    with several_buckets():
        result = train(kind, "llama", replace(settings, engine={**settings.engine, "offload": offload}))
    return result.losses, result.norms, result.params


@pytest.mark.parametrize(("kind", "world", "name"), some(QUICK, CELLS))
def test_training_is_bit_for_bit_that_without_offload(kind: str, world: int, name: str) -> None:
    here, there = (run(world, trained, kind, SETTINGS[name], offload)[0] for offload in (False, True))
    assert here[:2] == there[:2]
    assert all(torch.equal(here[2][name], there[2][name]) for name in here[2])


# What a program does to the weights between steps.


def changed(model: nn.Module, step: int) -> None:
    if step == 1:
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)  # type: ignore[union-attr, operator]
    if step == 2:
        model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()})


def changed_and_resumed(kind: str, offload: bool, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Four steps with changes from outside; a checkpoint after the second, from which the last two go on."""
    losses = []
    with several_buckets():
        for first, last in ((0, 3), (3, 5)):
            engine = ENGINES[kind](precision="fp32", offload=offload)
            model = made(LANGUAGE_MODEL, engine)
            optimizer = distopt.AdamW(distopt.param_groups(model), lr=1e-2)
            engine.attach(model, optimizer, 1, 1.0)
            if first:
                distopt.load_checkpoint(folder, model, optimizer)
            for step in range(first, last):
                changed(model, step)
                losses.append(float(update(engine, model, optimizer, [batch(step)], 1.0).loss))
            if not first:
                distopt.save_checkpoint(folder, engine.unwrap(model), optimizer)
    return losses, full(engine.unwrap(model))


@pytest.mark.parametrize("kind", ["zero1", pytest.param("fsdp2", marks=pytest.mark.matrix)])
def test_weights_that_a_program_changes_are_those_that_are_updated(kind: str, tmp_path: Path) -> None:
    here, there = (run(2, changed_and_resumed, kind, off, tmp_path / str(off))[0] for off in (False, True))
    assert here[0] == there[0]
    assert all(torch.equal(here[1][name], there[1][name]) for name in here[1])


def test_a_checkpoint_without_offload_is_resumed_with_it_by_fewer_ranks(tmp_path: Path) -> None:
    run(2, changed_and_resumed, "zero1", False, tmp_path / "saved")
    assert run(1, resumed, tmp_path / "saved", True) == run(1, resumed, tmp_path / "saved", False)


def resumed(folder: Path, offload: bool) -> float:
    engine = Zero1("fp32", offload=offload)
    model = made(LANGUAGE_MODEL, engine)
    optimizer = distopt.AdamW(distopt.param_groups(model), lr=1e-2)
    engine.attach(model, optimizer, 1, 1.0)
    distopt.load_checkpoint(folder, model, optimizer)
    for step in (3, 4):
        done = update(engine, model, optimizer, [batch(step)], 1.0)
    return float(done.loss)


def views() -> tuple[bool, bool]:
    engine = Zero1("fp32", offload=True)
    model = made(LANGUAGE_MODEL, engine)
    optimizer = distopt.AdamW(model.parameters(), lr=1e-2)
    engine.attach(model, optimizer, 1, 1.0)
    update(engine, model, optimizer, [batch(0)], 1.0)
    layout, (p, *_) = optimizer.layout, model.parameters()
    assert isinstance(layout, HostBucketLayout)
    (weights,), (grads,) = layout.weights([p]), layout.grads([p])
    hosts = [bucket.host for bucket in layout.buckets]
    within = lambda t, name: any(  # noqa: E731
        t.untyped_storage().data_ptr() == getattr(host, name).untyped_storage().data_ptr() for host in hosts
    )
    return within(weights, "weights"), within(grads, "grads")


def test_the_optimizer_sees_the_copies_of_the_host() -> None:
    assert run(1, views) == [(True, True)]


# Where collectives are, and what is kept where.


def test_shards_on_the_host_communicate_from_the_device_of_their_mesh() -> None:
    shard: Any = SimpleNamespace(device_mesh=SimpleNamespace(device_type="cuda"))
    assert _wire([shard], torch.device("cpu")) == torch.device("cuda")
    assert _wire([shard], torch.device("cuda", 0)) is None
    assert _wire([torch.zeros(1)], torch.device("cpu")) is None


@pytest.mark.parametrize("engine", ["zero1", "fsdp2", "deepspeed_zero2"])
def test_the_plan_has_the_state_on_the_host(engine: str) -> None:
    here, there = plan_of(f"engine={engine}"), plan_of(f"engine={engine}", "engine.offload=true")
    assert there.peak < here.peak
    assert there.footprint.state == 0
    state = here.footprint.state
    assert state < there.footprint.host <= state + here.footprint.parameters + here.footprint.gradients
    assert f"on the host, per process{there.footprint.host / GIB:16.2f}" in format_plan(there)
    assert there.stages[2].compute > here.stages[2].compute


@pytest.mark.parametrize("make", [Zero1, FSDP2])
def test_an_offload_that_is_no_switch_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"engine\.offload"):
        make("fp32", offload="cpu")
