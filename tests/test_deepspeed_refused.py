"""Layouts of DeepSpeed that are refused: moved names, other groups of ranks, other steps."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from distopt import layout
from tests.harness.deepspeed import batch, start
from tests.harness.distributed import RankError, run


def train_unbound(stage: int) -> None:
    engine, _, _ = start("lamb", stage, {}, bind=False)
    engine.backward(engine(batch(0), 0))
    engine.step()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_without_its_layout_it_refuses(stage: int) -> None:
    """The silent alternative is a trust ratio for each flat partition, which trains, and is wrong by percents."""
    with pytest.raises(RankError, match=r"call optimizer\.bind\(layout\)"):
        run(2, train_unbound, stage)


def moved_attribute(stage: int, name: str) -> str:
    engine, _, _ = start("lamb", stage, {}, bind=False)
    zero = engine.optimizer
    value = zero.__dict__.pop(name)
    try:
        layout.deepspeed_layout(engine)
    except ValueError as error:
        return str(error)
    finally:
        zero.__dict__[name] = value
    return ""


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (2, "bit16_groups"),
        (2, "bit16_groups_flat"),
        (2, "single_partition_of_fp32_groups"),
        (2, "real_dp_process_group"),
        (3, "fp16_groups"),
        (3, "grad_position"),
        (3, "fp32_partitioned_groups_flat"),
    ],
)
def test_an_attribute_of_deepspeed_that_moves_is_named(stage: int, name: str) -> None:
    for message in run(2, moved_attribute, stage, name):
        assert f"has no {name!r} any more" in message


def bind_late(stage: int) -> str:
    engine, _, _ = start("lamb", stage, {}, bind=False)
    zero = engine.optimizer
    flats = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    if stage == 3:  # in float32 the flat partition is the weights themselves
        for p in zero.fp16_groups[0]:
            p.ds_tensor.data = p.ds_tensor.data.clone()
    flats[0].data.add_(1.0)
    try:
        layout.deepspeed_layout(engine)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_partition_that_does_not_hold_its_layers_is_refused(stage: int) -> None:
    messages = run(2, bind_late, stage)
    assert any("does not hold layer" in message for message in messages)


def among_some_ranks(stage: int) -> str:
    engine, _, _ = start("lamb", stage, {}, bind=False)
    # As with AutoTP or an mpu, which DeepSpeed keeps for the process: the other tests would have it too.
    engine.seq_data_parallel_group = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    try:
        layout.deepspeed_layout(engine)
    except ValueError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize("stage", [0, 1])
def test_a_model_that_is_sharded_in_other_ways_besides_is_refused(stage: int) -> None:
    """Norms of layers went over the data-parallel ranks, and left out the shards of all others."""
    first, second = run(2, among_some_ranks, stage)
    assert first == second
    assert "among 1 of 2 ranks, as with tensor parallelism (AutoTP), a client's mpu" in first


def other_class(stage: int) -> None:
    engine, _, optimizer = start("lamb", stage, {}, bind=False)
    zero = engine.optimizer
    zero.__class__ = type("ZenFlowZeroOptimizer", (type(zero),), {})
    optimizer.bind(layout.deepspeed_layout(engine))


@pytest.mark.parametrize("stage", [2, 3])
def test_what_steps_otherwise_is_refused(stage: int) -> None:
    """ZenFlow and SuperOffload step some of the partitions by an Adam of their own, wherever the optimizer is ours."""
    with pytest.raises(RankError, match="ZenFlowZeroOptimizer") as error:
        run(2, other_class, stage)
    assert error.value.kind == "ValueError"
