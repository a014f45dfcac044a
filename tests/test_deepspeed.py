"""DeepSpeed ZeRO: distopt's optimizers as its client optimizer, on flat partitions that cut layers anywhere."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import warnings
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import distopt
from benchmarks.collectives import Collectives
from distopt import layout
from distopt.checkpoint.deepspeed import FlatContents
from distopt.engine import DeepSpeed
from distopt.engine.train_step import update
from distopt.job.diagnostics import by_layer
from distopt.layout.names import bare_name
from distopt.optim.clip import grad_norms
from tests.harness.cells import some
from tests.harness.distributed import RankError, run
from tests.harness.engines import full
from tests.harness.optimizers import ROWS, distance, named
from tests.harness.sharded import whole

STEPS = 5
MAX_NORM = 1.0
# float32, as DeepSpeed keeps its partitions: rounding in every step, stretched where a second moment is small.
TOLERANCE = 1e-5
# Every optimizer is in `tests.test_matrix`. These: a ratio after the moments, one before them, and none.
SOME = ["lamb", "lars", "adamw"]
# stage, world, more of zero_optimization, rows
CASES: list[tuple[int, int, dict[str, Any], list[str]]] = [
    (0, 2, {}, ["lamb"]),
    (2, 1, {}, ["lamb"]),
    (3, 1, {}, ["lamb"]),
    (1, 2, {}, SOME),
    (3, 2, {"sub_group_size": 30}, SOME),  # several sub-groups, so several calls of step()
    (1, 4, {}, ["lamb"]),
    (3, 4, {}, ["lamb"]),
    # DeepSpeed 0.19.8's own map of the partitions is wrong with this; a parameter's address is right.
    (2, 2, {"round_robin_gradients": True}, ["lamb"]),
    (3, 2, {"stage3_param_persistence_threshold": 0}, ["lamb"]),
    (2, 2, {"offload_optimizer": {"device": "cpu"}}, ["lamb"]),
    (3, 2, {"offload_optimizer": {"device": "cpu"}}, ["lamb"]),
]
# Each stage, each option, and two and four ranks; `make matrix` has all.
QUICK = (0, 3, 4, 6, 7, 8, 10)
# stage, dtype of the model, more of the configuration, and the class that DeepSpeed makes of it.
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 8}}
IN_FLOAT32 = {"data_types": {"grad_accum_dtype": "fp32"}}
HALVES: list[tuple[int, torch.dtype, dict[str, Any], str]] = [
    (1, torch.bfloat16, BF16, "DeepSpeedZeroOptimizer"),
    (1, torch.bfloat16, BF16 | IN_FLOAT32, "BF16_Optimizer"),
    (2, torch.bfloat16, BF16 | IN_FLOAT32, "DeepSpeedZeroOptimizer"),
    (3, torch.bfloat16, BF16, "DeepSpeedZeroOptimizer_Stage3"),
    (3, torch.bfloat16, BF16 | IN_FLOAT32, "DeepSpeedZeroOptimizer_Stage3"),
    (1, torch.float16, FP16, "DeepSpeedZeroOptimizer"),
    (2, torch.float16, FP16, "DeepSpeedZeroOptimizer"),
    (3, torch.float16, FP16, "DeepSpeedZeroOptimizer_Stage3"),
]


def batch(step: int) -> Tensor:
    return torch.rand(8, generator=torch.Generator().manual_seed(step))


@lru_cache
def reference(name: str) -> list[Tensor]:
    """The unsharded run. Steps are multiples of 3, at which every parameter is used: DeepSpeed gives others zeros."""
    row = next(row for row in ROWS if row.name == name)
    model = whole("replicated", torch.float32)
    optimizer = row.make(row.groups([*model.parameters()]))
    for step in range(0, 3 * STEPS, 3):
        optimizer.zero_grad()
        model(batch(step), step).backward()
        distopt.clip_grad_norm_(optimizer, MAX_NORM)
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


def start(
    name: str,
    stage: int,
    zero: dict[str, Any],
    accumulation: int = 1,
    bind: bool = True,
    more: dict[str, Any] | None = None,
    init: bool = False,
    wrap: bool = False,
) -> tuple[Any, Any, Any]:
    """The engine, the model and the optimizer.

    init: cut the model up by zero.Init, before there is an optimizer. wrap: a part of it recomputes its activations.
    """
    warnings.simplefilter("ignore")  # DeepSpeed 0.19.8 uses deprecated names of torch
    logging.disable(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for a minute, and not used
    # DeepSpeed asks oneDNN, which has float16 on few CPUs; torch's own operations have it on all.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    row = next(row for row in ROWS if row.name == name)
    model = whole("replicated", torch.float32)
    if wrap:
        model.part = checkpoint_wrapper(model.part)  # type: ignore[assignment]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
        "steps_per_print": 10**9,
        **(more or {}),
    }
    if init:
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
    optimizer = row.make(row.groups([*model.parameters()]))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if bind:
        optimizer.bind(layout.deepspeed_layout(engine))
    return engine, model, optimizer


def weights(model: nn.Module, stage: int) -> list[Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    trained = [p for p in model.parameters() if p.requires_grad]
    return [(safe_get_full_fp32_param(p) if stage == 3 else p).detach().clone() for p in trained]


def train(names: list[str], stage: int, zero: dict[str, Any], accumulation: int) -> dict[str, list[Tensor]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}
    for name in names:
        engine, model, _ = start(name, stage, zero, accumulation)
        for step in range(0, 3 * STEPS, 3):
            for part in batch(step).chunk(world)[rank].chunk(accumulation):
                engine.backward(engine(part, step))
                engine.step()
        results[name] = weights(model, stage)
        engine.destroy()
    return results


@pytest.mark.parametrize(("stage", "world", "zero", "names"), some([CASES[i] for i in QUICK], CASES), ids=str)
def test_the_update_is_the_unsharded_one(stage: int, world: int, zero: dict[str, Any], names: list[str]) -> None:
    """LAMB under DeepSpeed was silently wrong for years: a trust ratio for each flat partition (DeepSpeed#490)."""
    for result in run(world, train, names, stage, zero, 1):
        for name in names:
            assert distance(result[name], reference(name)) < TOLERANCE, name


@pytest.mark.parametrize("stage", some([2, 3], [1, 2, 3]))
def test_accumulation(stage: int) -> None:
    for result in run(2, train, ["lamb"], stage, {}, 2):
        assert distance(result["lamb"], reference("lamb")) < TOLERANCE


def train_after_init(stage: int) -> list[Tensor]:
    return trained(stage, torch.float32, {}, init=True)[0]


def trained(stage: int, dtype: torch.dtype, more: dict[str, Any], init: bool = False) -> tuple[list[Tensor], str]:
    """What LAMB makes of the weights, as the optimizer steps them, and who holds them."""
    from deepspeed.utils import safe_get_full_fp32_param

    engine, model, _ = start("lamb", stage, {}, more=more, init=init)
    for step in range(0, 3 * STEPS, 3):
        engine.backward(engine(batch(step).to(dtype).chunk(dist.get_world_size())[dist.get_rank()], step))
        engine.step()
        assert engine.was_step_applied()
    masters = [safe_get_full_fp32_param(p).detach().clone() for p in model.parameters() if p.requires_grad]
    wrapper = type(engine.optimizer).__name__
    engine.destroy()
    return masters, wrapper


@lru_cache
def reference_of_halves(dtype: torch.dtype) -> list[Tensor]:
    """The unsharded run with float32 masters, and the gradients of two ranks' copies in `dtype`, added as such."""
    row = named("lamb")
    model = whole("replicated", torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.to(dtype))
    optimizer = row.make(row.groups([*model.parameters()]))
    for step in range(0, 3 * STEPS, 3):
        optimizer.zero_grad()
        copies = [copy.deepcopy(model).to(dtype) for _ in range(2)]
        for part, computing in zip(batch(step).to(dtype).chunk(2), copies):
            computing(part, step).backward()
        for p, *mine in zip(model.parameters(), *(computing.parameters() for computing in copies)):
            if p.requires_grad:
                p.grad = sum(q.grad / 2 for q in mine).float()
        distopt.clip_grad_norm_(optimizer, MAX_NORM)
        optimizer.step()
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("stage", "dtype", "more", "wrapper"), some([HALVES[i] for i in (1, 3, 6, 7)], HALVES), ids=str
)
def test_models_of_16_bits_are_stepped_by_float32_masters(
    stage: int, dtype: torch.dtype, more: dict[str, Any], wrapper: str
) -> None:
    """DeepSpeed sends gradients in the model's dtype, also where it accumulates them in float32."""
    for masters, holder in run(2, trained, stage, dtype, more):
        assert holder == wrapper
        assert distance(masters, reference_of_halves(dtype)) < TOLERANCE


