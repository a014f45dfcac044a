"""A mixture of texts: exact shares of every batch, epochs of each source, and the same batches at any world size."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distopt.data.mixed_sequences import CYCLE, MixedSequences, apportioned
from distopt.data.mixture import Mixture
from distopt.data.order import Sequences

LENGTH = 8


def of(first: int, sequences: int) -> Sequences:
    """Sequences of tokens that say which sequence they are in, counted from `first`."""
    tokens = np.repeat(np.arange(first, first + sequences + 1, dtype=np.uint32), LENGTH)[: sequences * LENGTH + 1]
    return Sequences(tokens, sequence_length=LENGTH, batch_size=1, seed=3)


def mixed(batch_size: int = 16, **weights: float) -> MixedSequences:
    orders = {"small": of(0, 37), "large": of(1000, 5000), "third": of(7000, 100)}
    return MixedSequences({name: orders[name] for name in weights}, weights, batch_size, seed=5)


def members(sequences: MixedSequences, first: int, last: int) -> list[tuple[int, int]]:
    return [member for step in range(first, last) for member in sequences.members(step)]


def test_every_cycle_has_the_exact_shares() -> None:
    sequences = mixed(small=0.25, large=0.7, third=0.05)
    for cycle in range(3):
        seen = Counter(source for source, _ in members(sequences, cycle * CYCLE // 16, (cycle + 1) * CYCLE // 16))
        assert [seen[i] for i in range(3)] == [1024, 2867, 205]


def test_shares_are_near_in_every_stretch() -> None:
    """Drawn in random order within a cycle: of 256 sequences of a source with a half, 128 to five deviations."""
    seen = [source for source, _ in members(mixed(small=0.5, large=0.5), 0, 64)]
    for start in range(0, len(seen), 256):
        assert abs(seen[start : start + 256].count(0) - 128) < 40


def test_a_source_repeats_nothing_within_an_epoch_of_its_own() -> None:
    """Entries of a cycle are in any order, so that an epoch is complete where a cycle ends."""
    cycles = 10
    found = members(mixed(small=0.25, large=0.75), 0, cycles * CYCLE // 16)
    small = Counter(index for source, index in found if source == 0)
    assert set(small) == set(range(37)) and max(small.values()) - min(small.values()) <= 1
    large = Counter(index for source, index in found if source == 1)  # 30,720 of 5,000: six epochs and a part
    assert len(large) == 5000 and set(large.values()) == {6, 7}


def test_batches_are_those_of_their_members_at_any_world_size() -> None:
    sequences = mixed(small=0.3, large=0.7)
    for step in (0, 255, 256, 10_000):
        whole = sequences.batch(step)
        assert whole.dtype == torch.int64 and whole.shape == (16, LENGTH + 1)
        first = {0: 0, 1: 1000}
        assert whole[:, 0].tolist() == [first[source] + index for source, index in sequences.members(step)]
        assert torch.equal(torch.cat([sequences.batch(step, rank, 4) for rank in range(4)]), whole)


def test_the_order_is_a_pure_function_of_seed_and_step() -> None:
    walked = mixed(small=0.3, large=0.7)
    for step in (300, 0, 2, 2, 299):
        assert walked.members(step) == mixed(small=0.3, large=0.7).members(step)


def test_shares_are_apportioned_by_largest_remainders() -> None:
    assert apportioned([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert apportioned([1 / 3] * 3, 10) == [4, 3, 3]
    assert apportioned([0.999, 0.001], 10) == [10, 0]


# From files.


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.txt").write_text("a" * 4000)
    (tmp_path / "b.jsonl").write_text("".join('{"body": "' + "b" * 400 + '"}\n' for _ in range(50)))
    jsonl = {"path": str(tmp_path / "b.jsonl"), "field": "body", "weight": 3}
    return {"letters": {"path": str(tmp_path / "a.txt"), "weight": 1}, "lines": jsonl}


def mixture(tmp_path: Path, sources: Any, **options: Any) -> Mixture:
    return Mixture(sources=sources, cache_dir=str(tmp_path / "cache"), validation_fraction=0.1, **options)


def test_training_and_validation_have_the_shares_of_the_files(tmp_path: Path, texts: dict[str, Any]) -> None:
    data = mixture(tmp_path, texts)
    data.check()
    corpus = data.build()
    sizes: dict[str, Any] = dict(sequence_length=16, batch_size=8)
    train = data.sequences(corpus, **sizes, seed=0)
    letters = sum(int((train.batch(step)[:, 3:] == ord("a")).any(1).sum()) for step in range(CYCLE // 8))
    assert letters == CYCLE // 4
    validation = data.validation_sequences(corpus, **sizes, max_sequences=32)
    batches = list(validation.batches())
    assert validation.sequences == 32 and len(batches) == len(validation) == 4
    assert [int((batch == ord("a")).any(1).sum()) for batch in batches] == [2, 2, 2, 2]
    blocks = [torch.cat(list(validation.batches(rank, 2))[i : i + 1]) for i in range(4) for rank in range(2)]
    assert torch.equal(torch.cat(blocks), torch.cat(batches))
    assert corpus.source.startswith("letters 25.0% of text: ") and corpus.sizes["train"] > 20_000


def test_other_weights_are_other_data(tmp_path: Path, texts: dict[str, Any]) -> None:
    same = [mixture(tmp_path, texts).build().digest for _ in range(2)]
    other = mixture(tmp_path, {**texts, "lines": {**texts["lines"], "weight": 2}}).build().digest
    assert same[0] == same[1] != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, r"data\.sources\.lines: weight must be a number > 0, got 0"),
        ({"weight": "much"}, r"data\.sources\.lines: weight"),
        ({"path": "/nowhere/at all"}, r"data\.sources\.lines: .* does not exist"),
        ({"paht": "x"}, r"data\.sources\.lines: 'paht' is no option of a source; it has path"),
        ({"weight": 1e-5}, r"data\.sources\.lines\.weight is less than 1/4096"),
        ({"field": "text"}, r"data\.sources\.lines: .* has no text under 'text'"),
    ],
)
def test_a_wrong_source_is_refused_by_name(
    tmp_path: Path, texts: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(tmp_path, {**texts, "lines": {**texts["lines"], **change}}).check()


@pytest.mark.parametrize("sources", [{}, {"web": "web.jsonl"}, ["web.jsonl"], None])
def test_sources_that_are_none_are_refused(tmp_path: Path, sources: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.sources must be sources by name"):
        mixture(tmp_path, sources).check()
