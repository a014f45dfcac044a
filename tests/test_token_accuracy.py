"""The accuracy of next tokens, with the logits and without, and the tokens that are counted: no padding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distopt.data.accuracy import Counts, TokenAccuracy
from distopt.data.batch import Batch, counted, next_token_loss
from distopt.data.packing import Examples, PackedSequences
from distopt.data.separate import separated
from distopt.job.totals import Totals
from distopt.models.language_model import LanguageModel
from tests.harness import jobs
from tests.harness.cells import some
from tests.harness.engines import CONFIGS


@pytest.fixture(scope="module")
def model() -> Any:
    source = LanguageModel("gpt2", CONFIGS["gpt2"])
    torch.manual_seed(0)
    made = type(source.empty(source.describe(61)))(source.describe(61)).eval()
    made.lm_head.weight.data *= 20.0  # so that some targets are the most likely tokens
    return made


def learnt(model: Any) -> torch.Tensor:
    """Sequences of which about half of the tokens are the most likely ones."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 61, (4, 9), generator=generator)
    with torch.no_grad():
        for i in range(8):
            best = model(tokens[:, : i + 1]).logits[:, -1].argmax(-1)
            tokens[:, i + 1] = torch.where(torch.rand(4, generator=generator) < 0.5, best, tokens[:, i + 1])
    return tokens


def expected(model: Any, inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """Counted one by one, in float64."""
    with torch.no_grad():
        best = model.double()(inputs).logits.numpy().argmax(-1)
    model.float()
    pairs = [(b, y) for row, ys in zip(best, labels.tolist()) for b, y in zip(row, ys) if y != -100]
    return sum(int(b == y) for b, y in pairs) / len(pairs)


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["text", "examples"])
def test_the_accuracy_is_that_of_all_targets_of_a_step(
    model: Any, kind: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of micro-batches with unequal numbers of targets; the loss is bit for bit the same without."""
    monkeypatch.setattr("distopt.data.cross_entropy.CHUNK", 3 * 61)
    monkeypatch.setattr(model, "chunked_loss", chunked, raising=False)
    tokens = learnt(model)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    batch: Any = tokens
    if kind == "examples":
        labels[0, 2:], labels[3, :5] = -100, -100
        batch = Batch(inputs, labels, None, targets=float((labels != -100).sum()) / 4)
    right = expected(model, inputs, labels)
    assert 0.3 < right < 0.9
    accuracy = TokenAccuracy()
    accuracy.start(2)
    for _ in range(2):  # the second time is SAM's second pass, which does not count
        losses = [next_token_loss(model, part, accuracy=accuracy) for part in batch.split(2)]
    assert float(accuracy.value(losses[0])) == pytest.approx(right, abs=1e-6)
    assert all(torch.equal(loss, next_token_loss(model, part)) for loss, part in zip(losses, batch.split(2)))
    accuracy.start(2)
    assert accuracy.value(losses[0]).isnan()  # of a loss that counts nothing


def test_of_equal_logits_one_is_the_largest(model: Any) -> None:
    """All 16-bit logits of a new model are often equal: each target would count."""
    logits = torch.zeros(1, 61, 61, dtype=torch.bfloat16)
    accuracy = TokenAccuracy()
    accuracy.start(1)

    class Undecided(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": logits})

    next_token_loss(Undecided(), torch.arange(62)[None] % 61, accuracy=accuracy)
    assert float(accuracy.value(torch.zeros(()))) == pytest.approx(1 / 61)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world", some([1, 2], [1, 2, 4]))
def test_every_rank_counts_the_whole_batch_without_its_padding(packing: bool, world: int) -> None:
    sizes = [3, 9, 5, 2, 7, 4, 6, 8]
    starts = np.cumsum([0, *sizes])
    flags = np.concatenate([[0, *[1] * (size - 1)] if size % 2 else [0] * (size - 1) + [1] for size in sizes])
    examples = Examples(np.arange(starts[-1], dtype=np.uint8), flags.astype(np.uint8), starts)
    sequences = PackedSequences(examples, sequence_length=8, batch_size=4, packing=packing)
    for step in range(3):
        whole = sequences.batch(step)
        members = (i for row in sequences.rows(step) for i in sequences._bins.members[row])
        real = sum(sizes[i] - 1 for i in members)  # the last token is only a target
        known = Counts(real, int((whole.labels != -100).sum()))
        blocks = [sequences.batch(step, rank, world) for rank in range(world)]
        assert {counted(block, world) for block in blocks} == {known}
        assert counted(blocks[0].to(torch.device("cpu")).split(4 // world)[0], world) == known


def test_of_text_every_token_is_one_and_of_separate_documents_all_but_their_ends_are_targets() -> None:
    windows = torch.tensor([[1, 2, 0, 3, 4], [5, 0, 6, 7, 8]])
    assert counted(windows, 2) == Counts(16, 16)
    assert counted(separated(windows, 0, 3.0), 2) == Counts(16, 12)


def test_totals_go_on_after_a_checkpoint_and_back_with_a_run() -> None:
    totals = Totals(7, {"tokens": 100, "target_tokens": 40, "step": 7})
    for _ in range(3):
        totals.add(Counts(10, 4))
    assert totals.row() == {"tokens": 130, "target_tokens": 52} and totals.last == Counts(10, 4)
    totals.go_back(8)
    assert totals.row() == {"tokens": 110, "target_tokens": 44}
    totals.go_back(7)
    totals.add(Counts(1, 1))
    assert totals.row() == {"tokens": 101, "target_tokens": 41}


def test_a_job_counts_and_a_resumed_one_counts_on(cwd: Path) -> None:
    """Of examples with padding, on two processes; the accuracy rises with what is learnt."""
    lines = [f'{{"prompt": "{a}+", "completion": "{"ab" * (1 + a % 4)}"}}' for a in range(40)]
    (cwd / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    words = {
        "name": "counts",
        "data": "chat",
        "data__path": "pairs.jsonl",
        "data__packing": "false",
        "optimizer__lr": "0.03",
        "evaluation__every": "8",
    }
    jobs.train(cwd, 2, **words, train__steps="4")
    jobs.train(cwd, 1, **words, train__steps="8", train__resume="auto")
    rows = jobs.metrics(cwd / "runs" / "counts")
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "validation_loss" in row]
    for before, after in itertools.pairwise(steps):
        tokens, targets = (after[name] - before[name] for name in ("tokens", "target_tokens"))
        assert 8 * 5 < tokens < 8 * 13 and 8 * 3 <= targets < tokens
    assert evaluations[-1]["validation_token_accuracy"] > evaluations[0]["validation_token_accuracy"] + 0.2
    assert steps[-1]["token_accuracy"] > steps[0]["token_accuracy"] + 0.2
