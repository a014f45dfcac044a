"""Checks of the optimizer inside SAM."""

from __future__ import annotations

from typing import Any

import torch


def check_inner(optimizer: Any, kind: type) -> None:
    """Raises ValueError unless this is an optimizer without another SAM (of this kind) inside."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"SAM goes around an optimizer, got {type(optimizer).__name__}: make one first, as in "
            "SAM(distopt.AdamW(model.parameters(), lr=1e-3), rho=0.05)"
        )
    inner: Any = optimizer
    while inner is not None:
        if isinstance(inner, kind):
            raise ValueError(
                f"the optimizer is a {type(inner).__name__} already, and SAM around SAM is neither: use one"
            )
        inner = getattr(inner, "optimizer", None)
