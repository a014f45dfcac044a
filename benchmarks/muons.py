"""Muon for the matrices of the blocks and AdamW for the rest: distopt's one optimizer, torch's two, and dion's one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import distopt

Groups = Sequence[dict[str, Any]]  # each with its `rule`, muon or adamw
LR, WEIGHT_DECAY = 1e-3, 0.1


class Both:
    """Two optimizers that are stepped as one.

    Args:
        optimizers: The optimizers.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Step one after the other."""
        for optimizer in self.optimizers:
            optimizer.step()


def of_distopt(groups: Groups, **options: Any) -> distopt.Muon:
    """Return distopt's."""
    return distopt.Muon([*groups], lr=LR, **options)


def of_torch(groups: Groups) -> Both:
    """Return torch's Muon, which has matrices alone, and its fused AdamW."""
    return Both(
        torch.optim.Muon(_with_rule(groups, "muon"), lr=LR),
        torch.optim.AdamW(_with_rule(groups, "adamw"), lr=LR, fused=True),
    )


def of_dion(groups: Groups) -> Any:
    """Return dion's (github.com/microsoft/dion), which is on no package index."""
    from dion import Muon

    made = [{"algorithm": g["rule"], **{k: g[k] for k in ("params", "weight_decay")}} for g in groups]
    return Muon(made, lr=LR, nesterov=True)


MUONS: dict[str, Callable[[Groups], Any]] = {
    "torch Muon, AdamW fused": of_torch,
    "distopt Muon": of_distopt,
    "distopt Muon, float32 iterations": lambda groups: of_distopt(groups, ns_dtype="float32"),
    "dion Muon": of_dion,
}


def split(tensors: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Return the groups of a GPT's tensors, the first two of which are its embeddings; none if it has no block."""
    hidden = [tensor for tensor in tensors[2:] if tensor.ndim == 2]
    others = [tensor for tensor in tensors if all(tensor is not matrix for matrix in hidden)]
    made = [{"params": hidden, "rule": "muon"}, {"params": others, "rule": "adamw"}]
    return [{**group, "weight_decay": WEIGHT_DECAY} for group in made] if hidden else []


def _with_rule(groups: Groups, rule: str) -> list[dict[str, Any]]:
    return [{k: g[k] for k in ("params", "weight_decay")} for g in groups if g["rule"] == rule]
