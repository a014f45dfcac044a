"""A job on data as people have it: epochs for steps, documents apart, added tokens; resumed elsewhere, and exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from distopt.data.batch_sizes import BatchSizes
from distopt.data.text_data import TextData
from distopt.job.cli import model_words
from distopt.job.lengths import check_steps, steps_of
from distopt.models.export import export
from tests.harness import jobs
from tests.harness.hub import cached
from tests.harness.jobs import metrics
from tests.harness.pretrained import write_lines, write_model

NEW = ["<|begin|>", "<|tool|>"]


def overrides(epochs: float, **changes: str) -> list[str]:
    words = {
        "model.path": "me/base",
        "model.add_tokens": f"['{NEW[0]}','{NEW[1]}']",
        "data": "text",
        "data.path": "rows",
        "data.files": "'*train*'",
        "data.field": "body",
        "data.separate": "true",
        "data.validation_fraction": "0.2",
        "data.cache_dir": "cache",
        "optimizer": "ademamix",  # whose warmup is as long as the run
        "train.epochs": str(epochs),
        "train.batch_size": "4",
        "train.sequence_length": "32",
        "schedule.warmup_steps": "2",
        "evaluation.every": "1000",
        "evaluation.sample_tokens": "0",
        "checkpoint.every": "1000",
        "trackers": "[]",
        "name": "rows",
    }
    return [f"{name}={value}" for name, value in {**words, **changes}.items()]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, and a model in the cache of the hub that the processes find."""
    folder = tmp_path_factory.mktemp("data")
    cached(folder / "hub", "me/base", write_model(folder / "base"))
    (folder / "rows").mkdir()
    rows = [{"body": f"{NEW[0]}the cat {i} sat on a mat", "id": i} for i in range(40)]
    write_lines(folder / "rows" / "train.jsonl", rows)
    write_lines(folder / "rows" / "test.jsonl", [{"text": "of another kind"}])
    return folder


def set_cache(cache: str) -> None:
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = cache


def _sequences(cwd: Path) -> int:
    """The number of training sequences."""
    tokens: dict[str, Any] = {"tokenizer": str(cwd / "base"), "add_tokens": NEW, "cache_dir": str(cwd / "cache")}
    data = TextData(path=str(cwd / "rows"), files="*train*", field="body", validation_fraction=0.2, **tokens)
    return data.sequences(data.build(), sequence_length=32, batch_size=4).count


def _steps(cwd: Path) -> list[int]:
    return [row["step"] for row in metrics(cwd / "runs" / "rows") if "loss" in row]


def test_a_run_of_epochs_is_resumed_elsewhere_and_exported(cwd: Path) -> None:
    """On two ranks under FSDP2, then on one under DDP for another epoch: as many steps as the sequences make."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = jobs.run(cwd, overrides(2, engine="fsdp2"), 2, set_cache, str(cwd / "hub"))
    assert [rank.code for rank in first] == [0, 0], first[0].err
    count = _sequences(cwd)
    steps, said = _steps(cwd), first[0].out
    assert len(steps) == steps_of(2, count, BatchSizes(4)) == -(-2 * count // 4)
    length = re.search(r"(\d+) steps of 4 x 32 = 128 tokens: [\d,]+ tokens, ([\d.]+) epochs", said)
    assert length and (int(length[1]), float(length[2])) == (len(steps), float(f"{len(steps) * 4 / count:.3g}")), said
    assert "me/base is commit 0123456789ab of the hub" in said
    cfg = OmegaConf.load(cwd / "runs" / "rows" / "config.yaml")
    assert (cfg.train.steps, cfg.train.epochs, cfg.optimizer.slow_warmup) == (len(steps), 2, len(steps))
    assert "train.epochs=4" in said and "train.steps" not in said.split("resume:")[1]

    (again,) = jobs.run(cwd, overrides(3, engine="ddp", **{"train.resume": "auto"}), 1, set_cache, str(cwd / "hub"))
    assert again.code == 0, again.err
    assert _steps(cwd) == [*range(1, steps_of(3, count, BatchSizes(4)) + 1)]
    losses = [row["validation_loss"] for row in metrics(cwd / "runs" / "rows") if "validation_loss" in row]
    assert losses[-1] < losses[0]

    export(cwd / "runs" / "rows", cwd / "out")
    tokenizer, model = AutoTokenizer.from_pretrained(cwd / "out"), AutoModelForCausalLM.from_pretrained(cwd / "out")
    assert tokenizer.convert_tokens_to_ids(NEW) == [400, 401]
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 402


def test_epochs_are_rounded_up_to_steps() -> None:
    assert [steps_of(epochs, 100, BatchSizes(8)) for epochs in (1, 2, 0.5, 0.001)] == [13, 25, 7, 1]
    assert steps_of(0.07, 100, BatchSizes(1)) == 7  # 7.000000000000001 by floating point
    assert steps_of(1, 100, BatchSizes(8, {5: 16})) == 9  # 40 sequences in five steps, and 60 in four


def test_epochs_take_the_place_of_the_default_steps() -> None:
    assert model_words(["train.epochs=3"]) == ["train.steps=null", "train.epochs=3"]
    assert model_words(["train.epochs=3", "train.steps=5"]) == ["train.epochs=3", "train.steps=5"]
    assert model_words(["train.epochs=null"]) == ["train.epochs=null"]
    for steps, epochs in ((5, 3), (None, None)):
        given = (
            f"train.steps={'null' if steps is None else steps} and train.epochs={'null' if epochs is None else epochs}"
        )
        with pytest.raises(ValueError, match=f"^{given}: give one of them, and null for the other"):
            check_steps(OmegaConf.create({"train": {"steps": steps, "epochs": epochs}}))
