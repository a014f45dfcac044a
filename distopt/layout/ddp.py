"""The layout of DDP: which ranks have equal copies of the parameters, so that they can share work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.nn.parallel import DistributedDataParallel

from distopt.layout.base import ShardLayout
from distopt.layout.infer import infer_layout
from distopt.layout.names import bare_parameters
from distopt.layout.tensors import trained


def ddp_layout(model: DistributedDataParallel) -> ShardLayout:
    """Makes the layout of a DDP model, with which its ranks divide the matrices of Muon among themselves.

        optimizer.bind(distopt.layout.ddp_layout(ddp))

    Without it every rank computes all of them: the same weights, in as many times the time.

    Args:
        model: DDP.

    Raises:
        ValueError: If the model is not DDP; if it has parameters that are sharded, or that DDP ignores, whose copies
            need not be equal.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"ddp_layout is for DistributedDataParallel, got {type(model).__name__}: wrap the model, or bind no layout"
        )
    ignored: set[str] = model.parameters_to_ignore
    named: dict[str, Any] = dict(model.module.named_parameters())
    if wrong := [n for n, p in named.items() if p.requires_grad and (n in ignored or hasattr(p, "placements"))]:
        raise ValueError(
            f"{wrong[0]} is sharded or ignored by DDP, so that its copies need not be equal: bind no layout, and every "
            "rank updates what it has"
        )
    layout = infer_layout(trained(bare_parameters(model).values()))
    return replace(layout, copies=model.process_group)
