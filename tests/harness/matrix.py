"""The equivalence matrix: every optimizer on every engine, against the unsharded run that each has to equal."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt.engine.train_step import update
from tests.harness.distributed import run
from tests.harness.engines import CPU, DEEPSPEED, ENGINES, full
from tests.harness.optimizers import ROWS, distance, named
from tests.harness.sharded import Toy, whole

STEPS, FEW = 20, 8  # `seldom` is used first at the third of them, so that its state starts later
BATCH = 24  # divides into equal micro-batches for 1 to 4 ranks, so that the mean of their means is the mean
MAX_NORM = 14.0  # gradients start at 17 and go down: some steps are clipped, others are not
RHO = 0.5  # of SAM: large enough to show in LAMB, whose trust ratio hides most of it
SAM_OVER = {f"sam_{name}": name for name in ("sgd", "adamw", "lamb")}
DEFAULTS = ("adamw_defaults", "lamb_defaults")
NAMES = [*(row.name for row in ROWS), *DEFAULTS, *SAM_OVER]
DTYPES = {"fp32": torch.float32, "float64": torch.float64, "bf16": torch.float32}  # of parameters and state
# float32: the order of sums is all that may differ, 6e-8 of a gradient; 20 steps carry it on, and a division by the
# root of a small square stretches it. bf16: the same, until a number of a pass is rounded the other way (by 4e-3), as
# in few runs: schedule-free SGD's embedding was off by 2e-4 after that step, by 7e-4 at the end, on fsdp2 and zero2.
# So bf16 is wrong if it is so on other batches too.
TOLERANCE = {"fp32": 1e-5, "float64": 1e-10, "bf16": 1e-4}
SOME = ("adamw", "lamb", "lars", "sam_lamb")
# Engine and optimizer that may be; every other is a promise. One step size for all layers and several calls of step(),
# or a state of each layer where a flat partition has one for many.
REFUSED = frozenset(
    (engine, name) for engine in DEEPSPEED for name in ("prodigy", "dadapt_adam", "dadapt_sgd", "adafactor")
)
_OTHERS = [name for name in NAMES if name not in SOME]
# So many that a call of all ranks ends in the time that it has.
PARTS = {"some": SOME, **{f"others_{i}": tuple(_OTHERS[i::3]) for i in range(3)}}


class Model(Toy):
    """`Toy`, with more of its loss from a product of matrices: all that autocast rounds."""

    def forward(self, samples: Tensor, step: int) -> Tensor:
        return super().forward(samples, step) + self.head(self.embedding.weight).square().mean()


@dataclass(frozen=True)
class Job:
    """What some optimizers do in turn, in one process for each rank."""

    engine: str
    world: int
    dtype: str
    accumulation: int
    part: str
    steps: int = STEPS
    draw: int = 0  # of the batches

    def __str__(self) -> str:
        name = "-".join(map(str, (self.engine, self.world, self.dtype, self.accumulation, self.part)))
        return name if self.steps == STEPS else f"{name}-{self.steps} steps"

    @property
    def names(self) -> tuple[str, ...]:
        return PARTS[self.part]

    @property
    def quick(self) -> bool:
        """Whether `make test` has a few steps of it: each engine with some optimizers, one with all, the rest once."""
        setting = (self.world, self.dtype, self.accumulation)
        more = {
            "zero1": {(3, "fp32", 1), (2, "bf16", 2)},
            "fsdp2": {(4, "float64", 2), (2, "bf16", 2)},
            "deepspeed_zero1": {(2, "bf16", 1)},
            "deepspeed_zero3": {(3, "fp32", 1)},
        }
        if self.part != "some":
            return setting == (2, "fp32", 2) and self.engine == "zero1"
        return setting == (2, "fp32", 2) or setting in more.get(self.engine, ())

    @property
    def casts(self) -> bool:
        """Whether the model is a bfloat16 copy; under autocast only its matrix products are in bfloat16."""
        return self.dtype == "bf16" and self.engine not in ("ddp", "zero1")

    @property
    def inputs(self) -> torch.dtype:
        return torch.bfloat16 if self.casts else DTYPES[self.dtype]

    def differences(self) -> dict[str, float | str]:
        """The largest relative difference of a tensor on any rank, or why the optimizer is refused there."""
        results = run(self.world, train, self)
        answers: dict[str, float | str] = {}
        for name in self.names:
            on_ranks = [result[name] for result in results]
            reasons = {answer for answer in on_ranks if isinstance(answer, str)}
            if reasons:
                assert all(answer in reasons for answer in on_ranks), f"{name} is refused by some ranks only"
                answers[name] = reasons.pop()
            else:
                expected = self.unsharded(name)
                answers[name] = max(distance(params, expected) for params in on_ranks)
        return answers

    def unsharded(self, name: str) -> list[Tensor]:
        """What to equal: in bf16 with the gradients of the same micro-batches, since each is rounded by itself."""
        parts = (self.world, self.accumulation) if self.dtype == "bf16" else (1, 1)
        deepspeed = self.engine in DEEPSPEED
        return unsharded(name, self.dtype, self.casts, *parts, deepspeed, steps=self.steps, draw=self.draw)


def jobs() -> Iterator[Job]:
    for engine in ENGINES:
        settings = [(world, "fp32", accumulation) for world in (1, 2, 3, 4) for accumulation in (1, 2)]
        if engine in DEEPSPEED:  # its masters are float32; of more than two gradients it orders the bfloat16 sum itself
            settings += [(1, "bf16", 2), (2, "bf16", 1)]
        else:
            settings += [(1, "float64", 2), (2, "float64", 1), (3, "float64", 1), (4, "float64", 2)]
            settings += [(1, "bf16", 1), (2, "bf16", 2), (3, "bf16", 1), (4, "bf16", 1)]
        if engine == "hsdp":  # two replicas
            settings = [setting for setting in settings if setting[0] % 2 == 0]
        yield from (Job(engine, *setting, part) for setting in settings for part in PARTS)


def quick_jobs() -> Iterator[Job]:
    return (replace(job, steps=FEW) for job in jobs() if job.quick)


def train(job: Job) -> dict[str, list[Tensor] | str]:
    """The full parameters after the last step, for each optimizer."""
    return {name: trained(job, name) for name in job.names}


def trained(job: Job, name: str) -> list[Tensor] | str:
    options: dict[str, Any] = {"precision": "bf16" if job.dtype == "bf16" else "fp32"}
    if job.engine in ("ddp", "zero1"):
        options["find_unused_parameters"] = True
    rank, world = dist.get_rank(), dist.get_world_size()
    toy = initial(job.dtype)
    try:  # what is refused is refused before the first step
        engine = ENGINES[job.engine](**options)
        engine.check(world)
        model = engine.build(toy, [toy.part], lambda unit, device: None, CPU)
        optimizer, stepper = made(name, engine.unwrap(model), permuted=job.accumulation == 2)
        if isinstance(stepper, distopt.SAM):
            engine.check_sam(stepper)
        model = engine.attach(model, optimizer, job.accumulation, MAX_NORM)
    except ValueError as error:
        return str(error)
    # A proof alarms nowhere that it should not.
    distopt.prove_every(stepper, engine.unwrap(model), steps=4 if job.steps == FEW else 1, state=True)
    for step in range(1, job.steps + 1):
        mine = batch(step, job.inputs, job.draw).chunk(world)[rank].chunk(job.accumulation)
        done = update(engine, model, stepper, mine, MAX_NORM, partial(loss, step))
        assert done.applied
    params = list(full(model).values())
    if job.engine in DEEPSPEED:
        model.destroy()
    return params


@lru_cache
def unsharded(
    name: str,
    dtype: str,
    casts: bool,
    ranks: int,
    accumulation: int,
    deepspeed: bool,
    max_norm: float = MAX_NORM,
    steps: int = STEPS,
    draw: int = 0,
) -> list[Tensor]:
    """The same training of a plain model by one process without a process group: no engine, full tensors.

    deepspeed: as DeepSpeed has it, a parameter that is not used has a gradient of zeros, so that its state decays, and
    gradients of bfloat16 weights are summed in bfloat16.
    """
    assert not dist.is_initialized()
    model = initial(dtype)
    optimizer, stepper = made(name, model)

    def backward(step: int) -> None:
        computing = copy.deepcopy(model).to(torch.bfloat16) if casts else copy.deepcopy(model)
        sums: dict[Tensor, Tensor] = {}
        for part in batch(step, next(computing.parameters()).dtype, draw).chunk(ranks * accumulation):
            computing.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16" and not casts):
                share = loss(step, computing, part) / accumulation
            share.backward()
            for p, q in zip(model.parameters(), computing.parameters()):
                if q.grad is not None:
                    grad = (q.grad if deepspeed else q.grad.to(p.dtype)) / ranks
                    sums[p] = sums[p] + grad if p in sums else grad
        for p in model.parameters():
            unused = torch.zeros_like(p) if deepspeed and p.requires_grad else None
            p.grad = sums[p].to(p.dtype) if p in sums else unused

    for step in range(1, steps + 1):
        backward(step)
        if name in SAM_OVER:
            stepper.perturb()
            backward(step)
            stepper.restore()
        distopt.clip_grad_norm_(optimizer, max_norm)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@torch.no_grad()
def initial(dtype: str) -> Model:
    """The model before the first step, of numbers that bfloat16 has: DeepSpeed rounds a frozen parameter for good."""
    toy = Model().to(DTYPES[dtype])
    toy.load_state_dict(whole("", DTYPES[dtype]).state_dict())
    # Lest `scale` end at zero, where a relative difference means nothing, or `wide`, whose gradient is a multiple of
    # the mean of `frozen`, hardly have one.
    for p in (toy.part.scale, toy.part.frozen):
        p.abs_()
    for p in toy.parameters():
        p.copy_(p.bfloat16())
    return toy


def made(name: str, model: nn.Module, permuted: bool = False) -> tuple[distopt.ShardedOptimizer, torch.optim.Optimizer]:
    """The optimizer in two param groups, and what steps: itself, or SAM over it.

    permuted: the groups, and the parameters in each, are in the opposite order, which changes no update.
    """
    row = named(SAM_OVER.get(name, name))
    groups = row.groups([*model.parameters()])
    if permuted:
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]
    optimizer = row.make(groups)
    return optimizer, distopt.SAM(optimizer, RHO) if name in SAM_OVER else optimizer


def batch(step: int, dtype: torch.dtype, draw: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step + draw * STEPS)
    return torch.rand(BATCH, generator=generator, dtype=torch.float64).to(dtype)


def loss(step: int, model: nn.Module, samples: Tensor, pass_loss: object = None) -> Tensor:
    return model(samples, step)
