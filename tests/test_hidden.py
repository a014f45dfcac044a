"""The split of a model into hidden matrices and the rest."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import nn

import distopt
from distopt.optim.param_groups import param_groups
from tests.harness.engines import CONFIGS, EXPERTS


def rules(model: nn.Module, **options: object) -> dict[str, str]:
    groups = param_groups(model, matrices="muon", **options)  # type: ignore[arg-type]
    distopt.Muon(groups)  # takes them all
    return {name: group["rule"] for group in groups for name in group["param_names"]}


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_the_matrices_of_the_blocks_have_muon_and_all_else_adamw(family: str) -> None:
    """Embeddings, the output layer (tied in GPT-2), norms and biases are no hidden matrices; stacked experts are."""
    config = transformers.AutoConfig.for_model(family, vocab_size=61, **(CONFIGS | EXPERTS)[family])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = rules(model)
    blocks = {name for name, p in model.named_parameters() if p.ndim > 1 and (".h." in name or ".layers." in name)}
    assert {name for name, rule in found.items() if rule == "muon"} == blocks
    assert found.keys() == dict(model.named_parameters()).keys()


class Vision(nn.Module):
    """What is a matrix by its shape, but none by its place."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.filter = nn.Conv1d(8, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)
        self.column = nn.Linear(8, 1)
        self.mlp = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)


def test_inputs_outputs_and_filters_of_one_dimension_are_no_hidden_matrices(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        found = rules(Vision())
    assert [name for name, rule in found.items() if rule == "muon"] == ["conv.weight", "mlp.weight"]
    assert "2 parameters have the rule muon, 11 parameters have the rule adamw" in caplog.text
    assert "2 head (head.weight" not in caplog.text and "1 filter (filter.weight)" in caplog.text


def test_an_override_names_another_rule() -> None:
    found = rules(Vision(), overrides={"mlp": {"rule": "lion", "lr": 1e-4}}, others="lion")
    assert {name for name, rule in found.items() if rule == "muon"} == {"conv.weight"}
    assert "adamw" not in found.values()


def test_an_optimizer_with_one_rule_refuses_groups_that_name_one() -> None:
    with pytest.raises(ValueError, match="names the rule 'muon', and this optimizer has one rule"):
        distopt.AdamW(param_groups(Vision(), matrices="muon"))
    with pytest.raises(ValueError, match="rule must be one of muon, adamw, lion, got 'shampoo'"):
        distopt.Muon(param_groups(Vision(), matrices="shampoo"))


def test_mup_has_no_row_for_matrices() -> None:
    """It multiplied the rate of Muon's groups by Adam's factor of the width."""
    with pytest.raises(ValueError, match="muP's table has no row for the steps of matrices='muon'"):
        param_groups(Vision(), mup=Vision(), lr=1e-3, matrices="muon")
