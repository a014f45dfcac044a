"""Memory, communication and time of a training step before it runs: `python -m distopt.plan model=... nodes=...`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from distopt.engine import Engine
from distopt.job import cli
from distopt.job.check import check
from distopt.job.config import Config, instantiate
from distopt.job.errors import one_line_errors
from distopt.models.language_model import LanguageModel
from distopt.plan.cost import GIB, Cluster, Stage, stages
from distopt.plan.footprint import Collective, Footprint, every_layer, numel
from distopt.plan.memory import footprint
from distopt.plan.rehearsal import Rehearsal, rehearse
from distopt.plan.wire import wire

_MOST = 2**16  # GPUs: where the search for the smallest cluster ends


@dataclass(frozen=True)
class Plan:
    """What a GPU of a cluster holds, sends and does in a step.

    tokens: of a GPU in a step. passes: forward and backward passes for each of its micro-batches (SAM).
    sam: copies of its shards that SAM keeps. trusts: whether the update needs a layer's norm before its weights move.
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
        return footprint(self.engine, self.rehearsal.units, self.cluster.gpus)

    @property
    def peak(self) -> int:
        """The most bytes at one time: what stays, what is gathered, and activations with the gradients they become."""
        held = self.footprint
        early = held.early or self.accumulation > 1 or self.passes > 1
        beside = self.extra + held.accumulated * (self.accumulation > 1)
        return held.parameters + held.state + beside + self.rehearsal.peak(held, early)

    @property
    def extra(self) -> int:
        """What SAM keeps: copies that lie as the parameters do."""
        return self.sam * self.footprint.parameters

    @property
    def fits(self) -> bool:
        return self.peak <= self.cluster.memory_gib * GIB

    @property
    def wire(self) -> list[Collective]:
        once = wire(self.engine, self.rehearsal.units, self.cluster.gpus, self.accumulation)
        return [c if c.stage == "step" else c._replace(size=round(c.size * self.passes)) for c in once]

    @property
    def stages(self) -> list[Stage]:
        held, forward, backward = self.footprint, *self.rehearsal.flops
        # The update reads the gradient and reads and writes weights and state; with ratios it reads them once more.
        touched = held.gradients + 2 * (held.parameters + held.state) + self.trusts * (held.parameters + held.state)
        return stages(
            self.cluster, (self.passes * forward, self.passes * backward), touched, self.wire, self.accumulation
        )


def smaller(plan: Plan) -> Iterator[Plan]:
    """The same on 1, 2, 4, ... GPUs of a machine, on 1, 2, 4, ... machines, and as it was asked."""
    asked = plan.cluster
    sizes = [(1, gpus) for gpus in doubled(asked.gpus_per_node - 1)]
    sizes += [(nodes, asked.gpus_per_node) for nodes in sorted({asked.nodes, *doubled(_MOST // asked.gpus_per_node)})]
    for nodes, gpus in sizes:
        yield replace(plan, cluster=replace(asked, nodes=nodes, gpus_per_node=gpus))


def doubled(most: int) -> list[int]:
    """1, 2, 4, ... up to most."""
    return [2**i for i in range(most.bit_length())]


def smallest(plan: Plan) -> Plan | None:
    """The smallest of these clusters that fits."""
    for other in smaller(plan):
        try:
            other.engine.check(other.cluster.gpus)
        except ValueError:  # replicas that do not divide them
            continue
        if other.fits:
            return other
    return None


def make_plan(cfg: Config) -> Plan:
    """The plan that a configuration asks for. Raises ValueError for what cannot be."""
    check(cfg, "plan")
    cluster = instantiate(cfg, "cluster")(nodes=cfg.nodes, gpus_per_node=cfg.gpus_per_node)
    engine, make_optimizer, make_sam = (
        instantiate(cfg, "engine", Engine),
        instantiate(cfg, "optimizer"),
        instantiate(cfg, "sam") if cfg.sam else None,
    )
    engine.check(cluster.gpus)
    sizes = cfg.vocabulary, cfg.micro_batch_size, cfg.sequence_length
    rehearsal = rehearse(
        engine, instantiate(cfg, "model", LanguageModel), instantiate(cfg, "param_groups"), make_optimizer, *sizes
    )
    optimizer = make_optimizer([torch.zeros(2, 2, dtype=torch.float32, requires_grad=True)])  # which tells its options
    sam = make_sam(optimizer) if make_sam else None
    if sam is not None:
        engine.check_sam(sam)
    return Plan(
        cluster=cluster,
        engine=engine,
        rehearsal=rehearsal,
        tokens=cfg.accumulation * cfg.micro_batch_size * cfg.sequence_length,
        accumulation=cfg.accumulation,
        passes=1.0 if sam is None else int(sam.needs_ascent_gradient) + 1 / sam.interval,
        sam=0 if sam is None else 1 + sam.needs_unperturbed_gradient + len(sam.buffers),
        trusts=rehearsal.trusts,
    )


def described(plan: Plan) -> str:
    """The plan as tables."""
    cluster, held, units = plan.cluster, plan.footprint, plan.rehearsal.units
    memory = {
        "parameters": held.parameters,
        "gradients": held.gradients,
        "optimizer state": held.state,
        "SAM's copies": plan.extra,
        "gathered for a while": max(held.gathered, held.outside),
        "activations": plan.rehearsal.activations,
        "peak": plan.peak,
    }
    parameters, total = numel(every_layer(units)), sum(stage.seconds for stage in plan.stages)
    lines = [
        f"{parameters:,} parameters in {len(every_layer(units))} layers on {_gpus(cluster)}",
        "",
        f"{'memory of a GPU':30}{'GiB':>10}",
        *(f"{name:30}{size / GIB:10.2f}" for name, size in memory.items() if size),
        f"{'it has':30}{cluster.memory_gib:10.2f}",
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
        f"{'together':50}{total:10.4f}",
        f"{'tokens/s':50}{cluster.gpus * plan.tokens / total:10,.0f}",
        "",
    ]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Whether the plan fits, and the smallest cluster that does."""
    least = smallest(plan)
    other = f"the smallest that fits has {_gpus(least.cluster)}" if least else f"nor does any of up to {_MOST:,} GPUs"
    if plan.fits:
        return f"it fits; {other}"
    lacking = plan.peak / GIB - plan.cluster.memory_gib
    raise ValueError(f"it does not fit: each GPU lacks {lacking:.2f} GiB; {other}")


def _gpus(cluster: Cluster) -> str:
    s = "s" * (cluster.gpus > 1)
    return f"{cluster.gpus} GPU{s} ({cluster.nodes} x {cluster.gpus_per_node})"


@cli.program("plan")
def planned(cfg: Config) -> None:
    """Prints the plan of a configuration."""
    with one_line_errors():
        plan = make_plan(cfg)
        print(described(plan))
        print(verdict(plan))


def main() -> None:
    """Runs the command line of `python -m distopt.plan`."""
    sys.argv[1:] = cli.model_words(sys.argv[1:])
    with one_line_errors(), cli.explained():
        planned()