@pytest.mark.parametrize("more", [BF16, FP16], ids=str)
def test_stage_0_of_16_bits_is_refused(more: dict[str, Any]) -> None:
    """DeepSpeed 0.19.8 steps once by itself there, with gradients of zeros: the state would be a step ahead."""
    with pytest.raises(RankError, match="DeepSpeed at stage 0 in 16 bits") as error:
        run(2, trained, 0, torch.bfloat16 if more == BF16 else torch.float16, more)
    assert error.value.kind == "ValueError"


def test_a_model_that_zero_init_has_sharded() -> None:
    for params in run(2, train_after_init, 3):
        assert distance(params, reference("lamb")) < TOLERANCE


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


def norms_of_partitions(stage: int) -> list[float]:
    _, _, optimizer = start("adamw", stage, {})
    flats = list(optimizer.layout.segments)
    shards = [s for flat in flats for s in optimizer.layout.split(flat, flat.detach())]
    (norms,) = optimizer.layout.norms(optimizer.layout.layers(flats), shards)
    return sorted(norms.tolist())


@pytest.mark.parametrize(("stage", "world"), some([(1, 4), (2, 2), (3, 4)], itertools.product([1, 2, 3], [2, 4])))
def test_norms_of_full_parameters(stage: int, world: int) -> None:
    params = [p for p in whole("replicated", torch.float32).parameters() if p.requires_grad]
    expected = sorted(math.sqrt(p.detach().double().square().sum().item()) for p in params)
    for norms in run(world, norms_of_partitions, stage):
        assert norms == pytest.approx(expected, rel=1e-6)


