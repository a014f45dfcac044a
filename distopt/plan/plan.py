"""The plan of a training step: `python -m distopt.plan model=... nodes=...`."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from distopt.engine import Engine
from distopt.engine.mezo import MeZO
from distopt.job.check import check
from distopt.job.config import Config, instantiate
from distopt.models.language_model import LanguageModel
from distopt.plan.cost import GIB, Cluster, Stage, stages
from distopt.plan.footprint import Collective, Footprint, all_params, numel
from distopt.plan.matrices import matrix_wire, work_of_ranks
from distopt.plan.memory import footprint
from distopt.plan.rehearsal import Rehearsal, rehearse
from distopt.plan.wire import wire

_LARGEST = 2**16  # GPUs of the clusters among which the smallest is searched


@dataclass(frozen=True)
class Plan:
    """The memory, communication and computation of one GPU of a cluster in a step.

    Attributes:
        cluster: The cluster.
        engine: The engine.
        rehearsal: The pass over one micro-batch.
        tokens: The tokens of a GPU in a step.
        accumulation: The micro-batches of a GPU in a step.
        passes: The forward and backward passes per micro-batch, above 1 with SAM.
        sam: The number of copies of the parameters that SAM keeps.
        trusts: Whether the update needs the norm of a parameter before it can change it.
    """

    cluster: Cluster
    engine: Engine
    rehearsal: Rehearsal
    tokens: int
    accumulation: int
    passes: float
    sam: int
    trusts: bool

    @property
    def footprint(self) -> Footprint:
        """The memory of the GPU that needs most, without activations."""
        return footprint(self.engine, self.rehearsal.units, self.cluster.gpus)

    @property
    def peak(self) -> int:
        """The peak of the memory of a GPU in a step, in bytes."""
        memory = self.footprint
        early = memory.early or self.accumulation > 1 or self.passes > 1
        additional = self.extra + memory.accumulated * (self.accumulation > 1)
        return memory.parameters + memory.state + additional + self.rehearsal.peak(memory, early)

    @property
    def extra(self) -> int:
        """The bytes of SAM's copies, which are laid out as the parameters are."""
        return self.sam * self.footprint.parameters

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory of a GPU."""
        return self.peak <= self.cluster.memory_gib * GIB

    @property
    def wire(self) -> list[Collective]:
        """The collectives of a step."""
        once = wire(self.engine, self.rehearsal.units, self.cluster.gpus, self.accumulation)
        once += matrix_wire(self.engine, self.rehearsal.units, self.cluster.gpus)
        if self.rehearsal.forward_only:
            once = [c for c in once if c.stage == "forward"]
        return [c if c.stage == "step" else c._replace(size=round(c.size * self.passes)) for c in once]

    @property
    def stages(self) -> list[Stage]:
        """The stages of a step with their times."""
        memory, forward, backward = self.footprint, *self.rehearsal.flops
        # The update reads the gradient, and reads and writes weights and state; trust ratios read these once more.
        # MeZO moves the weights four times: up, down, back, and by the update.
        times = 8 if self.rehearsal.forward_only else 2 + self.trusts
        if memory.host:
            update = self.cluster.host_seconds(times * memory.host)
        else:
            update = self.cluster.memory_seconds(memory.gradients + times * (memory.parameters + memory.state))
        update += self.cluster.compute_seconds(2.0 * max(self.work, default=0.0))  # a multiplication and an addition
        flops = self.passes * forward, self.passes * backward
        return stages(self.cluster, flops, update, self.wire, self.accumulation)

    @functools.cached_property
    def work(self) -> list[float]:
        """The multiplications of each GPU for full matrices; empty without such a rule."""
        return work_of_ranks(self.rehearsal.units, self.cluster.gpus)


def smaller(plan: Plan) -> Iterator[Plan]:
    """Yield the plan on 1, 2, 4, ... GPUs of a machine and on 1, 2, 4, ... machines, the given cluster among them."""
    given = plan.cluster
    sizes = [(1, gpus) for gpus in doubled(given.gpus_per_node - 1)]
    sizes += [
        (nodes, given.gpus_per_node) for nodes in sorted({given.nodes, *doubled(_LARGEST // given.gpus_per_node)})
    ]
    for nodes, gpus in sizes:
        yield replace(plan, cluster=replace(given, nodes=nodes, gpus_per_node=gpus))


def doubled(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`."""
    return [2**i for i in range(most.bit_length())]


def smallest(plan: Plan) -> Plan | None:
    """Return the plan on the smallest cluster that it fits, if there is one."""
    for other in smaller(plan):
        try:
            other.engine.check(other.cluster.gpus)
        except ValueError:  # the replicas do not divide the GPUs
            continue
        if other.fits:
            return other
    return None


