"""What the job asks of parts that are not its own: of data, optimizers and schedules (docs/own-parts.md).

A loss is a `distopt.data.batch.LogitsLoss`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor
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
    """

    vocab_size: int
    bytes_per_token: float
    source: str
    digest: str

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

    def build(self) -> Any:
        """Returns the tokens, a `Text`: on one process first, whose files the others find."""
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
