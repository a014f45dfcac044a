"""`data.separate`: documents that share a sequence give the loss and the gradient of documents trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distopt.data.mixture import Mixture
from distopt.data.separate import separated
from distopt.data.text_data import TextData
from distopt.models.language_model import LanguageModel
from tests.harness.pretrained import write_tokenizer

DOCUMENTS = ["the cat sat on a mat", "dogs", "while hills and songs ran over green", "a", "sang"]
SIZES = {
    "gpt2": {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 64,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
    "llama": {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    },
}


def model_of(family: str) -> Any:
    source = LanguageModel(family, SIZES[family])
    model = source.empty(source.describe(256))
    from distopt.models.language_model import blocks

    for unit in (model, *blocks(model)):
        source.fill(model, unit, torch.device("cpu"))
    return model.double()


@pytest.mark.parametrize("family", SIZES)
def test_a_loss_is_that_of_documents_trained_alone(family: str) -> None:
    """Mean over all tokens but the first of each document, in two ranks of unequal numbers of targets, in float64."""
    model = model_of(family)
    tokens = [[*text.encode(), 0] for text in DOCUMENTS]
    losses, targets = torch.zeros((), dtype=torch.float64), 0
    for document in tokens:
        logits = model(input_ids=torch.tensor([document[:-1]])).logits[0]
        losses = losses + F.cross_entropy(logits, torch.tensor(document[1:]), reduction="sum")
        targets += len(document) - 1
    alone = torch.autograd.grad(losses / targets, list(model.parameters()))

    rows = [tokens[0] + tokens[1] + tokens[3], tokens[2] + tokens[4]]
    length = max(map(len, rows))
    padded = [row + [0] * (length - len(row)) for row in rows]  # ends of documents that are empty
    windows = torch.tensor([[*row, 0] for row in padded])
    ranks = [separated(part, 0, targets / 2).loss(model) for part in windows.split(1)]
    mean = torch.stack(ranks).mean()
    torch.testing.assert_close(mean.double(), losses / targets, rtol=1e-6, atol=0)  # the loss is computed in float32
    for ours, theirs in zip(torch.autograd.grad(mean, list(model.parameters())), alone):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    joined = model(input_ids=windows[:, :-1]).logits  # without positions the second document sees the first
    assert not torch.allclose(
        joined, model(input_ids=windows[:, :-1], position_ids=separated(windows, 0, 1).positions).logits
    )


def test_positions_begin_anew_and_ends_predict_nothing() -> None:
    batch = separated(torch.tensor([[5, 0, 7, 8, 0, 0, 9], [1, 2, 3, 4, 5, 6, 0]]), 0, 4.5)
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.labels.tolist() == [[0, -100, 8, 0, -100, -100], [2, 3, 4, 5, 6, 0]]


@pytest.mark.parametrize("kind", ["text", "mixture"])
def test_batches_are_the_same_at_any_world_size(tmp_path: Path, kind: str) -> None:
    """As those without it, in the same order, with the mean number of targets of the whole batch on every rank."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(30):
            (tmp_path / name / f"{i}.txt").write_text(f"{name} {'x' * (i % 7)}")

    def data(separate: bool) -> Any:
        common: dict[str, Any] = {"separate": separate, "validation_fraction": 0.3, "cache_dir": str(tmp_path / "c")}
        if kind == "text":
            return TextData(path=str(tmp_path / "a"), **common)
        sources = {name: {"path": str(tmp_path / name), "weight": 1} for name in "ab"}
        return Mixture(sources=sources, **common)

    sizes = {"sequence_length": 16, "batch_size": 4}
    joined, apart = (data(separate).sequences(data(separate).build(), **sizes) for separate in (False, True))
    assert data(True).build().digest != data(False).build().digest
    whole = apart.batch(3)
    assert torch.equal(whole.inputs, joined.batch(3)[:, :-1]) and joined.count == apart.count
    assert whole.targets == (whole.labels >= 0).sum() / 4 and (whole.labels < 0).any()
    parts = [apart.batch(3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert {part.targets for part in parts} == {whole.targets}
    validation = data(True).validation_sequences(data(True).build(), **sizes)
    batches = list(validation.batches())
    assert len(batches) == len(validation)
    mean = sum(int((batch.labels >= 0).sum()) for batch in batches) / validation.sequences
    assert {batch.targets for batch in batches} == {mean}


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "endless", end=None)
    (tmp_path / "a.txt").write_text("words " * 50)
    with pytest.raises(ValueError, match=r"data\.separate=true: tokenizer .* has no token that ends a text"):
        TextData(path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "endless"), separate=True).check()
    with pytest.raises(ValueError, match=r"data.separate must be true or false, got 'yes'"):
        TextData(path=str(tmp_path / "a.txt"), separate="yes").check()  # type: ignore[arg-type]
