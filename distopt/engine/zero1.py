"""ZeRO-1: every rank has the model, and updates an equal part of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distopt.bounds import PARAM_DTYPE, REDUCE_DTYPE, switch
from distopt.engine.ddp import DDP
from distopt.layout.bucketed import BucketLayout, bucket_layout
from distopt.layout.param_sync import wait_before_use

_DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


class Zero1(DDP):
    """Data parallelism with sharded optimizer state: each rank updates its own part and sends it to the others.

    Weights and gradients are views of flat buffers ("buckets"), and of N equal ranges of each bucket a rank owns one.

    1. In the backward pass: as soon as a bucket has its gradients, one reduce-scatter leaves the mean in the rank's
       own range, and nan in the other ranges (`distopt.layout.bucket_gradients`).
    2. `optimizer.step` updates the parameters, or parts of them, in the rank's ranges; only these have state.
    3. One all-gather for each bucket brings the updated ranges to all ranks (`distopt.layout.bucketed`).

    As many bytes as plain DDP: with parameters of psi bytes each rank sends (N-1)/N psi in 1 and in 3, in place.
    Unlike DDP it does not wrap the model. `zero1_layout` does the same to the DDP models of others, by rows.

    Args:
        precision: As in `Engine`.
        activation_checkpointing: As in `Engine`.
        find_unused_parameters: Needed where a step does not use some of the parameters; costs one small all-reduce.
        reduce_dtype: The dtype in which gradients are sent: `fp32`, `bf16` (half the bytes), or None for their own.
        param_dtype: `bf16` keeps weights and gradients in bfloat16, computes in it, and updates float32 masters, which
            are sharded as state: at N ranks 4 + 12/N bytes per parameter with AdamW in place of 8 + 8/N, and half the
            bytes on the wire. Frozen parameters stay as they are. None for float32.
        offload: Keep the state on the host, and update this rank's ranges there: the device has weights and
            gradients alone. Gradients are copied to the host as they are reduced, and weights back before they are
            gathered.
        overlap_gather: Gather updated ranges during the next forward pass, which waits for them block by block. Until
            then the ranges of other ranks are nan: weights are read through `unwrap`, a state dict or the model's
            forward pass.
        compile: As in `Engine`.

    Raises:
        ValueError: Any other reduce_dtype, an overlap_gather that is not a boolean, or as `DDP`.
    """

    def __init__(
        self,
        precision: str = "auto",
        activation_checkpointing: bool = False,
        find_unused_parameters: bool = False,
        reduce_dtype: str | None = None,
        overlap_gather: bool = False,
        param_dtype: str | None = None,
        offload: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(precision, activation_checkpointing, find_unused_parameters, compile)
        REDUCE_DTYPE.check("engine.reduce_dtype", reduce_dtype)
        PARAM_DTYPE.check("engine.param_dtype", param_dtype)
        if param_dtype and precision == "fp32":
            raise ValueError("engine.param_dtype=bf16 computes in bfloat16: set engine.precision=bf16 or auto")
        switch().check("engine.overlap_gather", overlap_gather)
        switch().check("engine.offload", offload)
        self.reduce_dtype = reduce_dtype
        self.overlap_gather = overlap_gather
        self.param_dtype = param_dtype
        self.offload = offload
        self.bf16 = self.bf16 or param_dtype == "bf16"

    def check_forward_only(self) -> None:
        raise ValueError("engine=zero1 shards the optimizer's state, and MeZO has none: use engine=ddp or fsdp2")

    def build(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        fill: Callable[[nn.Module, torch.device], None],
        device: torch.device,
    ) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh

        for unit in (*blocks, model):
            fill(unit, device)
        self._checkpoint_activations(model)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("shard",))
        params = [p for p in model.parameters() if p.requires_grad]
        for p in params if self.param_dtype else ():
            p.data = p.data.to(torch.bfloat16)
        layout = bucket_layout(
            params,
            mesh,
            reduce_dtype=_DTYPES[self.reduce_dtype],
            find_unused=self.find_unused_parameters,
            late=self.overlap_gather,
            offload=self.offload,
        )
        _same_on_every_rank(model, layout)
        _watch(model, layout)
        wait_before_use(layout.sync, model, blocks if self.overlap_gather else ())
        self._compile(blocks)
        return model

    def attach(self, model: nn.Module, optimizer: Any, accumulation: int, max_grad_norm: float) -> nn.Module:
        optimizer.bind(_layout_of(model))
        return model

    def sync(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
        return _layout_of(model).exchange.backward_pass(exchange=last)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.param_dtype else super().autocast(device)

    def unwrap(self, model: nn.Module) -> nn.Module:
        _layout_of(model).sync.wait()
        return model


class _Built:
    """What a model has of its engine; a copy of the model has nothing of it."""

    def __init__(self, layout: BucketLayout) -> None:
        self.layout = layout

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


def _layout_of(model: nn.Module) -> BucketLayout:
    built: _Built | None = getattr(model, "_zero1", None)
    if built is None:
        raise ValueError(f"this {type(model).__name__} was not built by engine=zero1, or is a copy of one that was")
    return built.layout


def _watch(model: nn.Module, layout: BucketLayout) -> None:
    """Has every forward pass of a model check that its parameters are still those in the buckets."""
    places = [
        (module, name, p)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if p in layout
    ]

    def before_forward(module: nn.Module, _: Any) -> None:
        if module is not model:
            _refuse_training(module)
            return
        if gone := [name for inside, name, p in places if getattr(inside, name, None) is not p]:
            raise ValueError(f"{len(gone)} parameters, the first {gone[0]!r}, were replaced {_AFTER}")
        if moved := [p for bucket in layout.buckets if (p := bucket.moved()) is not None]:
            raise ValueError(f"a parameter of shape {tuple(moved[0].shape)} has moved in memory {_AFTER}")
        layout.exchange.heal()

    model._zero1 = _Built(layout)  # type: ignore[assignment]
    model.register_forward_pre_hook(before_forward)


_AFTER = (
    "after engine=zero1 had put it into its buffers, so that no rank would update or send it: load weights without "
    "assign=True, and call model.to(), parametrizations and the like before the engine builds the model"
)


def _refuse_training(copy: nn.Module) -> None:
    if copy.training and torch.is_grad_enabled():
        raise ValueError(
            "this model is a copy of one that engine=zero1 has built, and its gradients would not be averaged over "
            "the ranks: call eval() or torch.no_grad() to use it, or build another model by the engine to train it"
        )


def _same_on_every_rank(model: nn.Module, layout: BucketLayout) -> None:
    """Brings the first rank's values to all, as DDP does."""
    if not layout.groups:
        return
    rest = [t.detach() for t in (*model.parameters(), *model.buffers()) if t not in layout]
    for tensor in [bucket.weights for bucket in layout.buckets] + [t for t in rest if t.numel()]:
        values = tensor.contiguous()
        dist.broadcast(values.view(-1).view(torch.uint8), group=layout.groups[0], group_src=0)  # gloo knows no bool
        if values is not tensor:
            tensor.copy_(values)
