"""The tokens of a job: the corpus, its training sequences in their order, and those held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig

from distopt import collective
from distopt.data.batch_sizes import BatchSizes
from distopt.data.order import Sequences, ValidationSequences
from distopt.data.packing import PackedSequences, PackedValidationSequences
from distopt.data.streamed_sequences import Bookmark
from distopt.data.token_cache import Corpus
from distopt.job.protocols import Data


class Text(NamedTuple):
    """The tokens of a run, the training sequences in their order, and the sequences held out."""

    corpus: Corpus
    sequences: Sequences | PackedSequences
    validation: ValidationSequences | PackedValidationSequences


def open_text(cfg: DictConfig, data: Data, batches: BatchSizes | None = None) -> Text:
    """Opens the tokens of the data, after one process has made them if the cache has none.

    Args:
        cfg: The configuration.
        data: Its data.
        batches: The number of sequences of each step; None for `batch_size`.

    Raises:
        ValueError: For batches that grow, of data that has them of one size.
    """
    corpus = collective.one_after_another(data.build)
    most = cfg.evaluation.max_sequences
    sizes = {"sequence_length": cfg.train.sequence_length, "batch_size": cfg.train.batch_size}
    sequences = data.sequences(corpus, **sizes, seed=cfg.seed)
    if batches and batches.schedule:
        if not hasattr(sequences, "sizes"):
            raise ValueError(f"train.batch_schedule: {type(sequences).__name__} has batches of one size: give null")
        sequences.sizes = batches
    return Text(corpus, sequences, data.validation_sequences(corpus, **sizes, max_sequences=most))


def bookmarks(sequences: Any, step: int) -> list[dict[str, Any]]:
    """Returns where the lanes of all processes are in a stream at a step; every process has to call it.

    Of a lane that several processes read, the farthest: some may not have asked it since they were resumed.
    """
    if getattr(sequences, "count", 0) is not None:
        return []
    found = {}
    for bookmark in sorted(each for every in collective.on_all(lambda: sequences.bookmarks(step)) for each in every):
        found[bookmark.source, bookmark.lane] = bookmark
    return [bookmark._asdict() for bookmark in found.values()]


def resume(sequences: Any, saved: Sequence[Mapping[str, Any]]) -> None:
    """Lets a stream go on from the bookmarks of a checkpoint."""
    if saved:
        sequences.resume([Bookmark(**each) for each in saved])
