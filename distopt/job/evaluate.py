"""Evaluation of the model: its loss on held-out text, and what else is measured then."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distopt.data.accuracy import TokenAccuracy
from distopt.data.batch import Batch, next_token_loss
from distopt.optim.averaged import averaged
from distopt.optim.averaging import train_mode

if TYPE_CHECKING:
    from distopt.engine import Engine
    from distopt.job.job import Job


class Evaluation:
    """The evaluations of a job.

    Args:
        job: The job.

    Attributes:
        step: The step of the last one; -1 before the first.
        loss: Its validation loss in nats per token.
        metrics: All of its numbers, by their names in metrics.jsonl.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.step, self.loss = -1, math.nan
        self.metrics: dict[str, float] = {}

    def measure(self) -> float:
        """Returns the mean validation loss over all processes in nats per token, and logs it."""
        job = self._job
        rank, world, device = job.accelerator.process_index, job.accelerator.num_processes, job.accelerator.device
        tell = job.monitor.begin("evaluating")
        batches: Iterable[Tensor | Batch] = job.validation.batches(rank, world)
        with self.weights():
            accuracy = TokenAccuracy()
            accuracy.start(len(job.validation))
            own = validation_loss(job.engine, job.model, job.watchdog.watched(batches), device, accuracy)
            self.loss, share = job.accelerator.reduce(torch.stack([own, accuracy.value(own)]), "mean").tolist()
            self.step, bits = job.step, self.bits_per_byte(self.loss)
            self.metrics = {"validation_loss": self.loss, "bits_per_byte": bits}
            self.metrics |= {} if math.isnan(share) else {"validation_token_accuracy": share}
            if job.generation and math.isfinite(self.loss):  # nothing can be drawn from logits that are not finite
                self.metrics |= job.generation.measure()
            self.metrics |= job.callbacks.call("after_evaluation", job, self.metrics)
        job.monitor.write(self.metrics)
        right = "" if math.isnan(share) else f", accuracy {share:.1%}"
        right += f", exact match {self.metrics['exact_match']:.1%}" if "exact_match" in self.metrics else ""
        tell(f"validation loss {self.loss:.4f}, {bits:.4f} bits per byte{right}")
        return self.loss

    def weights(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which the model has the weights to evaluate: their average, if `evaluation.average`."""
        job = self._job
        if job.cfg.evaluation.get("average") is False:
            train_mode(job.stepper)  # a schedule-free optimizer's, since the last checkpoint
            return contextlib.nullcontext()
        return averaged(job.optimizer, job.engine.unwrap(job.model))

    def bits_per_byte(self, loss: float) -> float:
        """Converts a loss in nats per token."""
        return loss / math.log(2) / self._job.corpus.bytes_per_token


@torch.no_grad()
def validation_loss(
    engine: Engine,
    model: nn.Module,
    batches: Iterable[Tensor | Batch],
    device: torch.device,
    accuracy: TokenAccuracy | None = None,
) -> Tensor:
    """Returns this rank's mean loss in nats per token, a scalar tensor.

    Args:
        engine: The engine that runs the model.
        model: The wrapped model.
        batches: Batches of equally many sequences, int64 [sequences, length + 1].
        device: The device of this process.
        accuracy: Counts the targets that have the largest logit.
    """
    model.eval()
    losses = []
    for batch in batches:
        with engine.autocast(device):
            losses.append(next_token_loss(model, batch.to(device), accuracy=accuracy))
    model.train()
    engine.refresh(model)
    return torch.stack(losses).mean()
