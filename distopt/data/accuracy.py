"""The accuracy of next tokens over the micro-batches of a step, and how many tokens a batch has."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class TokenAccuracy:
    """The share of the targets to which the model gives the largest logit.

        accuracy = sum over micro-batches and ranks of (number of such targets) / (number of all targets)

    A micro-batch counts as its loss does, so that the mean of `value` over the ranks is the accuracy of the step. It
    reads nothing from the device. Of equal logits, as 16-bit ones often are, one is the largest: a tie is no hit twice.
    """

    def __init__(self) -> None:
        self.start(0)

    def start(self, passes: int) -> None:
        """Begins a step: of its forward passes the first so many are counted, as SAM's first pass is."""
        self._passes, self._shares = passes, list[Tensor]()

    def add(self, hits: Tensor, scale: float) -> None:
        """Counts a micro-batch.

        Args:
            hits: The number of targets that have the largest logit, a 0-D tensor.
            scale: The factor of a token in the micro-batch's loss, 1 / targets.
        """
        if len(self._shares) < self._passes:
            self._shares.append(hits * scale)

    def value(self, like: Tensor) -> Tensor:
        """Returns this rank's accuracy, a 0-D tensor as `like`; nan for a loss that has not counted its hits."""
        return torch.stack(self._shares).mean().to(like) if self._shares else like.new_full((), math.nan)


def hits_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the number of targets that have the largest logit, a 0-D tensor.

    Args:
        logits: Shape [..., vocabulary].
        labels: The target of each, or -100 for none; int64, shape [...].
    """
    return (logits.detach().max(-1).indices == labels).sum()


class Counts(NamedTuple):
    """How many tokens the model reads, without padding, and how many it learns to predict."""

    tokens: int
    targets: int
