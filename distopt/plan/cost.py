"""How long a step takes on a cluster, by a cost model that fits on a page."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from distopt.plan.footprint import Collective

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines of equal GPUs, and how fast they are; the defaults are NVIDIA's figures for the H100 SXM.

    Args:
        nodes, gpus_per_node: how many.
        memory_gib: of a GPU, that a program can have.
        tflops: of a GPU, dense, in the precision that it computes in.
        efficiency: the share of these that a model's matrix products reach, in (0, 1].
        memory_gbps: GB/s of a GPU's memory.
        near_gbps: GB/s that a GPU sends to another one of its machine (NVLink).
        far_gbps: GB/s that a GPU sends to another machine.
        latency_us: microseconds of one hop of a collective.
    """

    nodes: int
    gpus_per_node: int
    memory_gib: float = 80.0
    tflops: float = 989.0
    efficiency: float = 0.4
    memory_gbps: float = 3350.0
    near_gbps: float = 450.0
    far_gbps: float = 50.0
    latency_us: float = 10.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            whole = name in ("nodes", "gpus_per_node")
            if not number or not value > 0 or (whole and not isinstance(value, int)):
                raise ValueError(f"{name} must be {'an integer' if whole else 'a number'} > 0, got {value!r}")
        if self.efficiency > 1:
            raise ValueError(f"efficiency must be in (0, 1], got {self.efficiency!r}: it is a share")

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    def seconds(self, collective: Collective) -> float:
        """Rings in which every rank sends its share, in `ranks - 1` hops (twice that for an all-reduce).

        There is a ring for each GPU of a machine, which crosses to the next machine by another port, so that the ranks
        of a group on one machine have their ports together.
        """
        together = 1 if collective.across else min(collective.ranks, self.gpus_per_node)
        apart = collective.ranks > together and self.nodes > 1
        speed = min(self.near_gbps, together * self.far_gbps) if apart else self.near_gbps
        hops = (collective.ranks - 1) * (2 if collective.kind == "all_reduce" else 1)
        return collective.sent / (1e9 * speed) + collective.times * hops * self.latency_us * 1e-6

    def computing(self, flops: float) -> float:
        """Seconds of so many floating-point operations of one GPU."""
        return flops / (1e12 * self.tflops * self.efficiency)

    def touching(self, size: float) -> float:
        """Seconds of reading and writing so many bytes of one GPU's memory."""
        return size / (1e9 * self.memory_gbps)


class Stage(NamedTuple):
    """A part of a step: what computes, and what is sent meanwhile."""

    name: str
    compute: float
    wire: float

    @property
    def seconds(self) -> float:
        """The longer of the two, since each hides the other."""
        return max(self.compute, self.wire)


def stages(
    cluster: Cluster, flops: tuple[float, float], touched: float, sent: Iterable[Collective], passes: int
) -> list[Stage]:
    """Forward, backward and step; `flops` of one pass, `touched` bytes of memory in the optimizer's step."""
    sent = list(sent)

    def wire(stage: str) -> float:
        return sum(cluster.seconds(collective) for collective in sent if collective.stage == stage)

    return [
        Stage("forward", passes * cluster.computing(flops[0]), wire("forward")),
        Stage("backward", passes * cluster.computing(flops[1]), wire("backward")),
        Stage("step", cluster.touching(touched), wire("step")),
    ]
