"""A private name of another library that has moved is named, with the version that distopt was written for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator

import distopt
from distopt.integrations.accelerate import private as accelerate_private
from distopt.layout import deepspeed_private
from distopt.models import transformers_private
from distopt.models.language_model import LanguageModel


@pytest.mark.parametrize("name", ["_models", "_optimizers", "_schedulers"])
def test_a_private_name_of_accelerate_that_moves_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, distopt.SGD(model.parameters(), lr=0.1))
    monkeypatch.delattr(accelerator, name)
    with pytest.raises(ValueError, match=rf"Accelerator has no '{name}' any more: .* Accelerate 1\.15; install"):
        distopt.attach(accelerator, model, optimizer)


GROUPS_12 = ("real_dp_process_group", "bit16_groups", "single_partition_of_fp32_groups", "bit16_groups_flat")
GROUPS_3 = ("sub_group_to_group_id", "fp32_partitioned_groups_flat", "fp16_groups")
PARAM: Any = torch.zeros(1)
# What is read of DeepSpeed's optimizer wrapper, and by which names. tests/test_deepspeed.py removes names from real
# ones.
READS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "flat groups": (deepspeed_private.flat_groups, GROUPS_12),
    "sub-groups": (deepspeed_private.sub_groups, GROUPS_3),
    "position": (lambda zero: deepspeed_private.position(zero, PARAM), ("grad_position", "get_param_id")),
    "norm": (deepspeed_private.global_grad_norm, ("_global_grad_norm",)),
    "gradients 1": (lambda zero: deepspeed_private.zero_gradients(zero, 1), ("single_partition_of_fp32_groups",)),
    "gradients 3": (lambda zero: deepspeed_private.zero_gradients(zero, 3), ("grad_partitions_flat_buffer",)),
    "clipping": (lambda zero: deepspeed_private.unclipped(zero).__enter__(), ("clip_grad",)),
    "op": (deepspeed_private.skip_shared_memory_op, ("__compatible_ops__",)),
    "own part": (deepspeed_private.own_part, ("ds_tensor", "ds_numel")),
    "ranks": (deepspeed_private.partition_group, ("ds_process_group",)),
}


@pytest.mark.parametrize(("what", "missing"), [(what, name) for what, (_, names) in READS.items() for name in names])
def test_a_private_name_of_deepspeed_that_moves_is_named(
    what: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, names = READS[what]
    zero = SimpleNamespace(**{name: [torch.zeros(1)] for name in names})
    monkeypatch.delattr(zero, missing)
    with pytest.raises(ValueError, match=rf"has no '{missing}' any more: .* DeepSpeed 0\.19\.8; install that version$"):
        read(zero)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model."""
    config = transformers.GPT2Config(vocab_size=8, n_layer=1, n_head=1, n_embd=4, n_positions=8)
    folder = tmp_path_factory.mktemp("saved")
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in transformers_private.NAMES.items() for name in names]
)
def test_a_private_name_of_transformers_that_moves_is_named(
    module: str, name: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LanguageModel(path=str(saved)).check()
    monkeypatch.delattr(import_module(f"transformers.{module}"), name)
    with pytest.raises(
        ValueError, match=rf"transformers\.{module} has no '{name}' any more: .* 5\.20 to 5\.23; install"
    ):
        LanguageModel(path=str(saved)).check()


@pytest.mark.parametrize("name", ["_adjust_missing_and_unexpected_keys", "all_tied_weights_keys"])
def test_a_private_method_of_transformers_that_moves_is_named(name: str) -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8))
    transformers_private.method(model, name)
    with pytest.raises(ValueError, match=rf"Linear has no '{name}' any more: .* 5\.20 to 5\.23; install"):
        transformers_private.method(torch.nn.Linear(1, 1), name)


def test_the_versions_are_those_that_are_tested() -> None:
    first, last = (tuple(map(int, text.split("."))) for text in transformers_private.VERSIONS.split(" to "))
    assert first <= tuple(map(int, version("transformers").split(".")[:2])) <= last
    assert version("deepspeed") == deepspeed_private.VERSION
    assert version("accelerate").startswith(f"{accelerate_private.VERSION}.")
