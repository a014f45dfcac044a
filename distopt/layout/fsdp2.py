"""What FSDP2 keeps of full parameters between passes."""

from __future__ import annotations

from torch import nn


def reshard(model: nn.Module) -> None:
    """Frees the full parameters that FSDP2 may still have, so that the next pass gathers them again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
