"""Tokenization by several processes, in the order of the text."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

import numpy as np

from distopt.data import tokenizers

K = TypeVar("K")
Batch = Sequence[tuple[K, bytes]]

_vocabulary: tokenizers.Bytes | tokenizers.Tokenizer  # of a worker


def encoded(
    batches: Iterator[Batch[K]], tokenizer: str | None, processes: int
) -> Generator[tuple[Batch[K], list[np.ndarray]], None, None]:
    """Yield each batch with the tokens of its pieces.

    Args:
        batches: Batches of (anything, piece of text).
        tokenizer: A Hugging Face tokenizer folder; None for bytes.
        processes: The number of processes, each of which uses one core; 1 for this process alone, in which the
            tokenizer may use every core.
    """
    vocabulary = tokenizers.load(tokenizer)
    if processes == 1 or isinstance(vocabulary, tokenizers.Bytes):
        for batch in batches:
            yield batch, vocabulary.encode([piece for _, piece in batch])
        return
    # Not by fork, after which tokenizers' threads would hang; two batches for each process, so that none waits.
    context = multiprocessing.get_context("spawn")
    with _one_thread_each(), ProcessPoolExecutor(processes, context, _start, (tokenizer,)) as pool:
        waiting: deque[tuple[Batch[K], Future[list[np.ndarray]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode, [piece for _, piece in batch])))
                if len(waiting) > 2 * processes:
                    first, tokens = waiting.popleft()
                    yield first, tokens.result()
            for batch, tokens in waiting:
                yield batch, tokens.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that are started now tokenize with one thread."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _start(tokenizer: str | None) -> None:
    """Prepare a worker, which ends with the process that has started it, however that ends."""
    global _vocabulary
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _vocabulary = tokenizers.load(tokenizer)


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)


def _encode(pieces: list[bytes]) -> list[np.ndarray]:
    return _vocabulary.encode(pieces)
