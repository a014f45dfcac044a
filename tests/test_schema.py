"""The schema of the configuration: every leaf of conf/ has a row, and every wrong value is refused in one line.

All in one process: `check` on a composed configuration, then what its sections name for a tiny tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

import distopt
from distopt.data.sft import CompletionData
from distopt.data.text_data import TextData
from distopt.engine import Zero1
from distopt.job.check import check
from distopt.job.components import Components
from distopt.job.config import CONF, instantiate, named
from distopt.job.reference import page
from distopt.job.schema import HYDRA, SCHEMA, SECTIONS, find
from distopt.models.language_model import LanguageModel
from distopt.models.lora import LoRA
from distopt.plan.cost import Cluster

GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "experiment")
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
# Null, text, a list, a dictionary, a boolean, and numbers that are negative, too large for a float, or no number.
WRONG: list[Any] = [None, "abc", "", ["a"], [1], {"a": 1}, True, -1, -0.5, math.nan, math.inf, 10**400]


@functools.cache
def composed(config: str | None, *overrides: str) -> DictConfig:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose(config, overrides=list(overrides))


def alone(choice: tuple[str, str]) -> DictConfig:
    """A file of a group by itself, in a tenth of the time; `test_configs` composes each with all others."""
    return composed(None, f"+{choice[0]}={choice[1]}")


@functools.cache
def chosen(config: str, choice: tuple[str, str] | None) -> DictConfig:
    """A configuration with another choice of one group; the same object for the same words, so not to be changed."""
    if choice is None:
        return composed(config)
    cfg, group = composed(config).copy(), choice[0]
    cfg[group] = alone(choice)[group]
    return cfg


def leaves(cfg: DictConfig) -> list[str]:
    """The keys that hold a value, however deep, but for those within `model.config`."""

    def walk(node: Any, path: str) -> Iterator[str]:
        for name, value in node.items():
            below = f"{path}.{name}" if path else name
            if isinstance(value, dict) and below in SECTIONS:
                yield from walk(value, below)
            else:
                yield below

    return list(walk(OmegaConf.to_container(cfg), ""))


def sources() -> Iterator[tuple[str, tuple[str, str] | None, str]]:
    """Every leaf of conf/ once: a configuration, the choice that it is made of, and the key."""
    for key in leaves(composed("train")):
        yield "train", None, key
    for key in leaves(composed("plan")):
        if key.partition(".")[0] not in GROUPS:
            yield "plan", None, key
    for choice in CHOICES:
        for key in leaves(alone(choice)):
            yield "train", choice, key


SOURCES = [*sources()]


def test_every_leaf_has_a_row_and_every_row_a_leaf() -> None:
    keys = {key for _, _, key in SOURCES if key.rpartition(".")[2] not in HYDRA}
    of_all = ("capturable", "cautious", "cautious_decay", "master_weights")
    assert keys == set(SCHEMA) - {f"optimizer.{name}" for name in of_all}


@pytest.mark.parametrize("config", ["train", "plan"])
def test_what_stands_in_conf_is_accepted(config: str) -> None:
    check(composed(config), config)
    for choice in CHOICES if config == "train" else []:
        check(chosen("train", choice), "train")
    for file in (CONF / "experiment").glob("*.yaml") if config == "train" else []:
        check(composed("train", f"experiment={file.stem}"), "train")


@pytest.mark.parametrize(
    ("config", "choice", "key"),
    SOURCES,
    ids=lambda value: "=".join(value) if isinstance(value, tuple) else value or "conf",
)
def test_every_leaf_refuses_what_is_wrong_in_one_line(config: str, choice: tuple[str, str] | None, key: str) -> None:
    """What the schema accepts, the constructor accepts too, or refuses by a ValueError that names the section."""
    section, _, name = key.rpartition(".")
    row, refused = find(section, name), 0
    assert row is not None
    cfg = chosen(config, choice).copy()
    for value in WRONG:
        OmegaConf.update(cfg, key, value, merge=False)
        try:
            check(cfg, config)
        except ValueError as error:
            line = str(error)
            if row.bound.accepts(value):  # of train.steps=null, for which another key has to be there
                assert "\n" not in line and line.startswith(f"{key}=")
                continue
            assert "\n" not in line and line.startswith(f"{key} must be {row.bound}"), line
            shown = "an integer beyond the largest float" if value == 10**400 else repr(value)
            assert f"got {shown}" in line, line
            refused += 1
        else:
            assert row.bound.null if value is None else row.bound.holds(value)
            construct(cfg, config, section, key)
    # Text is what free text may be, and a name, a path or an import path looks like any other.
    assert refused >= (8 if row.bound.holds("abc") else 9)


def construct(cfg: DictConfig, config: str, section: str, key: str) -> None:
    """Makes what a section names; what it may refuse depends on other keys or on the machine, and it says which."""
    if section not in GROUPS or key.endswith("._target_") or config != "train":
        return
    try:
        made = instantiate(cfg, section)
        with named(section):
            if section in ("optimizer", "sam", "schedule"):
                tensor = [torch.zeros(2, 2, requires_grad=True)]
                make = made if section == "optimizer" else instantiate(composed("train"), "optimizer")
                optimizer = make(tensor)
                if section == "schedule":
                    made(optimizer, total_steps=1000)
                if section == "sam":
                    made(optimizer)
    except ValueError as error:
        assert section in str(error) and "\n" not in str(error), error


REFUSED: dict[str, tuple[str, ...]] = {
    "train": (
        "+foo=1: nothing reads foo. There are",
        "+train.stepz=1: nothing reads train.stepz: did you mean steps?",
        "+param_groups.foo=1: nothing reads param_groups.foo",
        "+optimizer.lrr=1: nothing reads optimizer.lrr: did you mean lr?",
        "~train.steps: train.steps is missing",
        "~engine: engine is missing",
        "~optimizer._target_: optimizer._target_ is missing",
        "optimizer._target_=: optimizer._target_ must be the import path of a class or function, got ''",
        "optimizer._convert_=nope: optimizer._convert_ must be all, got 'nope'",
        "optimizer._partial_=abc: optimizer._partial_ must be true or false, got 'abc'",
        "+optimizer._recursive_=abc: optimizer._recursive_ must be true or false, got 'abc'",
        "train=3: train must be options by name, got 3",
        "param_groups=3: param_groups must be options by name, got 3",
        "param_groups=null: param_groups must be options by name, got None; to decay nothing",
        "optimizer.lr=${nope}: optimizer.lr: Interpolation key 'nope' not found",
        "optimizer.betas=[0.9,${nope}]: optimizer.betas[1]: Interpolation key 'nope' not found",
        "train.steps=???: train.steps is missing: it is needed",
        "param_groups.overrides={wte:{lr:-1}}: param_groups.overrides.wte.lr must be a number >= 0, got -1",
        "param_groups.overrides={wte:{sam_rho:abc}}: param_groups.overrides.wte.sam_rho must be a number > 0",
        "param_groups.overrides={wte:3}: must be options by pattern, such as {wte: {lr: 1e-4}}, or null, got",
        "model.config.resid_pdrop=nan: model.config.resid_pdrop must be a number in [0, 1], got nan",
        "model.config.resid_pdrop=-1: model.config.resid_pdrop must be a number in [0, 1], got -1",
        "+model.config.layer_norm_epsilon=inf: model.config.layer_norm_epsilon must be a finite number, got inf",
        "seed=18446744073709551616: seed must be an integer >= 0, and less than 2^63, got 18446744073709551616",
        "train.timeout_minutes=1e18: train.timeout_minutes must be a number in [0.1, 525600], got 1e+18",
        "name={a:1}: name must be the name of a folder below runs/, got {'a': 1}",
    ),
    "plan": (
        "+foo=3: nothing reads foo",
        "+cluster.nodes=3: nothing reads cluster.nodes",
        "cluster.efficiency=1.5: cluster.efficiency must be a number in (0, 1], got 1.5",
        "nodes=two: nodes must be an integer >= 1, got 'two'",
        "model.config=: model.config must be options by name",
    ),
}


@pytest.mark.parametrize(("config", "row"), [(config, row) for config, rows in REFUSED.items() for row in rows])
def test_what_does_not_fit_is_refused_by_name(config: str, row: str) -> None:
    word, _, expected = row.partition(": ")
    with pytest.raises(ValueError) as error:
        check(composed(config, word), config)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_somebodys_own_class_has_keys_of_its_own() -> None:
    check(composed("train", "optimizer._target_=signum.Signum", "+optimizer.blend=-3", "~optimizer.eps"), "train")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("optimizer._target_=builtins.dict", "optimizer._target_ makes dict, and not Optimizer"),
        ("optimizer._partial_=false", "optimizer: TypeError: "),
        ("schedule._target_=distopt.AdamW", "schedule: "),
        ("model._target_=builtins.dict", "model._target_ makes dict, and not LanguageModel"),
        ("+engine._partial_=true", "engine._target_ makes _DeferredTarget, and not Engine"),
        ("engine._target_=distopt.nope", "engine: ImportError: Error loading 'distopt.nope'"),
        ("param_groups.overrides={wqe:{lr:1}}", "param_groups: no trainable parameter matches the override 'wqe'"),
        (
            "+model.config.activation_function=nope",
            "model.config.activation_function=nope: GPT2Config builds no model (KeyError: ",
        ),
        ("schedule.warmup_steps=1000", "schedule: warmup longer than the run: warmup_steps must be less than"),
    ],
)
def test_what_a_target_makes_is_what_the_job_needs(words: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        Components.of(composed("train", *words.split()))
    assert str(error.value).startswith(expected), error.value


ADAM = distopt.Adam([torch.zeros(2, requires_grad=True)])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(Zero1, overlap_gather="abc"), "engine.overlap_gather must be true or false, got 'abc'"),
        (partial(Zero1, reduce_dtype=["bf16"]), "engine.reduce_dtype must be one of fp32, bf16 or null, got ['bf16']"),
        (partial(distopt.FunctionalSAM, ADAM, precondition=1), "precondition must be true or false, got 1"),
        (partial(LoRA, dropout=float("nan")), "adapter.dropout must be a number in [0, 1), got nan"),
        (partial(LoRA, target_modules=[]), "adapter.target_modules must be all-linear, or names such as"),
        (partial(LanguageModel, "gpt2", seed=-1), "model.seed must be an integer >= 0, got -1"),
        (
            TextData(path="a", suffixes=[1]).check,
            "data.suffixes must be endings of names, such as [.txt, .md], got ",
        ),
        (TextData(path="a", tokenizer="").check, "data.tokenizer must be a path or null, got ''"),
        (CompletionData(path="a", ignore="id").check, "data.ignore must be names of fields, such as [id, source], got"),
        (partial(Cluster, nodes=1, gpus_per_node=True), "gpus_per_node must be an integer >= 1, got True"),
        (partial(Cluster, nodes=1, gpus_per_node=1, tflops=math.inf), "tflops must be a number > 0, got inf"),
        (partial(distopt.param_groups, nn.Linear(1, 1), overrides="wte"), "overrides must be options by pattern, such"),
        (partial(distopt.param_groups, nn.Linear(1, 1), True), "weight_decay must be a number >= 0, got True"),
    ],
)
def test_constructors_refuse_by_the_same_bounds_without_hydra(make: Callable[[], object], expected: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(expected), error.value


def test_the_page_of_the_keys_is_up_to_date() -> None:
    """`python -m distopt.job.reference > docs/configuration.md` writes it."""
    assert (Path(__file__).parents[1] / "docs" / "configuration.md").read_text() == page()


def test_key_value_heads_divide_the_heads() -> None:
    """No family of transformers refuses others, and the first forward pass ended in a traceback."""
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 3, "hidden_size": 16}
    with pytest.raises(ValueError, match=r"num_key_value_heads=3 does not divide the 4 attention heads"):
        LanguageModel("llama", heads).check()
