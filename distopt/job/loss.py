"""The loss that a configuration names, and what is minimized by it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from distopt.data.accuracy import TokenAccuracy
from distopt.data.batch import LogitsLoss, cross_entropy_sum, next_token_loss
from distopt.data.cross_entropy import IGNORED
from distopt.engine.train_step import Loss
from distopt.job.config import Config, instantiate, named


def own_loss(cfg: Config) -> LogitsLoss | None:
    """Makes the loss of a configuration, and tries it on two tokens; returns None for the cross-entropy."""
    loss: Any = instantiate(cfg, "loss") if cfg.get("loss") else cross_entropy_sum
    if getattr(loss, "func", loss) is cross_entropy_sum:
        return None
    with named("loss"):
        total = loss(torch.zeros(2, 3, requires_grad=True), torch.tensor([1, IGNORED]))
        if not isinstance(total, Tensor) or total.ndim or not total.requires_grad or not total.isfinite():
            raise ValueError(
                f"it must return the sum of the losses of tokens, a scalar with a gradient, got {total!r:.60}"
            )
    return loss


def minimized(loss: LogitsLoss | None, accuracy: TokenAccuracy | None = None) -> Loss:
    """Returns the mean loss of a micro-batch that is minimized; the validation loss is always the cross-entropy.

    Args:
        loss: The loss of logits; None for the cross-entropy.
        accuracy: Counts the targets that have the largest logit.
    """
    return functools.partial(next_token_loss, of_logits=loss, accuracy=accuracy)
