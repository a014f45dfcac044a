"""`model.attention`: the implementations compute the same, and one that is not there is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distopt.models.language_model import LanguageModel, blocks
from tests.test_weights import FAMILIES, SIZES


def logits_and_gradient(family: str, attention: str | None) -> tuple[Tensor, Tensor, str]:
    sizes = {
        name: value for name, value in FAMILIES[family].items() if name not in ("vocab_size", "tie_word_embeddings")
    }
    source = LanguageModel(family, sizes, attention=attention)
    model = source.empty(source.describe(SIZES["vocab_size"]))
    for unit in (*blocks(model), model):
        source.fill(model, unit, torch.device("cpu"))
    model.eval()
    tokens = torch.arange(48).reshape(2, 24) * 7 % SIZES["vocab_size"]
    logits = model(input_ids=tokens).logits
    logits.square().mean().backward()
    first = next(blocks(model)[0].parameters()).grad
    assert first is not None
    return logits.detach(), first, model.config._attn_implementation


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_implementations_compute_the_same(family: str) -> None:
    """To 1e-5, the rounding of float32 in softmax and products; each is the one that was asked for."""
    fused, eager = logits_and_gradient(family, "sdpa"), logits_and_gradient(family, "eager")
    assert (fused[2], eager[2], logits_and_gradient(family, None)[2]) == ("sdpa", "eager", "sdpa")
    torch.testing.assert_close(fused[0], eager[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused[1], eager[1], rtol=1e-4, atol=1e-6)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.attention must be"):
        LanguageModel("llama", SIZES, attention="fast")
    with pytest.raises(ValueError, match="are the same option: give one of them"):
        LanguageModel("llama", {**SIZES, "attn_implementation": "eager"}, attention="sdpa")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"model\.attention=flash needs a GPU, which is not there: use sdpa"):
            LanguageModel("llama", SIZES, attention="flash")
