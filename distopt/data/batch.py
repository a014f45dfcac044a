"""A micro-batch of sequences, and the next-token loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distopt.data.accuracy import Counts, TokenAccuracy, hits_of
from distopt.data.cross_entropy import IGNORED, loss_in_head, use_chunks
from distopt.data.single_sequences import one_sequence_per_row

# Computes the loss from the logits and a function of them, where the loss depends on the pass (`SAM.loss`).
PassLoss = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None

# Computes the sum of the losses of tokens from logits, float32 of shape [tokens, vocabulary], and labels, int64 of
# shape [tokens], of which those that are -100 are no targets.
LogitsLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    r"""A micro-batch of fine-tuning sequences, which computes its share of the loss of a step.

        loss = sum over targets of -log p(target | preceding tokens of its example) / (sequences * targets)

    `targets` is the mean number of targets per sequence of the global batch. Gradient accumulation and the engines
    average this loss over micro-batches and ranks, all of which have the same number of sequences, so that the result
    is the mean over all targets of the step, however unevenly they are distributed. A mean within each micro-batch
    would give more weight to the tokens of short completions. Every rank computes `targets` from the global batch
    without communication.

    Attributes:
        inputs: Tokens, int64, shape [sequences, length].
        labels: The token that follows each input, or -100 where it is no target; int64, shape [sequences, length].
        positions: The position of each token within its example, int64, shape [sequences, length], by which attention
            is restricted to the example; None if every sequence is a single example.
        targets: The mean number of targets per sequence of the global batch.
        tokens: The mean number of inputs per sequence of the global batch that are no padding; None if all are none.
    """

    inputs: Tensor
    labels: Tensor
    positions: Tensor | None
    targets: float
    tokens: float | None = None

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.inputs.device

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return a copy of the batch on another device."""
        return self._with(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return a copy of the batch in pinned memory."""
        return self._with(Tensor.pin_memory)

    def _with(self, copy: Callable[[Tensor], Tensor]) -> Batch:
        positions = None if self.positions is None else copy(self.positions)
        return Batch(copy(self.inputs), copy(self.labels), positions, self.targets, self.tokens)

    def split(self, sequences: int) -> list[Batch]:
        """Split the batch into micro-batches of `sequences` sequences each."""
        parts = self.inputs.split(sequences), self.labels.split(sequences)
        positions = [None] * len(parts[0]) if self.positions is None else self.positions.split(sequences)
        return [Batch(i, t, p, self.targets, self.tokens) for i, t, p in zip(*parts, positions)]

    def loss(
        self,
        model: nn.Module,
        pass_loss: PassLoss = None,
        of_logits: LogitsLoss | None = None,
        accuracy: TokenAccuracy | None = None,
    ) -> Tensor:
        """Compute this micro-batch's share of the loss, in nats per target (see the class).

        Args:
            model: A causal language model of transformers.
            pass_loss, of_logits, accuracy: As for `next_token_loss`.

        Returns:
            A 0-D float32 tensor on the model's device.
        """
        packed = {} if self.positions is None else {"position_ids": self.positions}
        scale = 1.0 / (len(self.inputs) * self.targets)
        with contextlib.nullcontext() if packed else one_sequence_per_row():
            if use_chunks(model, self.inputs.numel(), pass_loss is not None or of_logits is not None):
                return loss_in_head(model, self.labels, scale, accuracy, input_ids=self.inputs, **packed)
            logits = model(input_ids=self.inputs, **packed).logits
        if accuracy:
            accuracy.add(hits_of(logits, self.labels), scale)

        def cross_entropy(logits: Tensor) -> Tensor:
            total = (of_logits or cross_entropy_sum)(logits.float().flatten(0, 1), self.labels.flatten())
            return total / (len(self.inputs) * self.targets)

        return cross_entropy(logits) if pass_loss is None else pass_loss(logits, cross_entropy)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the sum of the cross-entropies of tokens, in nats: the `LogitsLoss` that is minimized by default."""
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


def next_token_loss(
    model: nn.Module,
    batch: Tensor | Batch,
    pass_loss: PassLoss = None,
    of_logits: LogitsLoss | None = None,
    accuracy: TokenAccuracy | None = None,
) -> Tensor:
    """Compute the mean cross-entropy of every token given the preceding tokens, in nats per token.

    Without the logits of all tokens where the model's `chunked_loss` asks for it (`distopt.data.cross_entropy`).

    Args:
        model: A causal language model of transformers.
        batch: Tokens, int64, shape [sequences, length + 1]. A `Batch` computes its own loss.
        pass_loss: Called with the logits and the function that computes the loss from them, where the loss depends on
            the pass (`SAM.loss`); None for the cross-entropy itself.
        of_logits: A loss in place of the cross-entropy.
        accuracy: Counts the targets that have the largest logit; None for no count.

    Returns:
        A 0-D float32 tensor on the model's device.
    """
    if not isinstance(batch, Tensor):
        return batch.loss(model, pass_loss, of_logits, accuracy)
    inputs, labels = batch[:, :-1], batch[:, 1:]
    with one_sequence_per_row():
        if use_chunks(model, inputs.numel(), pass_loss is not None or of_logits is not None):
            return loss_in_head(model, labels, 1.0 / labels.numel(), accuracy, input_ids=inputs)
        logits = model(input_ids=inputs).logits
    if accuracy:
        accuracy.add(hits_of(logits, labels), 1.0 / labels.numel())

    def cross_entropy(logits: Tensor) -> Tensor:
        if of_logits is not None:
            return of_logits(logits.float().flatten(0, 1), labels.flatten()) / labels.numel()
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    return cross_entropy(logits) if pass_loss is None else pass_loss(logits, cross_entropy)


def counted(batch: Tensor | Batch, world: int) -> Counts:
    """Counts the tokens of a global batch, of which this is the block of one of `world` ranks; reads no tensor."""
    if isinstance(batch, Tensor):
        every = world * len(batch) * (batch.shape[1] - 1)
        return Counts(every, every)
    sequences = world * len(batch.inputs)
    tokens = batch.inputs.shape[1] if batch.tokens is None else batch.tokens
    return Counts(round(sequences * tokens), round(sequences * batch.targets))
