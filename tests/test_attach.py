"""`distopt.attach` in real Accelerate scripts: DDP, ZeRO-1, FSDP2, DeepSpeed, and what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import os
import pickle
import warnings
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import distopt
from distopt import layout
from tests.harness import jobs
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import distance, named
from tests.harness.sharded import full, mesh, whole

ACCUMULATION = 2
MAX_NORM = 1.0
STEPS = 6  # saved after the first half
# float64: ranks and micro-batches add the same numbers in another order, nothing else differs.
TOLERANCE = 1e-12
# float32, as DeepSpeed keeps its partitions; as in test_deepspeed.
TOLERANCE_DEEPSPEED = 1e-5


def start(**kwargs: Any) -> Any:
    """An Accelerator as in a script's first line; the processes of the pool have had others before."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))  # as torchrun does
    return Accelerator(**{"cpu": True, "gradient_accumulation_steps": ACCUMULATION} | kwargs)


def start_fsdp(reshard: bool = True, version: int = 2, mixed_precision: str = "no") -> Any:
    """FSDP on the CPU. Accelerate 1.15 has it for accelerators only, and drops it silently; this is all that lacks."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    accelerator = start(mixed_precision=mixed_precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, reshard_after_forward=reshard, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    for state in (accelerator.state.__dict__, PartialState._shared_state):
        state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    return accelerator


def start_deepspeed(stage: int, clipping: float | str = MAX_NORM, **zero: Any) -> Any:
    warnings.simplefilter("ignore")  # DeepSpeed 0.19.8 uses deprecated names of torch
    logging.disable(logging.WARNING)
    import deepspeed.ops
    from accelerate import DeepSpeedPlugin, InitProcessGroupKwargs

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for a minute, and not used
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": clipping,
        "zero_optimization": {"stage": stage, **zero},
        "steps_per_print": 10**9,
    }
    os.environ.pop("ACCELERATE_USE_CPU", None)  # of a test of the Trainer in the same process
    before = dict(os.environ)
    try:
        gloo = InitProcessGroupKwargs(backend="gloo")  # without, Accelerate runs a single process on each rank
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        return start(cpu=False, kwargs_handlers=[gloo], deepspeed_plugin=plugin)
    finally:
        os.environ.clear()
        os.environ.update(before)


def lamb(model: nn.Module) -> distopt.ShardedOptimizer:
    row = named("lamb")
    return row.make(row.groups([*model.parameters()]))


def prepared(accelerator: Any, zero: int | None, sam: bool = False) -> tuple[nn.Module, Any, Any]:
    """The model, the optimizer and the schedule of a script, attached."""
    model = whole("replicated")
    inner = lamb(model)
    schedule = distopt.warmup_cosine(inner, warmup_steps=2, total_steps=STEPS)
    model, optimizer = accelerator.prepare(model, distopt.SAM(inner) if sam else inner)
    accelerator.register_for_checkpointing(schedule)
    distopt.attach(accelerator, model, optimizer, zero_stage=zero)
    return model, optimizer, schedule


def batch(step: int) -> Tensor:
    return torch.rand(8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train(accelerator: Any, model: nn.Module, optimizer: Any, schedule: Any, steps: range) -> None:
    """The loop of any Accelerate script. At multiples of 3 every parameter is used, as DDP wants it."""
    rank, world = accelerator.process_index, accelerator.num_processes
    for step in steps:
        for part in batch(3 * step).chunk(ACCUMULATION):
            with accelerator.accumulate(model):
                accelerator.backward(model(part.chunk(world)[rank], 3 * step))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    schedule.step()


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


@lru_cache
def reference() -> list[Tensor]:
    """The unbroken, unsharded run."""
    model = whole("replicated")
    optimizer = lamb(model)
    schedule = distopt.warmup_cosine(optimizer, warmup_steps=2, total_steps=STEPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(3 * step), 3 * step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
    return [p.detach() for p in model.parameters()]


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
    """A script's own hook of DDP and a loss scaler need whole ones; a sum of exchanged gradients does not.
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


