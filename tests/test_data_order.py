"""The order of sequences: a function of seed and step alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from distopt.data.order import Order, Sequences, ValidationSequences
from distopt.data.permutation import Permutation

TOKENS = np.arange(4 * 37 + 3, dtype=np.uint16)  # 37 sequences of length 4, and two tokens over


def order(seed: int = 0, batch_size: int = 8) -> Sequences:
    return Sequences(TOKENS, sequence_length=4, batch_size=batch_size, seed=seed)


def test_targets_are_the_inputs_shifted_by_one() -> None:
    batch = order().batch(0)
    assert batch.dtype == torch.int64 and batch.shape == (8, 5)
    assert torch.equal(batch, torch.from_numpy(order().rows(0) * 4)[:, None] + torch.arange(5))


def test_a_sequence_needs_its_last_target() -> None:
    counts = [Sequences(TOKENS[:size], sequence_length=4, batch_size=1).count for size in (5, 8, 9)]
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 4, 100])
def test_global_batch_is_the_same_at_any_world_size(world: int, step: int) -> None:
    blocks = [order().batch(step, rank, world) for rank in range(world)]
    assert all(block.shape == (8 // world, 5) for block in blocks)
    assert torch.equal(torch.cat(blocks), order().batch(step))


@pytest.mark.parametrize("batch_size", [1, 8, 37, 100], ids="batch {}".format)
def test_each_sequence_is_seen_once_an_epoch(batch_size: int) -> None:
    """Also where a batch straddles two epochs, or holds several."""
    sequences = order(batch_size=batch_size)
    assert sequences.count == 37
    seen = np.concatenate([sequences.rows(step) for step in range(-(-3 * 37 // batch_size))])[: 3 * 37].reshape(3, 37)
    assert (np.sort(seen, axis=1) == np.arange(37)).all()
    assert len({tuple(epoch) for epoch in seen}) == 3, "every epoch has its own order"


def test_order_is_a_pure_function_of_seed_and_step() -> None:
    """Whatever was asked for before: a resumed run trains on what the first would have trained on."""
    walked = order(seed=3)
    rows = [walked.rows(step) for step in range(12)]
    for step in (11, 0, 4, 4, 9):
        assert (order(seed=3).rows(step) == rows[step]).all() and (walked.rows(step) == rows[step]).all()
    assert (order(seed=4).rows(0) != rows[0]).any()


@pytest.mark.parametrize("count", [1, 2, 3, 37, 4096, 5000])
def test_a_keyed_permutation_has_every_entry_once(count: int) -> None:
    orders = [Permutation(count, 3, epoch)[np.arange(count)] for epoch in range(4)]
    for each in orders:
        assert (np.sort(each) == np.arange(count)).all()
    if count > 30:
        assert len({tuple(each) for each in orders}) == 4
        # Of a random permutation: one fixed point and half of the neighbours in ascending order, on average.
        assert sum(int((each == np.arange(count)).sum()) for each in orders) < 20
        assert 0.3 < float(np.mean([np.mean(np.diff(each) > 0) for each in orders])) < 0.7


def test_the_order_of_a_large_corpus_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^40 sequences, whose permutation would be 8 TB; and what it is, once and for all."""
    large = Order(2**40, 4, seed=5)
    assert large.identity == {"order": "keyed, above 1048576 sequences"} and order().identity == {}
    tracemalloc.start()
    rows = np.concatenate([large.rows(step) for step in (0, 10**9, 2**38)])
    assert tracemalloc.get_traced_memory()[1] < 1e5
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 12 and (rows >= 0).all() and (rows < 2**40).all()
    assert large.rows(0).tolist() == [315228011164, 124318978421, 960567710364, 335417010178]
    monkeypatch.setattr(Order, "LARGE", 20)
    seen = np.concatenate([order().rows(step) for step in range(14)])[:111].reshape(3, 37)
    assert (np.sort(seen, axis=1) == np.arange(37)).all() and len({tuple(epoch) for epoch in seen}) == 3


def test_validation_set_is_the_same_at_any_world_size() -> None:
    validation = ValidationSequences(TOKENS, sequence_length=4, batch_size=8, max_sequences=30)
    assert (validation.sequences, len(validation)) == (24, 3)
    whole = torch.cat(list(validation.batches()))
    for world in (2, 4):
        shards = [list(validation.batches(rank, world)) for rank in range(world)]
        assert torch.equal(torch.cat([torch.cat(blocks) for blocks in zip(*shards)]), whole)
    starts = whole[:, 0]
    assert torch.equal(whole, starts[:, None] + torch.arange(5))
    assert starts[0] == 0 and starts[-1] == len(TOKENS) - 5
    gaps = starts.diff()
    assert gaps.min() >= 4 and gaps.max() - gaps.min() <= 1, "even, and no target twice"


def test_validation_takes_all_by_default_and_one_batch_at_least() -> None:
    assert ValidationSequences(TOKENS, sequence_length=4, batch_size=1).sequences == 37
    few = ValidationSequences(TOKENS[:7], sequence_length=4, batch_size=8, max_sequences=2)
    (batch,) = few.batches()
    assert batch.shape == (8, 5) and batch[0, 0] == 0 and batch[-1, -1] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sequence_length": 151},
            r"train has 151 tokens, one sequence needs sequence_length \+ 1 = 152; give more text",
        ),
        ({"sequence_length": 0}, r"sequence_length must be an integer >= 1, got 0"),
        ({"batch_size": 0}, r"batch_size must be an integer >= 1, got 0"),
        ({"seed": -1}, r"seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_sequences(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences(TOKENS, **{"sequence_length": 4, "batch_size": 8, "seed": 0, **arguments})


def test_bad_validation_sequences() -> None:
    with pytest.raises(ValueError, match=r"validation has 4 tokens, one sequence needs"):
        ValidationSequences(TOKENS[:4], sequence_length=4, batch_size=1)
    with pytest.raises(ValueError, match=r"max_sequences must be an integer >= 1 or null, got 0"):
        ValidationSequences(TOKENS, sequence_length=4, batch_size=1, max_sequences=0)
