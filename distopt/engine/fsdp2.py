"""FSDP2: parameters, gradients and optimizer state sharded over the ranks (ZeRO-3, ZeRO-2, HSDP)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from distopt.bounds import integer, switch
from distopt.engine.base import Engine
from distopt.sam import SAM


class FSDP2(Engine):
    """Fully sharded data parallelism by `torch.distributed.fsdp.fully_shard`, one unit for each block.

    Does not use `Accelerator.prepare`, which silently returns DDP on the CPU (Accelerate 1.15).

    Args:
        precision: As in `Engine`.
        activation_checkpointing: As in `Engine`.
        reshard_after_forward: Free a block's parameters after its forward pass and gather them again for the backward
            pass (ZeRO-3); false keeps them from forward to backward (ZeRO-2), for less communication and more memory.
        replicas: The number of copies of the sharded model (HSDP); it must divide the number of processes.
        sync_each_batch: Reduce gradients after every micro-batch of a step, so that only shards are kept; false keeps
            full gradients until the last one, for less communication and more memory.

    Raises:
        ValueError: `replicas` is not an integer >= 1, a switch is not a boolean, or as `Engine`.
    """

    def __init__(
        self,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        reshard_after_forward: bool = True,
        replicas: int = 1,
        sync_each_batch: bool = True,
    ) -> None:
        super().__init__(precision, activation_checkpointing)
        integer(1).check("engine.replicas", replicas)
        switch().check("engine.reshard_after_forward", reshard_after_forward)
        switch().check("engine.sync_each_batch", sync_each_batch)
        self.reshard_after_forward = reshard_after_forward
        self.replicas = replicas
        self.sync_each_batch = sync_each_batch

    def check(self, world: int) -> None:
        if world % self.replicas:
            raise ValueError(
                f"engine.replicas={self.replicas} does not divide the {world} processes: "
                f"choose a divisor of {world}, or launch a multiple of {self.replicas}"
            )

    def check_sam(self, sam: SAM) -> None:
        if sam.scope == "local":
            raise ValueError("sam.scope=local needs full weights on every rank: use engine=ddp or zero1, or global")

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        world = dist.get_world_size()
        if self.replicas > 1:
            shape: tuple[int, ...] = (self.replicas, world // self.replicas)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        else:
            mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.bf16 else None, reduce_dtype=torch.float32 if self.bf16 else None
        )
        self._checkpoint_activations(model)
        if empty := [name for name, p in model.named_parameters() if p.numel() == 0]:
            # torch 2.13 raises in the first backward pass: _chunk_cat expects non-empty tensor
            raise ValueError(f"{empty[0]} has no elements, which FSDP2 cannot shard: remove it, or use engine=zero1")
        for unit in (*blocks, model):
            fill(unit, device)
            # The parameters outside of the blocks are needed again at once by the backward pass, so they stay gathered.
            reshard = self.reshard_after_forward and unit is not model
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        return model

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


def reshard(model: nn.Module) -> None:
    """Frees the full parameters that FSDP2 may still have, so that the next pass gathers them again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