def save(folder: Path, zero: int) -> list[Tensor]:
    accelerator = start()
    script = prepared(accelerator, zero)
    train(accelerator, *script, range(STEPS // 2))
    accelerator.save_state(str(folder))
    train(accelerator, *script, range(STEPS // 2, STEPS))
    accelerator.save_state(str(folder.parent / "later"))
    return full(script[0])


def load(folder: Path, zero: int) -> tuple[list[Tensor], int]:
    accelerator = start()
    script = prepared(accelerator, zero)
    train(accelerator, *script, range(1))  # what was there before makes no difference
    accelerator.load_state(str(folder))
    step = accelerator.step
    train(accelerator, *script, range(STEPS // 2, STEPS))
    return full(script[0]), step


@pytest.mark.parametrize("saved", [0, 1])
def test_a_saved_run_goes_on_at_another_world_size_and_stage(tmp_path: Path, saved: int) -> None:
    """Accelerate keeps rank 0's shards: a run under ZeRO-1 went on from zeros for all other rows, off by 6e-2."""
    folder = tmp_path / "state"
    for params in run(2, save, folder, saved):
        assert distance(params, reference()) < TOLERANCE
    for world, zero in [(1, saved), (2, saved), (4, saved), (4, 1 - saved), (1, 1 - saved)]:
        for params, step in run(world, load, folder, zero):
            assert distance(params, reference()) < TOLERANCE, (world, zero)
            assert step == ACCUMULATION * STEPS // 2  # on ranks too that were not there
    # Nothing of the model and nothing of the optimizer's state stands there a second time.
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert not [name for name in files if name.startswith(("model", "pytorch_model"))]
    assert torch.load(folder / "optimizer.bin") == {"distopt": "the state is in the folder distopt"}
    assert json.loads((folder / "distopt" / "manifest.json").read_text())["optimizer"] == "LAMB"


def free_and_save(folder: Path) -> bool:
    """Another model after free_memory, as where a batch size is searched for; whether the first one is gone."""
    accelerator = start()
    first = prepared(accelerator, 1)
    train(accelerator, *first, range(1))
    accelerator.save_state(str(folder))
    gone = weakref.ref(next(first[0].parameters()))
    del first
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    gc.collect()
    second = prepared(accelerator, 1)
    accelerator.step = 0
    train(accelerator, *second, range(STEPS // 2))
    accelerator.save_state(str(folder))
    accelerator.load_state(str(folder))
    return gone() is None


def test_after_free_memory_the_next_model_is_saved(tmp_path: Path) -> None:
    assert all(run(2, free_and_save, tmp_path / "state"))
    for params, _ in run(2, load, tmp_path / "state", 1):
        assert distance(params, reference()) < TOLERANCE


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


def state_dicts() -> tuple[list[str], set[str]]:
    """The errors of pickling, and what can still be done with the state dict."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    accelerator = start()
    model, optimizer, schedule = prepared(accelerator, 1)
    train(accelerator, model, optimizer, schedule, range(1))
    errors = []
    for write in (
        lambda state: torch.save(state, io.BytesIO()),
        lambda state: torch.save({"optimizer": state}, io.BytesIO()),
        pickle.dumps,
    ):
        for state in (optimizer.state_dict(), optimizer.optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())):
            with pytest.raises(ValueError) as error:
                write(state)
            errors.append(str(error.value))
    before = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(before))
    for key, buffers in optimizer.state_dict()["state"].items():
        assert torch.equal(buffers["exp_avg"].to_local(), before["state"][key]["exp_avg"].to_local())
    return errors, set(get_optimizer_state_dict(model, optimizer.optimizer)["state"])


def test_a_file_of_one_ranks_shards_is_refused() -> None:
    names = {name for name, p in whole("replicated").named_parameters() if p.requires_grad}
    for errors, saved in run(2, state_dicts):
        assert len(errors) == 9
        assert all("cut up over the processes" in error and "save_state" in error for error in errors)
        assert saved == names


# What a script does wrong, and what it is told.


def ask(zero: Any) -> None:
    prepared(start(), zero)


def ask_fsdp2(zero: Any, reshard: bool) -> None:
    prepared(start_fsdp(reshard), zero)


def fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    warnings.simplefilter("ignore")  # FSDP1 is deprecated
    accelerator = start()
    model = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    distopt.attach(accelerator, *accelerator.prepare(model, distopt.LAMB(model.parameters())))


def single_processes() -> None:
    rank = os.environ.pop("LOCAL_RANK")
    world = os.environ.pop("WORLD_SIZE")
    try:
        prepared(start(), None)
    finally:
        os.environ.update(LOCAL_RANK=rank, WORLD_SIZE=world)


def torch_optimizer() -> None:
    accelerator, model = start(), nn.Linear(4, 4)
    distopt.attach(accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters())), zero_stage=1)


def other_parameters() -> None:
    accelerator, model = start(), nn.Linear(4, 4)
    distopt.attach(accelerator, *accelerator.prepare(model, lamb(nn.Linear(4, 4))))


def unprepared() -> None:
    model = nn.Linear(4, 4)
    distopt.attach(start(), model, lamb(model))


def twice() -> None:
    accelerator = start()
    model, optimizer, _ = prepared(accelerator, 1)
    distopt.attach(accelerator, model, optimizer, zero_stage=1)


def inside() -> None:
    accelerator, model = start(), nn.Linear(4, 4)
    _, optimizer = accelerator.prepare(model, lamb(model))
    distopt.attach(accelerator, model, optimizer)


def stepped(zero: int) -> tuple[list[Tensor], bool]:
    """The weights after a step before `prepare` and one after `attach`, and whether the state is sharded."""
    accelerator = start()
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    inner = lamb(model)
    model(torch.ones(1, 4)).sum().backward()
    inner.step()
    inner.zero_grad()
    model, optimizer = accelerator.prepare(model, inner)
    distopt.attach(accelerator, model, optimizer, zero_stage=zero)
    accelerator.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    (state, *_) = inner.state.values()
    return [p.detach() for p in model.parameters()], hasattr(state["exp_avg"], "placements")


def stepped_fsdp2() -> None:
    accelerator, model = start_fsdp(), nn.Linear(4, 4)
    optimizer = lamb(model)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    distopt.attach(accelerator, *accelerator.prepare(model, optimizer))


def two_models() -> None:
    accelerator, model = start(), nn.Linear(4, 4)
    model, _, optimizer = accelerator.prepare(model, nn.Linear(4, 4), lamb(model))
    distopt.attach(accelerator, model, optimizer)


def another_model_later() -> None:
    accelerator = start()
    prepared(accelerator, 1)
    accelerator.prepare(nn.Linear(4, 4))
    accelerator.save_state("never")


def save_in_mid_step() -> None:
    accelerator = start()
    model, _, _ = prepared(accelerator, 1)
    with accelerator.accumulate(model):
        accelerator.backward(model(batch(0), 0))
        accelerator.save_state("never")


REFUSED: list[tuple[Callable[..., None], tuple[Any, ...], str]] = [
    (ask, (3,), r"zero_stage=3 was asked, Accelerate prepared DDP: .* silently drops"),
    (ask, (2,), r"zero_stage=2 was asked, Accelerate prepared DDP"),
    (ask, (4,), r"zero must be None, 0, 1, 2 or 3, got 4"),
    (ask, (True,), r"got True"),
    (ask_fsdp2, (1, True), r"zero_stage=1 was asked, Accelerate prepared FSDP2 .* zero_stage=3"),
    (ask_fsdp2, (2, True), r"reshard_after_forward=True"),
    (ask_fsdp2, (3, False), r"reshard_after_forward=False"),
    (fsdp1, (), r"FSDP1.*fsdp_version=2"),
    (single_processes, (), r"2 processes were launched, Accelerate runs 1"),
    (torch_optimizer, (), r"zero_stage=1 needs an optimizer of distopt, got AdamW"),
    (other_parameters, (), r"2 of the 2 parameters of the optimizer are not the model's"),
    (unprepared, (), r"after accelerator\.prepare"),
    (twice, (), r"call attach once"),
    (inside, (), r"Linear on 2 processes"),
    (stepped_fsdp2, (), r"has stepped before accelerator\.prepare"),
    (two_models, (), r"2 models and 1 optimizers"),
    (another_model_later, (), r"2 models and 1 optimizers"),
    (save_in_mid_step, (), r"between the micro-batches"),
]


@pytest.mark.parametrize(("script", "args", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_refused(script: Callable[..., None], args: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=message) as error:
        run(2, in_folder, tmp_path, script, args)
    assert error.value.kind == "ValueError"
    assert "\n" not in error.value.message


def in_folder(folder: Path, script: Callable[..., None], args: tuple[Any, ...]) -> None:
    before = os.getcwd()
    os.chdir(folder)
    try:
        script(*args)
    finally:
        os.chdir(before)


def test_state_that_is_whole_may_be_there_already() -> None:
    """Under zero_stage=1 each process keeps its part of it."""
    (whole, sharded), (other, cut) = (run(2, stepped, zero)[0] for zero in (0, 1))
    assert (sharded, cut) == (False, True)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(whole, other, strict=True))


def sharded_by_hand() -> None:
    """At two processes DDP refuses it."""
    from torch.distributed.fsdp import fully_shard

    rank = os.environ.pop("LOCAL_RANK")
    try:
        accelerator = start()
        model = fully_shard(nn.Linear(4, 4))
        distopt.attach(accelerator, *accelerator.prepare(model, lamb(model)))
    finally:
        os.environ.update(LOCAL_RANK=rank)


def test_a_model_that_was_sharded_by_hand_is_refused() -> None:
    with pytest.raises(RankError, match="sharded by hand"):
        run(1, sharded_by_hand)


def save_without_attach(folder: Path) -> None:
    accelerator = start()
    model = whole("replicated")
    accelerator.prepare(model, lamb(model))
    accelerator.save_state(str(folder))


def test_a_folder_saved_without_attach_is_refused(tmp_path: Path) -> None:
    run(2, save_without_attach, tmp_path)
    with pytest.raises(RankError, match=r"was saved without distopt\.attach") as error:
        run(2, load, tmp_path, 1)
    assert error.value.kind == "ValueError"


def schedule_warnings(split_batches: bool) -> tuple[list[str], int]:
    from accelerate import DataLoaderConfiguration

    accelerator = start(dataloader_config=DataLoaderConfiguration(split_batches=split_batches))
    model = whole("replicated")
    inner = lamb(model)
    model, optimizer, schedule = accelerator.prepare(
        model, inner, distopt.warmup_cosine(inner, warmup_steps=2, total_steps=STEPS)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        distopt.attach(accelerator, model, optimizer)
    with accelerator.accumulate(model), accelerator.accumulate(model):
        accelerator.backward(model(batch(0), 0))
        optimizer.step()
        schedule.step()
    return [f"{w.category.__name__}: {w.message}" for w in caught], schedule.scheduler.last_epoch


def test_a_schedule_that_steps_once_per_process_is_warned_of() -> None:
    for messages, steps in run(2, schedule_warnings, False):
        assert [message[:54] for message in messages] == ["UserWarning: the scheduler was prepared, so Accelerate"]
        assert "steps it 2 times" in messages[0]
        assert steps == 2
    assert run(2, schedule_warnings, True) == [([], 1)] * 2
    assert run(1, schedule_warnings, False) == [([], 1)]


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
def test_what_deepspeed_saved_goes_on_bit_for_bit_or_is_refused(stage: int, tmp_path: Path) -> None:
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
    for (norms, params), (expected, reference) in zip(run(2, clipped_by_us, 1), run(2, clipped_by_us, 0)):
        assert norms == pytest.approx(expected, rel=1e-12)
        assert distance(params, reference) < TOLERANCE


def refused_deepspeed() -> list[str]:
    """Another stage asked; SAM; offload, for which Accelerate puts DeepSpeed's own Adam in place of ours."""
    messages = []
    for wrap, zero, offload in ((None, 3, False), (distopt.SAM, 2, False), (None, 2, True)):
        accelerator = start_deepspeed(2, **({"offload_optimizer": {"device": "cpu"}} if offload else {}))
        import deepspeed.ops.adam

        class DeepSpeedCPUAdam(torch.optim.Adam):  # the real one is compiled, for minutes
            def __init__(self, params: Any, adamw_mode: bool, **kwargs: Any) -> None:
                super().__init__(params, **kwargs)

        real = deepspeed.ops.adam.DeepSpeedCPUAdam
        deepspeed.ops.adam.DeepSpeedCPUAdam = DeepSpeedCPUAdam
        model = whole("replicated", torch.float32)
        optimizer = lamb(model) if wrap is None else wrap(lamb(model))
        try:
            distopt.attach(accelerator, *accelerator.prepare(model, optimizer), zero_stage=zero)
        except ValueError as error:
            messages.append(str(error))
        finally:
            deepspeed.ops.adam.DeepSpeedCPUAdam = real
    return messages


def test_refused_with_deepspeed() -> None:
    for messages in run(2, refused_deepspeed):
        stage, sam, offload = messages
        assert "zero_stage=3 was asked, Accelerate prepared DeepSpeed at stage 2" in stage
        assert "SAM cannot see" in sam
        assert "DeepSpeed steps DeepSpeedCPUAdam" in offload and "zero_force_ds_cpu_optimizer=false" in offload
