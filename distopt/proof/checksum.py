"""Checksums of a model and its optimizer's state that do not depend on the engine or the number of processes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distopt import layout as layouts
from distopt.kernels.blocks import is_of_blocks
from distopt.layout import ShardLayout, full_shape, unwrap_optimizer
from distopt.layout.deepspeed_private import is_partitioned, partition_group
from distopt.layout.flat import own_piece
from distopt.layout.names import bare_parameters
from distopt.layout.places import Run, full_place
from distopt.proof.content import content
from distopt.proof.faults import check_parameters
from distopt.proof.places import counted, parts, replicated, sums


@dataclass(frozen=True)
class Fingerprint:
    """Checksums of 64 bits, as hexadecimal text, that are equal for equal bits, however they are sharded.

    Attributes:
        params: The checksum of each parameter, by name.
        state: The checksum of each state buffer of the optimizer, by the names of parameter and buffer. Numbers, such
            as the step count, are given as text.
    """

    params: dict[str, str]
    state: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def total(self) -> str:
        """One checksum of all parameters and state."""
        return hashlib.blake2b(
            repr((sorted(self.params.items()), _sorted(self.state))).encode(), digest_size=8
        ).hexdigest()


def _sorted(state: dict[str, dict[str, str]]) -> list[Any]:
    return [(name, sorted(buffers.items())) for name, buffers in sorted(state.items())]


@torch.no_grad()
def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Fingerprint:
    """Returns the checksums of the parameters of a model and of the state of an optimizer.

    They depend on names and bits alone: they are the same in one process, under DDP, ZeRO-1, FSDP2, HSDP, tensor
    parallelism and DeepSpeed, at any number of processes. 16-bit weights are those that the model computes with; their
    float32 masters are the state buffer `master`.

    Every rank must call it. Shards are hashed where they are; one number per parameter is summed over each sharded mesh
    axis.

    Args:
        model: A model, also one wrapped by DDP, FSDP2 or DeepSpeed. Frozen parameters are included; buffers are not,
            since they may differ between ranks.
        optimizer: An optimizer of this model, whose state is added.

    Returns:
        Checksums that can be compared by `==`; `total` is one for all of them.

    Raises:
        ValueError: If a parameter is sharded by FSDP1 or has no content of its own (wrapper subclasses, the meta
            device), or if the optimizer steps parameters that are not the model's.
    """
    wrapped = isinstance(model, DistributedDataParallel) or hasattr(model, "zero_optimization_stage")
    plain: Any = model.module if wrapped else model
    plain.state_dict()  # waits for ZeRO-1's rows, where they are gathered during the forward pass
    names = {param: name for name, param in bare_parameters(plain).items()}
    partitioned = [param for param in names if is_partitioned(param)]
    found = _partitioned_sums(partitioned)
    rest = [param for param in names if not is_partitioned(param)]
    check_parameters(rest)
    layout = layouts.infer_layout(rest)
    found |= dict(zip(rest, _over_ranks(layout, sums(layout, parts(layout)))))
    params = {name: _hexadecimal(found[param]) for param, name in names.items()}
    return Fingerprint(params, {} if optimizer is None else _state(unwrap_optimizer(optimizer), names))


def _partitioned_sums(params: list[Any]) -> dict[Tensor, int]:
    """Returns the hashes of parameters that DeepSpeed's stage 3 has partitioned."""
    if not params:
        return {}
    shares = []
    for param in params:
        piece = own_piece(param)
        shares.append(content(piece.weights, full_shape(param), Run(piece.offset, piece.weights.numel())))
    total = torch.stack(shares).to(params[0].device)
    if dist.get_world_size(group := partition_group(params[0])) > 1:
        dist.all_reduce(total, group=group)
    return dict(zip(params, total.tolist()))


def _state(optimizer: Any, names: dict[Tensor, str]) -> dict[str, dict[str, str]]:
    """Returns the checksums of the state of each parameter that has any, by name."""
    layout: ShardLayout = getattr(optimizer, "layout", None) or layouts.infer_layout(
        layouts.trained(p for group in optimizer.param_groups for p in group["params"])
    )
    owners = layout.updated_in
    if foreign := [param for param in owners if param not in names]:
        raise ValueError(f"{len(foreign)} of the {len(owners)} parameters of the optimizer are not the model's")
    buffers: dict[str, dict[Tensor, Tensor]] = {}
    state: dict[str, dict[str, str]] = {}
    is_replicated = replicated(optimizer)
    for param, owner in owners.items():
        for name, value in optimizer.state.get(owner, {}).items():
            if is_replicated(owner, name):
                number = int(content(value, value.shape, full_place(value.shape)))
                state.setdefault(names[param], {})[name] = _hexadecimal(number)
            elif isinstance(value, Tensor) and (value.shape == owner.shape or is_of_blocks(name)) and name != "step":
                buffers.setdefault(name, {})[owner] = value
            elif value is not None:
                said = float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
                state.setdefault(names[param], {})[name] = repr(said)
    if layout.flat and any(param.dtype.itemsize < 4 for param in layout.params):
        buffers["master"] = {flat: flat.detach() for flat in layout.segments}
    for name, held in sorted(buffers.items()):
        total = _over_ranks(layout, sums(layout, parts(layout, held.get)))
        for param, number in zip(layout.params, total):
            if owners[param] in held:
                state.setdefault(names[param], {})[name] = _hexadecimal(number)
    return state


def _over_ranks(layout: ShardLayout, shares: Tensor) -> list[int]:
    total = (shares * counted(layout)).to(layout.wire or layout.device)
    for group in layout.groups:
        dist.all_reduce(total, group=group)
    return total.tolist()


def _hexadecimal(number: int) -> str:
    return f"{number % 2**64:016x}"
