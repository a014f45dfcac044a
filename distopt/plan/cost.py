"""The cost model: the time of a step on a cluster, from its operations and its collectives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from distopt.bounds import EFFICIENCY, POSITIVE, integer
from distopt.plan.footprint import Collective

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster of equal machines with equal GPUs; the defaults are NVIDIA's figures for the H100 SXM.

    Args:
        nodes: The number of machines.
        gpus_per_node: The number of GPUs of each machine.
        memory_gib: The memory of a GPU that a program can allocate, in GiB.
        tflops: The dense throughput of a GPU in the precision of the model, in TFLOP/s.
        efficiency: The share of that throughput that the model's matrix products reach, in (0, 1].
        memory_gbps: The memory bandwidth of a GPU, in GB/s.
        near_gbps: The bandwidth from a GPU to another GPU of its machine (NVLink), in GB/s.
        far_gbps: The bandwidth from a GPU to another machine, in GB/s.
        latency_us: The latency of one hop of a collective, in microseconds.

    Raises:
        ValueError: If an argument is not a finite number > 0, a number of machines or GPUs is not an integer, or
            `efficiency` is above 1.
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
            counts = {"nodes": integer(1), "gpus_per_node": integer(1), "efficiency": EFFICIENCY}
            counts.get(name, POSITIVE).check(name, value)

    @property
    def gpus(self) -> int:
        """The number of GPUs of all machines."""
        return self.nodes * self.gpus_per_node

    def seconds(self, collective: Collective) -> float:
        """Return the seconds of a collective: a ring in which every rank sends its share.

        A ring takes `ranks - 1` hops, an all-reduce twice as many. Each GPU of a machine has a ring that crosses to the
        next machine through a port of its own, so that the ranks of a group on one machine share their ports.
        """
        per_machine = 1 if collective.across else min(collective.ranks, self.gpus_per_node)
        crosses_machines = collective.ranks > per_machine and self.nodes > 1
        speed = min(self.near_gbps, per_machine * self.far_gbps) if crosses_machines else self.near_gbps
        hops = (collective.ranks - 1) * (2 if collective.kind == "all_reduce" else 1)
        return collective.sent / (1e9 * speed) + collective.times * hops * self.latency_us * 1e-6

    def compute_seconds(self, flops: float) -> float:
        """Return the seconds in which one GPU computes this number of floating-point operations."""
        return flops / (1e12 * self.tflops * self.efficiency)

    def memory_seconds(self, size: float) -> float:
        """Return the seconds in which one GPU reads or writes this number of bytes of its memory."""
        return size / (1e9 * self.memory_gbps)


class Stage(NamedTuple):
    """A stage of a step.

    Attributes:
        name: forward, backward or step.
        compute: Seconds of computation.
        wire: Seconds of communication.
    """

    name: str
    compute: float
    wire: float

    @property
    def seconds(self) -> float:
        """The longer of the two, since each hides the other."""
        return max(self.compute, self.wire)


def stages(
    cluster: Cluster,
    flops: tuple[float, float],
    touched: float,
    sent: Iterable[Collective],
    passes: int,
    products: float = 0.0,
) -> list[Stage]:
    """Return the stages forward, backward and step.

    Args:
        cluster: The cluster.
        flops: The operations of one forward and of one backward pass.
        touched: The bytes that the optimizer's step reads and writes.
        sent: The collectives of a step.
        passes: The number of forward and backward passes of a step.
        products: The operations of the optimizer's matrix products.
    """
    sent = list(sent)

    def wire(stage: str) -> float:
        return sum(cluster.seconds(collective) for collective in sent if collective.stage == stage)

    return [
        Stage("forward", passes * cluster.compute_seconds(flops[0]), wire("forward")),
        Stage("backward", passes * cluster.compute_seconds(flops[1]), wire("backward")),
        Stage("step", cluster.memory_seconds(touched) + cluster.compute_seconds(products), wire("step")),
    ]