def collectives_of_steps(stage: int, zero: dict[str, Any], all_trust: bool) -> tuple[list[int], int]:
    """How often the optimizer itself communicates in each of two training steps; how often it is called in one."""
    engine, _, optimizer = start("lamb", stage, zero)
    for group in optimizer.param_groups:
        group["trust_ratio"] = group["trust_ratio"] or all_trust
    distopt.prove_every(optimizer, steps=0)
    counts: list[int] = []
    own = optimizer.step

    def step() -> None:
        with Collectives() as mode:
            own()
        counts.append(len(mode.seen))

    optimizer.step = step
    totals = []
    for number in (0, 3):
        before = len(counts)
        engine.backward(engine(batch(number), number))
        engine.step()
        totals.append(sum(counts[before:]))
    engine.destroy()
    return totals, len(counts) // 2


@pytest.mark.parametrize(
    ("stage", "zero", "all_trust", "calls", "expected"),
    [
        (0, {}, True, 1, 0),
        (1, {}, False, 2, 1),  # as `param_groups` makes them: biases and norms have no trust ratio
        (2, {}, True, 2, 2),
        (3, {}, False, 2, 1),
        (3, {"sub_group_size": 30}, False, 3, 2),
    ],
)
def test_norms_are_asked_for_once_in_each_call_that_has_trust_ratios(
    stage: int, zero: dict[str, Any], all_trust: bool, calls: int, expected: int
) -> None:
    """DeepSpeed calls `step` once for each param group, or sub-group, and frees its gradients after that. In stage 3
    the others are there, without params: they were asked for norms too, in every call."""
    assert run(2, collectives_of_steps, stage, zero, all_trust) == [([expected] * 2, calls)] * 2


