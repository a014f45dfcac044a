"""A count of floating-point operations, operator by operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Flops(TorchDispatchMode):
    """A dispatch mode that counts the operations of matrix products, attention and convolutions by torch's formulas.

    `torch.utils.flop_counter.FlopCounterMode` of torch 2.13 keeps activations alive, and has no formula for attention
    on the CPU. As in torch, causal attention is counted without its mask.

    Attributes:
        total: The number of floating-point operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        aten = torch.ops.aten
        self.total = 0
        self._formulas: dict[Any, Any] = {
            **flop_registry,
            aten.addmm_: flop_registry[aten.addmm],
            aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
            aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
                aten._scaled_dot_product_flash_attention_backward
            ],
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := self._formulas.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
