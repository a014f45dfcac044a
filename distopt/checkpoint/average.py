"""Averages of the weights and SAM's buffers in a checkpoint, which a load may lack, and the averages as weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from distopt.layout import unwrap_optimizer
from distopt.optim.averaged import GROUP_STATE, average_of, filled, is_average, mean

State = Mapping[str, Mapping[str, Any]]


def is_optional(buffer: str) -> bool:
    """Returns whether a buffer of the state belongs to an average or to SAM, which may begin anew in mid-training."""
    return is_average(buffer) or buffer.startswith("sam_")


def kept_buffers(state: State, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Returns the description of a saved state without the optional buffers that an optimizer does not have."""
    sam = unwrap_optimizer(optimizer, lambda found: hasattr(found, "buffers"))
    ours = (*getattr(average_of(optimizer), "buffers", ()), *getattr(sam, "buffers", ()))
    return {
        name: {buffer: of for buffer, of in buffers.items() if buffer in ours or not is_optional(buffer)}
        for name, buffers in state.items()
    }


def state_of_groups(optimizer: Optimizer) -> tuple[str, ...]:
    """Returns the names of what is state in the param groups of an optimizer, and no hyper-parameter."""
    return ("sam_steps", *getattr(optimizer, "group_state", ()), *GROUP_STATE)


def kept_counts(groups: list[dict[str, Any]], optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns saved param groups without what belongs to averages that an optimizer does not have."""
    ours = getattr(average_of(optimizer), "group_state", ())
    return [{key: of for key, of in group.items() if key in ours or key not in GROUP_STATE} for group in groups]


class SavedAverage:
    """The average of the weights that a checkpoint has, computed from it one parameter at a time.

    That of `EMA` or `LAWA`, or a schedule-free optimizer's, which a checkpoint that was saved in eval mode has in the
    place of the weights.

    Args:
        groups: The param groups of the checkpoint.
        state: The description of its state.

    Attributes:
        names: The parameters whose average differs from the weights.

    Raises:
        ValueError: If it has no average.
    """

    def __init__(self, groups: list[dict[str, Any]], state: State) -> None:
        self._groups = {name: group for group in groups for name in group["params"]}
        # Not those that are frozen: they have no state, or none of an average.
        self.names = [name for name in self._groups if (own := self.buffers(name)) and {*own} <= {*state.get(name, ())}]
        if not self.names and not any("train_mode" in group for group in groups):
            raise ValueError(
                "it has no average of the weights: train with average=ema or average=lawa, or export the weights "
                "themselves"
            )

    def buffers(self, name: str) -> tuple[str, ...]:
        """Returns the buffers that the average of a parameter is computed from; () if it is the weights."""
        group = self._groups[name]
        return filled(group) or (("z",) if group.get("train_mode") else ())

    def of(self, name: str, weights: Tensor, buffers: list[Tensor]) -> Tensor:
        """Returns the average of a parameter.

        Args:
            name: Its name.
            weights: Its weights, float32 or wider.
            buffers: Those of `buffers`, likewise.
        """
        group = self._groups[name]
        if filled(group):
            return mean([[buffer] for buffer in buffers])[0]
        beta = group["betas"][0] if "betas" in group else group["momentum"]
        return torch.lerp(weights, buffers[0], 1.0 - 1.0 / beta)
