"""A micro-batch, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# How the loss of the outputs is computed where that depends on the pass (`SAM.loss`).
PassLoss = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None
IGNORED = -100  # as a label: nothing is to be predicted there


@dataclass(frozen=True, eq=False)
class Batch:
    r"""Sequences of examples, and their share of the loss of a step.

        loss = sum over targets of -log p(token | those before it in its example) / (sequences * targets)

    With `targets`, the mean number of targets of a sequence over the whole global batch, the mean of this over
    micro-batches and ranks of equal numbers of sequences, which is what accumulation and the engines take, is the mean
    over all targets of the step, however unequal their numbers are. A mean in each micro-batch would give the tokens of
    short completions more weight. Every rank knows the whole batch: nothing is communicated.

    inputs: tokens, shape [sequences, length].
    labels: the token that follows each, or -100.
    positions: of each token within its example, which keep attention within it; None where a sequence is one example.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor | None
    targets: float

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        positions = None if self.positions is None else self.positions.to(device)
        return Batch(self.inputs.to(device), self.labels.to(device), positions, self.targets)

    def split(self, sequences: int) -> list[Batch]:
        """Micro-batches of so many sequences."""
        parts = self.inputs.split(sequences), self.labels.split(sequences)
        positions = [None] * len(parts[0]) if self.positions is None else self.positions.split(sequences)
        return [Batch(i, t, p, self.targets) for i, t, p in zip(*parts, positions)]

    def loss(self, model: nn.Module, pass_loss: PassLoss = None) -> Tensor:
        """This micro-batch's share, in nats a target; see above. `pass_loss` as for `next_token_loss`."""
        where = {} if self.positions is None else {"position_ids": self.positions}
        logits = model(input_ids=self.inputs, **where).logits

        def cross_entropy(logits: Tensor) -> Tensor:
            labels = self.labels.flatten()
            total = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
            return total / (len(self.inputs) * self.targets)

        return cross_entropy(logits) if pass_loss is None else pass_loss(logits, cross_entropy)


def next_token_loss(model: nn.Module, batch: Tensor | Batch, pass_loss: PassLoss = None) -> Tensor:
    """Mean cross-entropy, in nats a token, of each token of a batch [sequences, length + 1] given those before it.

    A batch of examples has a loss of its own: `Batch`.
    """
    if not isinstance(batch, Tensor):
        return batch.loss(model, pass_loss)
    logits = model(input_ids=batch[:, :-1]).logits

    def cross_entropy(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    return cross_entropy(logits) if pass_loss is None else pass_loss(logits, cross_entropy)
