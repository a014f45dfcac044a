"""Tokens that a pretrained model and its tokenizer get in addition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distopt.data.sft import CompletionData
from distopt.data.text_data import TextData
from distopt.models import pretrained
from distopt.models.language_model import LanguageModel, blocks
from tests.harness.distributed import run
from tests.harness.engines import ENGINES, full
from tests.harness.pretrained import chats, write_lines, write_tokenizer

NEW = ["<|tool|>", "<|end of tool|>"]
CPU = torch.device("cpu")


def write(folder: Path, vocabulary: int, tied: bool) -> LlamaForCausalLM:
    """A model with a row for each of the 400 tokens of its tokenizer, and perhaps for ids that no token has."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def weights(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """The parameters of the model with two more tokens, as an engine builds it."""
    language_model, engine = LanguageModel(path=str(folder), add_tokens=NEW), ENGINES[kind]()
    model = language_model.empty(language_model.describe(402))

    def fill(unit: Any, device: torch.device) -> None:
        language_model.fill(model, unit, device, share=engine.share())

    built = engine.build(model, blocks(model), fill, CPU)
    return {name: value.numpy() for name, value in full(engine.unwrap(built)).items()}


@pytest.mark.parametrize(("vocabulary", "tied"), [(400, True), (400, False), (416, False), (401, True)])
@pytest.mark.parametrize("kind", ["ddp", "zero1", "fsdp2"])
def test_new_rows_are_the_mean_of_the_old(tmp_path: Path, kind: str, vocabulary: int, tied: bool) -> None:
    """On every rank's own share; rows for ids that no token had are those of the new tokens, or stay as they are."""
    model = write(tmp_path, vocabulary, tied)
    rows = max(402, vocabulary)
    for found in run(3, weights, tmp_path, kind):
        for name, old in model.named_parameters():
            value, old = torch.from_numpy(found[name]), old.detach()
            if old.shape[0] != vocabulary:
                assert torch.equal(value, old), name
                continue
            assert value.shape == (rows, 16)
            assert torch.equal(value[:400], old[:400])
            mean = old[:400].double().mean(dim=0).float().expand(2, -1)
            torch.testing.assert_close(value[400:402], mean, rtol=1e-5, atol=1e-8)
            assert torch.equal(value[402:], old[402:])


def test_data_and_checkpoint_have_the_tokenizer(tmp_path: Path) -> None:
    """One token each in what is trained on, and in the files from which a checkpoint is exported."""
    write(tmp_path / "base", 400, tied=True)
    path = write_lines(
        tmp_path / "a.jsonl", [{"prompt": f"{NEW[0]}x{NEW[1]}", "completion": f"y{i}"} for i in range(9)]
    )
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "base"), "add_tokens": NEW, "cache_dir": str(tmp_path / "c")}
    corpus = CompletionData(path=str(path), **options).build()
    assert corpus.train.tokens[:3].tolist() == [400, *corpus.encoder.tokenizer.encode("x"), 401]
    text = tmp_path / "a.txt"
    text.write_text(f"{NEW[1]} and words " * 50)
    stream = TextData(path=str(text), **options).build()
    assert stream.vocab_size == 402 and stream.train[0] == 401
    assert len(list((tmp_path / "c").glob("tokenizer-*"))) == 1

    language_model = LanguageModel(path=str(tmp_path / "base"), add_tokens=NEW)
    language_model.check_added(corpus.pretrained_tokenizer())
    config = language_model.describe(corpus.vocab_size)
    files = pretrained.description(config, corpus.pretrained_tokenizer(), language_model.path)
    with pretrained.written(files) as folder:
        kept = AutoTokenizer.from_pretrained(folder)
        assert (
            kept.convert_tokens_to_ids(NEW) == [400, 401]
            and kept.chat_template == AutoTokenizer.from_pretrained(tmp_path / "base").chat_template
        )
        assert pretrained.configuration(files).vocab_size == 402


def test_bytes_get_tokens_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<|tool|>né" * 50)
    corpus = TextData(path=str(tmp_path / "a.txt"), add_tokens=NEW, cache_dir=str(tmp_path)).build()
    assert corpus.vocab_size == 258 and corpus.train[:4].tolist() == [256, ord("n"), 0xC3, 0xA9]


def test_what_cannot_be_added_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "base", 400, tied=True)
    path = str(write_lines(tmp_path / "a.jsonl", chats()))

    def check(tokens: Any) -> None:
        CompletionData(path=path, tokenizer=str(tmp_path / "base"), add_tokens=tokens, cache_dir=str(tmp_path)).check()

    for tokens, line in (
        (["<|user|>"], r"model.add_tokens: '<\|user\|>' is a token of tokenizer .*base already, or given twice"),
        (["<|a|>", "<|a|>"], r"model.add_tokens: '<\|a\|>' is a token of .* already, or given twice"),
        ("<|a|>", r"model.add_tokens must be tokens such as \['<\|user\|>', '<\|tool\|>'\], got '<\|a\|>'"),
        ([""], "model.add_tokens must be tokens such as"),
    ):
        with pytest.raises(ValueError, match=line):
            check(tokens)
    with pytest.raises(ValueError, match=r"the data has 403 tokens, the model in .* only 400"):
        LanguageModel(path=str(tmp_path / "base"), add_tokens=NEW).describe(403)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"and not the last ones: give data.add_tokens"):
        LanguageModel(path=str(tmp_path / "base"), add_tokens=NEW).check_added(tokenizer)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.vocab_size == 400