def make_plan(cfg: Config) -> Plan:
    """Make the plan of a configuration.

    Raises:
        ValueError: If a value is out of its bounds, or the engine refuses the combination.
    """
    check(cfg, "plan")
    cluster = instantiate(cfg, "cluster")(nodes=cfg.nodes, gpus_per_node=cfg.gpus_per_node)
    engine, make_optimizer, make_sam = (
        instantiate(cfg, "engine", Engine),
        instantiate(cfg, "optimizer"),
        instantiate(cfg, "sam") if cfg.sam else None,
    )
    engine.check(cluster.gpus)
    if isinstance(make_optimizer([torch.zeros(2, 2, dtype=torch.float32)]), MeZO):
        engine.check_forward_only()
        if make_sam:
            raise ValueError("optimizer=mezo has no gradients to ascend: give sam=off")
    sizes = cfg.vocabulary, cfg.micro_batch_size, cfg.sequence_length
    rehearsal = rehearse(
        engine, instantiate(cfg, "model", LanguageModel), instantiate(cfg, "param_groups"), make_optimizer, *sizes
    )
    # For its options only: the planned model has no memory.
    optimizer = make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)])
    sam = make_sam(optimizer) if make_sam else None
    if sam is not None:
        engine.check_sam(sam)
    return Plan(
        cluster=cluster,
        engine=engine,
        rehearsal=rehearsal,
        tokens=cfg.accumulation * cfg.micro_batch_size * cfg.sequence_length,
        accumulation=cfg.accumulation,
        passes=1.0 + rehearsal.forward_only if sam is None else int(sam.needs_ascent_gradient) + 1 / sam.interval,
        sam=0 if sam is None else 1 + sam.needs_unperturbed_gradient + len(sam.buffers),
        trusts=rehearsal.trusts,
    )


def format_plan(plan: Plan) -> str:
    """Return the plan as text tables."""
    cluster, bytes_of, units = plan.cluster, plan.footprint, plan.rehearsal.units
    memory = {
        "parameters": bytes_of.parameters,
        "gradients": bytes_of.gradients,
        "optimizer state": bytes_of.state,
        "SAM's copies": plan.extra,
        "temporarily gathered": max(bytes_of.gathered, bytes_of.outside),
        "activations": plan.rehearsal.activations,
        "peak": plan.peak,
    }
    parameters, total = numel(all_params(units)), sum(stage.seconds for stage in plan.stages)
    lines = [
        f"{parameters:,} parameters in {len(all_params(units))} tensors on {_gpus(cluster)}",
        "",
        f"{'memory of a GPU':30}{'GiB':>10}",
        *(f"{name:30}{size / GIB:10.2f}" for name, size in memory.items() if size),
        f"{'available':30}{cluster.memory_gib:10.2f}",
        *([f"{'on the host, per process':30}{bytes_of.host / GIB:10.2f}"] if bytes_of.host else []),
        "",
        f"{'sent by a GPU in a step':30}{'GB':>10}{'s':>10}",
        *(
            f"{f'{c.kind} ({c.stage})':30}{c.sent / 1e9:10.2f}{cluster.seconds(c):10.4f}"
            for c in plan.wire
            if c.ranks > 1
        ),
        "",
        f"{'time of a step':30}{'compute':>10}{'wire':>10}{'s':>10}",
        *(f"{s.name:30}{s.compute:10.4f}{s.wire:10.4f}{s.seconds:10.4f}" for s in plan.stages),
        f"{'total':50}{total:10.4f}",
        f"{'tokens/s':50}{cluster.gpus * plan.tokens / total:10,.0f}",
        "",
    ]
    if plan.work:
        balance = max(plan.work) * cluster.gpus / sum(plan.work)
        lines[-1:] = [f"{'owners of matrices, work of the busiest / mean':50}{balance:10.2f}", ""]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Return the line that says whether the plan fits, and which is the smallest cluster that does.

    Raises:
        ValueError: If it does not fit.
    """
    least = smallest(plan)
    other = f"nor does any cluster of up to {_LARGEST:,} GPUs"
    if least:
        other = f"the smallest that fits has {_gpus(least.cluster)}"
    if plan.fits:
        return f"it fits; {other}"
    lacking = plan.peak / GIB - plan.cluster.memory_gib
    raise ValueError(f"it does not fit: each GPU lacks {lacking:.2f} GiB; {other}")


def _gpus(cluster: Cluster) -> str:
    s = "s" * (cluster.gpus > 1)
    return f"{cluster.gpus} GPU{s} ({cluster.nodes} x {cluster.gpus_per_node})"