def in_a_step(stage: int, zero: dict[str, Any]) -> tuple[dict[str, float], list[str], set[str]]:
    """The trust ratios of the second step, what is said of clipping before it, and the names of a checkpoint."""
    engine, model, optimizer = start("lamb", stage, zero, wrap=True)
    engine.module.eval()  # without recomputing activations, which asks for inputs that have a gradient
    said = []
    for step in (0, 3):
        engine.backward(engine(batch(step).chunk(dist.get_world_size())[dist.get_rank()], step))
        if step:
            for use in (distopt.clip_grad_norm_, grad_norms):
                for named_optimizer in (optimizer, engine.optimizer):
                    with pytest.raises(ValueError) as error:
                        use(named_optimizer)
                    said.append(str(error.value))
        engine.step()
    ratios = {bare_name(model, n): optimizer.trust_ratios().get(p) for n, p in model.named_parameters()}
    assert set(by_layer(model, optimizer)) <= {"trust_ratio"}
    contents = FlatContents(engine, optimizer, optimizer.layout)
    engine.destroy()
    names = {*contents.tensors, *contents.state, *(name for group in contents.groups for name in group["params"])}
    return {name: float(ratio) for name, ratio in ratios.items() if ratio is not None}, said, names


@pytest.mark.parametrize(("stage", "zero"), [(1, {}), (3, {"sub_group_size": 30})])
def test_a_step_of_several_calls_is_one_step(stage: int, zero: dict[str, Any]) -> None:
    """Trust ratios were those of the last call alone; gradients, which are there within a call only, had the norm 0;
    the parameters of a part that recomputes its activations had other names."""
    model = whole("replicated", torch.float32)
    row = named("lamb")
    optimizer = row.make(row.groups([*model.parameters()]))
    for step in (0, 3):
        optimizer.zero_grad()
        model(batch(step), step).backward()
        distopt.clip_grad_norm_(optimizer, MAX_NORM)
        optimizer.step()
    ratios = optimizer.trust_ratios()
    expected = {name: float(ratios[p]) for name, p in model.named_parameters() if p in ratios}
    assert len(expected) > 3
    results = run(2, in_a_step, stage, zero)
    assert {name: ratio for found, *_ in results for name, ratio in found.items()} == pytest.approx(expected, rel=1e-4)
    for _, said, names in results:
        assert len(said) == 4
        assert all("set gradient_clipping in DeepSpeed's configuration" in line for line in said)
        assert names == set(model.state_dict())


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


def step_without(stage: int, offload: bool) -> list[float]:
    """How far `seldom` moves in a step that uses it and in two that do not, by an optimizer without state."""
    engine = DeepSpeed(stage, offload=offload)
    toy: Any = whole("replicated", torch.float32)
    model = engine.build(toy, [toy.part], lambda unit, device: None, torch.device("cpu"))
    optimizer = distopt.SGD(model.parameters(), lr=0.1)
    model = engine.attach(model, optimizer, 1, math.inf)
    moved = []
    for step in range(3):
        before = full(model)
        update(engine, model, optimizer, [batch(step)], loss=lambda model, samples, _: model(samples, step))  # noqa: B023
        after = full(model)
        moved.append(sum((after[name] - before[name]).norm().item() for name in after if "seldom" in name))
    return moved


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_parameter_that_a_step_does_not_use_stays(stage: int, offload: bool) -> None:
    """Stage 3 of DeepSpeed 0.19.8 keeps its gradient of the last step that used it, and steps with that again."""
    for used, *unused in run(2, step_without, stage, offload):
        assert used > 0.1
        assert unused == [0.0, 0.0]
