"""FSDP2: parameters, gradients and optimizer state sharded over the ranks (ZeRO-3, ZeRO-2, HSDP)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from distopt.bounds import integer, or_null, switch
from distopt.engine import units
from distopt.engine.base import Engine
from distopt.layout.fsdp2 import reshard
from distopt.layout.places import shard_dim
from distopt.sam import SAM


class FSDP2(Engine):
    """Fully sharded data parallelism by `torch.distributed.fsdp.fully_shard`.

    Consecutive blocks are gathered together, in units of about `unit_mib`; so are the embedding and the head, each on
    its own, unless they are tied. A parameter is sharded by rows, or along a dimension that the ranks divide where rows
    would need much padding, as stacked experts do (`distopt.engine.units`). Does not use `Accelerator.prepare`, which
    silently returns DDP on the CPU (Accelerate 1.15).

    Args:
        precision: As in `Engine`.
        activation_checkpointing: As in `Engine`.
        reshard_after_forward: Free a unit's parameters after its forward pass and gather them again for the backward
            pass (ZeRO-3), except for the last one, with which the backward pass begins; false keeps all of them from
            forward to backward (ZeRO-2), for less communication and more memory.
        replicas: The number of copies of the sharded model (HSDP); it must divide the number of processes.
        sync_each_batch: Reduce gradients after every micro-batch of a step, so that only shards are kept; false keeps
            full gradients until the last one, for less communication and more memory.
        unit_mib: The weights of a unit in MiB, as they are gathered: consecutive blocks share one up to that size. 0
            makes each block a unit of its own; None is 16 MiB, or 256 KiB for each rank if that is more.
        offload: Keep shards of parameters, gradients and state on the host, and update them there (torch's
            `CPUOffloadPolicy`): a device has what is gathered for the moment, and activations. Each pass copies the
            shards to the device, the backward pass the gradients back.
        compile: As in `Engine`.

    Raises:
        ValueError: `replicas` is not an integer >= 1, `unit_mib` is no integer >= 0, a switch is not a boolean, or as
            `Engine`.
    """

    def __init__(
        self,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        reshard_after_forward: bool = True,
        replicas: int = 1,
        sync_each_batch: bool = True,
        unit_mib: int | None = None,
        offload: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(precision, activation_checkpointing, compile)
        integer(1).check("engine.replicas", replicas)
        switch().check("engine.reshard_after_forward", reshard_after_forward)
        switch().check("engine.sync_each_batch", sync_each_batch)
        switch().check("engine.offload", offload)
        or_null(integer(0)).check("engine.unit_mib", unit_mib)
        self.reshard_after_forward = reshard_after_forward
        self.replicas = replicas
        self.sync_each_batch = sync_each_batch
        self.unit_mib = unit_mib
        self.offload = offload

    def check(self, world: int) -> None:
        if world % self.replicas:
            raise ValueError(
                f"engine.replicas={self.replicas} does not divide the {world} processes: "
                f"choose a divisor of {world}, or launch a multiple of {self.replicas}"
            )

    def check_sam(self, sam: SAM) -> None:
        if sam.scope == "local":
            raise ValueError("sam.scope=local needs full weights on every rank: use engine=ddp or zero1, or global")

    def check_noise_scale(self) -> None:
        if not self.sync_each_batch:
            raise ValueError(
                "engine.sync_each_batch=false keeps the gradients of micro-batches to FSDP2: set it to true, or "
                "train.noise_scale=null"
            )

    def small_batches(self, world: int) -> int:
        return world

    def small_square(self, model: nn.Module) -> torch.Tensor:
        # Of shards of the mean over the ranks, of which each replica has all.
        return super().small_square(model) * (dist.get_world_size() / self.replicas)

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        self._checkpoint_activations(model)
        if empty := [name for name, p in model.named_parameters() if p.numel() == 0]:
            # torch 2.13 raises in the first backward pass: _chunk_cat expects non-empty tensor
            raise ValueError(f"{empty[0]} has no elements, which FSDP2 cannot shard: remove it, or use engine=zero1")
        shard = self._sharder(device)
        groups = self.grouped([sum(p.numel() for p in block.parameters()) for block in blocks], dist.get_world_size())
        for group in groups:
            unit = blocks[group.start : group.stop]
            for block in unit:
                fill(block, device)
            shard(unit, self.reshard_after_forward and group is not groups[-1])
        fill(model, device)
        # What is outside of the blocks is needed again at once by the backward pass, except for the embedding.
        embedding, head = units.ends(model)
        if embedding is not None and head is not None:
            shard([embedding], self.reshard_after_forward)
            if units.needs_no_weight_in_backward(embedding):
                embedding.set_unshard_in_backward(False)  # type: ignore[operator]
            shard([head], False)
        shard([model], False)
        self._compile(blocks)
        return model

    def grouped(self, numels: Sequence[int], world: int) -> list[range]:
        """Returns the indices of the blocks of each unit.

        Args:
            numels: The number of elements of each block.
            world: The number of processes.
        """
        width = 2 if self.bf16 else 4
        return units.grouped(
            [width * numel for numel in numels], units.unit_bytes(self.unit_mib, world // self.replicas)
        )

    def _sharder(self, device: torch.device) -> Callable[[Sequence[nn.Module], bool], None]:
        """Returns a function that makes modules a unit of FSDP2, given whether to reshard it after its forward pass."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
        from torch.distributed.tensor import Shard

        ranks = dist.get_world_size() // self.replicas
        if self.replicas > 1:
            mesh = init_device_mesh(device.type, (self.replicas, ranks), mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.bf16 else None, reduce_dtype=torch.float32 if self.bf16 else None
        )

        offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if self.offload else OffloadPolicy()

        def shard(modules: Sequence[nn.Module], reshard: bool) -> None:
            fully_shard(
                modules[0] if len(modules) == 1 else list(modules),
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=reshard,
                shard_placement_fn=lambda p: Shard(shard_dim(p.shape, ranks)),
            )

        return shard

    def share(self) -> tuple[int, int]:
        shards = dist.get_world_size() // max(1, self.replicas)
        return dist.get_rank() % shards, shards

    def sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        model.set_requires_gradient_sync(last or self.sync_each_batch)  # type: ignore[operator]
        return contextlib.nullcontext()

    def refresh(self, model: nn.Module) -> None:
        reshard(model)

    def abort_pass(self, model: nn.Module) -> None:
        leave_pass(model)


def leave_pass(model: nn.Module) -> None:
    """Ends a pass that raised.

    Without it `reshard` skips the modules that FSDP2 believes to be inside of the pass, and full copies stay.
    """
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reset_iter_state()
