"""The page on parts of one's own, as its reader would use it; freezing; what is refused."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.nn import functional as F

from distopt.data.batch import Batch, next_token_loss
from distopt.models.language_model import LanguageModel
from tests.harness import jobs, pages
from tests.harness.engines import CONFIGS
from tests.harness.jobs import metrics

PAGE = jobs.ROOT / "docs" / "own-parts.md"
MORE = ("loss.weight=0.1", "evaluation.every=100", "evaluation.sample_tokens=8", "checkpoint.every=1000", "trackers=[]")


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the page."""
    folder = tmp_path_factory.mktemp("own")
    for block in pages.blocks(PAGE):
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code)
    return folder


def words() -> list[str]:
    """The words of the page's command."""
    (block,) = [block for block in pages.blocks(PAGE) if block.kind == "bash"]
    return [*shlex.split(block.code.replace("\\\n", " "))[2:], *MORE]


def find_modules() -> None:
    sys.path.insert(0, "")  # as `python -m` does


def test_all_parts_train_together(cwd: Path) -> None:
    ended = jobs.run(cwd, words(), 2, find_modules)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err
    rows = metrics(cwd / "runs" / "own")
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert losses[-1] < 0.5 * losses[0]
    perplexities = [row["perplexity"] for row in rows if "validation_loss" in row]
    assert perplexities == pytest.approx([math.exp(loss) for loss in losses])
    rates = [row["lr"] for row in rows if "lr" in row]
    assert max(rates) == pytest.approx(2e-3) and rates[0] < max(rates) > rates[-1]
    first = next(row["loss"] for row in rows if "loss" in row)
    assert first > losses[0] + 2  # about 0.1 log(256)^2
    cfg = OmegaConf.load(cwd / "runs" / "own" / "config.yaml")
    assert cfg.train.steps == math.ceil(4 * (len(_sums()) - 2001) // 32 / 8)
    assert "NAdam" in ended[0].out and "of them trained" in ended[0].out and "--config-dir myconf" in ended[0].out


def _sums() -> bytes:
    return "".join(f"{a}+{b}={a + b}\0" for a in range(30) for b in range(30)).encode()


REFUSED = {
    "data.largest=1": "data: AssertionError: data.largest must be > 1",
    "model.freeze=[nowhere]": "model.freeze: 'nowhere' is found in no name of a parameter: there are model.embed_",
    "model.freeze=['(']": "model.freeze: '(' is not a regular expression (missing ), unterminated subpattern",
    "model.freeze=['']": "model.freeze must be regular expressions for names",
    "model.freeze=[.]": "model.freeze=['.'] leaves nothing to train: freeze less",
    "+model.chunked_loss=true": "model.chunked_loss=true: this loss needs the logits",
    "schedule._target_=torch.optim.lr_scheduler.ExponentialLR ~schedule.peak +schedule.gamma=0.9": "schedule",
    "loss._target_=torch.nn.functional.cross_entropy ~loss.weight +loss.reduction=none": "loss: it must return the sum",
    "loss._target_=zloss.nothing": "loss",
    "optimizer._target_=mine.Sums ~optimizer.lr": "optimizer",
}


@pytest.fixture(scope="module")
def refused(cwd: Path) -> dict[str, jobs.Ended]:
    """The end of each of these commands, all of them in one process."""
    commands = [[*words(), *more.split()] for more in REFUSED]
    return dict(zip(REFUSED, jobs.one_after_another(cwd, commands, find=True)))


@pytest.mark.parametrize(("more", "expected"), REFUSED.items(), ids=REFUSED)
def test_what_does_not_fit_is_refused_in_a_line(refused: dict[str, jobs.Ended], more: str, expected: str) -> None:
    (line,) = refused[more].err.strip().splitlines()
    assert line.startswith("distopt: error: ") and expected in line


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_parameters_are_those_of_the_patterns(family: str) -> None:
    source = LanguageModel(family, CONFIGS[family], freeze=["wte|embed_tokens", r"(h|layers)\.0\."])
    model = source.empty(source.describe(61))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert trained and all(".0." not in name and "embed" not in name and "wte" not in name for name in trained)
    assert {name for name in frozen if ".1." in name} == set()
    tied = LanguageModel("gpt2", CONFIGS["gpt2"], freeze=["lm_head"])
    assert not tied.empty(tied.describe(61)).get_input_embeddings().weight.requires_grad  # one weight, either name


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=0.1)


def test_a_loss_is_the_mean_over_all_targets_of_a_step() -> None:
    """Of micro-batches with unequal numbers of targets, as with the cross-entropy."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = torch.nn.Embedding(7, 7)

        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            return type("Output", (), {"logits": self.table(input_ids)})

    model, tokens = Model(), torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens[:, 1:].clone()
    labels[0, 2:] = -100
    batch = Batch(tokens[:, :-1], labels, None, targets=float((labels >= 0).sum()) / 2)
    parts = [next_token_loss(model, part, of_logits=smoothed) for part in batch.split(1)]
    logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    expected = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, label_smoothing=0.1)
    torch.testing.assert_close(torch.stack(parts).mean(), expected)
    whole = F.cross_entropy(logits, tokens[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(next_token_loss(model, tokens, of_logits=smoothed), whole)
