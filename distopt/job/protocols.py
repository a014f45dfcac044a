"""What the job asks of parts that are not its own: of data, optimizers, schedules and callbacks (docs/own-parts.md).

A loss is a `distopt.data.batch.LogitsLoss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distopt.data.batch import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(Protocol):
    """The tokens of a run, such as `distopt.data.token_cache.Corpus`.

    Attributes:
        vocab_size: The number of token ids.
        bytes_per_token: The mean size of a token: the loss in bits per byte is that in bits per token divided by it.
        source: Where the tokens are from, for the first lines of a run.
        digest: Names the tokens and their order: a run resumes only with data of the same digest.
        chat: Whether there are conversations in it, so that a prompt is a message of the user.
    """

    vocab_size: int
    bytes_per_token: float
    source: str
    digest: str
    chat: bool

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens of the splits `train`, if it is known, and `validation`."""
        ...

    def encode(self, prompt: str) -> list[int]:
        """Returns the tokens of a prompt."""
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray | Tensor) -> str:
        """Returns the text of tokens."""
        ...

    def pretrained_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer that a checkpoint keeps."""
        ...


class TrainingSequences(Protocol):
    """The batches of a run: a pure function of the step, at any number of processes.

    Attributes:
        notes: Lines for the user.
    """

    notes: list[str]

    @property
    def count(self) -> int | None:
        """The number of sequences in an epoch; None if it is not known, and `train.epochs` refused."""
        ...

    @property
    def identity(self) -> dict[str, str]:
        """What else must not change when the run is resumed."""
        ...

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Tensor | Batch:
        """Returns block `rank` of the `world` equal blocks of the batch of a step.

        Tokens are int64 of shape [sequences, length + 1]; a `Batch` has labels and positions of its own.
        """
        ...


class HeldOutSequences(Protocol):
    """The batches of an evaluation, of which every process has as many.

    Attributes:
        notes: Lines for the user.
    """

    notes: list[str]

    def __len__(self) -> int: ...

    def batches(self, rank: int = 0, world: int = 1) -> Iterator[Tensor] | Iterator[Batch]:
        """Yields block `rank` of the `world` equal blocks of every batch."""
        ...


@runtime_checkable
class Data(Protocol):
    """The data of a run, such as `distopt.data.text_data.TextData`: the section `data`."""

    def check(self) -> None:
        """Raises ValueError for what cannot be read; cheap, and before anything else."""
        ...

    def build(self, processes: int = 1) -> Any:
        """Returns the tokens, a `Text`: on one process first, whose files the others find.

        Args:
            processes: How many processes may tokenize, of which data that is there at once needs none.
        """
        ...

    def sequences(self, corpus: Any, *, sequence_length: int, batch_size: int, seed: int) -> Any:
        """Returns the `TrainingSequences` of what `build` returned; batch_size is that of all processes."""
        ...

    def validation_sequences(
        self, corpus: Any, *, sequence_length: int, batch_size: int, max_sequences: int | None
    ) -> Any:
        """Returns the `HeldOutSequences`, at most so many; None is all."""
        ...


class MakeOptimizer(Protocol):
    """Makes the optimizer of param groups: the section `optimizer`, with `_partial_: true`."""

    def __call__(self, params: Any, *, lr: float, **options: Any) -> Optimizer: ...


class MakeSchedule(Protocol):
    """Makes the schedule of an optimizer: the section `schedule`, with `_partial_: true`."""

    def __call__(self, optimizer: Optimizer, *, total_steps: int) -> LambdaLR: ...


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Where a run is when it calls a `Callback`.

    Attributes:
        step: The number of steps done.
        steps: The number of steps in all.
        metrics: The numbers of the step or of the evaluation, after a checkpoint those of the last evaluation, by their
            names in metrics.jsonl. They are the same on every rank, but for times.
        model: The model, as transformers made it; under FSDP2 and DeepSpeed with sharded parameters. After an
            evaluation it has the weights that were evaluated, such as their average.
        optimizer: The optimizer of its parameters.
        folder: The folder of the run.
        checkpoint: The last checkpoint; None before the first.
        rank: The index of this process.
        world: The number of processes.
    """

    step: int
    steps: int
    metrics: Mapping[str, float]
    model: nn.Module
    optimizer: Optimizer
    folder: Path
    checkpoint: Path | None
    rank: int
    world: int
    _reasons: list[str] = field(default_factory=list, repr=False)

    def stop(self, reason: str) -> None:
        """Ends the run after this step, on all ranks, with an evaluation and a checkpoint, and reports the reason."""
        self._reasons.append(str(reason))


Numbers = Mapping[str, float] | None


class Callback(Protocol):
    """What a run calls as it goes: an entry of the list `callbacks`. Every method may be left out.

    Every rank calls it, and may return numbers by name: their means over the ranks that return them are written to
    metrics.jsonl, beside those of the step or the evaluation, and passed to the trackers. An exception on any rank ends
    the run on all of them. A run that is resumed evaluates its checkpoint again, and `after_evaluation` sees that step
    twice.
    """

    def after_step(self, run: RunState) -> Numbers:
        """Called after every step, for whose loss the host then waits."""
        return None

    def after_evaluation(self, run: RunState) -> Numbers:
        """Called after every evaluation: also before the first step and after the last one."""
        return None

    def after_checkpoint(self, run: RunState) -> Numbers:
        """Called when a checkpoint is on the disk: of one that is written in the background, before the next one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, for JSON: that of rank 0, with which every rank resumes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` returned, before the first evaluation of a resumed run."""
