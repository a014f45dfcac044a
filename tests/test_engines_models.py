"""Engines build models unit by unit, from drawn weights and from pretrained folders."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from distopt.layout import local
from distopt.models.language_model import LanguageModel, blocks
from tests.harness.distributed import RankError, run
from tests.harness.engines import (
    CONFIGS,
    CPU,
    ENGINES,
    VOCABULARY,
    full,
    made,
)

# Building.


def initial_of(kind: str, family: str, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(dist.get_rank())  # what was drawn before does not matter
    return full(made(LanguageModel(family, CONFIGS[family], seed=seed), ENGINES[kind]()))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_first_weights_are_the_same_on_every_engine_and_world(family: str) -> None:
    """Also those that the family's own initialisation scales by depth; another seed gives others."""
    expected = run(1, initial_of, "ddp", family, 0)[0]
    for kind, world in [("ddp", 2), ("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 4), ("zero2", 2), ("hsdp", 4)]:
        for params in run(world, initial_of, kind, family, 0):
            assert params.keys() == expected.keys()
            assert all(torch.equal(p, expected[n]) for n, p in params.items()), (kind, world)
    other = run(1, initial_of, "ddp", family, 1)[0]
    random = {n for n, p in expected.items() if p.std() > 0}
    assert {n for n in expected if not torch.equal(other[n], expected[n])} == random
    values = [p for n, p in expected.items() if n in random]
    assert not any(torch.equal(p, q) for i, p in enumerate(values) for q in values[:i] if p.shape == q.shape)


def drawn_by_transformers(family: str) -> dict[str, tuple[float, float]]:
    from transformers import AutoModelForCausalLM

    config = LanguageModel(family, CONFIGS[family]).describe(VOCABULARY)
    return {
        n: (p.mean().item(), p.std().item()) for n, p in AutoModelForCausalLM.from_config(config).named_parameters()
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_the_first_weights_are_distributed_as_the_family_draws_them(family: str) -> None:
    """Means and standard deviations of at least 1000 numbers; a c_proj of gpt2 has half the deviation of a c_fc."""
    ours = run(1, initial_of, "ddp", family, 0)[0]
    theirs = run(1, drawn_by_transformers, family)[0]
    assert ours.keys() == theirs.keys()
    for name, (average, deviation) in theirs.items():
        assert ours[name].mean().item() == pytest.approx(average, abs=0.15 * deviation), name
        assert ours[name].std().item() == pytest.approx(deviation, rel=0.1), name


def peaks(kind: str, family: str) -> tuple[list[int], list[int], list[int]]:
    """Bytes in use when a unit has been filled, for each; those of the unit, and of the shards of the units before."""
    language_model = LanguageModel(family, CONFIGS[family] | BIG[family])
    used, units, shards = [], [], []
    gc.collect()
    gc.freeze()  # what there is already is not looked at

    def fill(unit: nn.Module, device: torch.device) -> None:
        shards.append(sum(size(local(p)) for p in model.parameters() if isinstance(p, DTensor)))
        language_model.fill(model, unit, device)
        units.append(sum(size(p) for p in unit.parameters() if not p.is_meta and not isinstance(p, DTensor)))
        gc.collect()
        used.append(in_use())

    model = language_model.empty(language_model.describe(VOCABULARY))
    ENGINES[kind]().build(model, blocks(model), fill, CPU)
    return used, units, shards


BIG = {"gpt2": {"n_layer": 6}, "llama": {"num_hidden_layers": 6}}


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def in_use() -> int:
    """The bytes of all tensors, a storage once."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
            storage = local(thing.detach()).untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("kind", "world"), [("fsdp2", 4), ("hsdp", 4)])
def test_no_rank_ever_has_more_than_one_full_unit(kind: str, world: int, family: str) -> None:
    """When a unit has just got its values, the blocks before it are shards already. A model as large as all ranks'
    memory would not start otherwise."""
    for used, units, shards in run(world, peaks, kind, family):
        assert len(used) == 7
        share = 4 if kind == "fsdp2" else 2
        total = sum(units)
        for now, unit, before in zip(used, units, shards):
            slack = 4096  # rotary tables, and shards that are padded to the same length
            assert before <= total / share + slack
            assert unit + before <= now <= unit + before + slack
        assert max(used) < 0.6 * total  # or the test says nothing


# Pretrained folders.


def save(
    folder: Path, family: str, changes: dict[str, Any], shard_bytes: int, head: bool, dtype: str
) -> dict[str, Tensor]:
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(11)
    config = LanguageModel(family, CONFIGS[family] | changes).describe(VOCABULARY)
    model = (AutoModelForCausalLM if head else AutoModel).from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()  # no zeros or ones that would come by themselves
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return {n: p.detach().float() for n, p in model.named_parameters()}


def load(folder: Path, kind: str) -> dict[str, Tensor]:
    return full(made(LanguageModel(path=str(folder)), ENGINES[kind]()))


@pytest.mark.parametrize(
    ("family", "changes", "shard_bytes", "head", "dtype"),
    [
        ("gpt2", {}, 10**9, True, "float32"),
        ("gpt2", {}, 20_000, True, "bfloat16"),
        ("gpt2", {}, 10**9, False, "float32"),
        ("llama", {}, 10**9, True, "float32"),
        ("llama", {}, 10_000, True, "float32"),
        ("llama", {"tie_word_embeddings": True}, 10**9, True, "float32"),
    ],
    ids=["gpt2", "gpt2 in files, bfloat16", "gpt2 without head", "llama", "llama in files", "llama, tied"],
)
def test_a_pretrained_folder_gives_exactly_its_weights(
    tmp_path: Path, family: str, changes: dict[str, Any], shard_bytes: int, head: bool, dtype: str
) -> None:
    (saved,) = run(1, save, tmp_path, family, changes, shard_bytes, head, dtype)
    assert (len([*tmp_path.glob("*.safetensors")]) > 1) == (shard_bytes < 10**9)
    prefix = "" if head else "transformer."
    for kind, world in [("ddp", 1), ("fsdp2", 2), ("hsdp", 4)]:
        for params in run(world, load, tmp_path, kind):
            assert params.keys() == {prefix + n for n in saved}
            assert all(torch.equal(params[prefix + n], p) for n, p in saved.items()), (kind, world)


def spoil(folder: Path, what: str) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "transformer.h.1.mlp.c_fc.weight"
    if what == "missing":
        del weights[name]
    else:
        weights[name] = weights[name].t().contiguous()
    save_file(weights, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", r"has no weights for transformer\.h\.1\.mlp\.c_fc\.weight"),
        (
            "shape",
            r"transformer\.h\.1\.mlp\.c_fc\.weight is \[128, 32\] in .*model\.safetensors, \[32, 128\] in the model",
        ),
    ],
)
@pytest.mark.parametrize(("kind", "world"), [("ddp", 1), ("fsdp2", 2)])
def test_weights_that_do_not_fit_are_named(tmp_path: Path, what: str, message: str, kind: str, world: int) -> None:
    run(1, save, tmp_path, "gpt2", {}, 10**9, True, "float32")
    run(1, spoil, tmp_path, what)
    with pytest.raises(RankError) as error:
        run(world, load, tmp_path, kind)
    assert error.value.kind == "ValueError"
    assert re.search(message, error.value.message), error.value.message


def untied_without_head(folder: Path) -> None:
    save(folder, "llama", {}, 10**9, False, "float32")
    load(folder, "ddp")


def too_many_tokens(folder: Path) -> None:
    save(folder, "gpt2", {}, 10**9, True, "float32")
    LanguageModel(path=str(folder)).describe(VOCABULARY + 1)


def no_weights(folder: Path) -> None:
    save(folder, "gpt2", {}, 10**9, True, "float32")
    (folder / "model.safetensors").unlink()
    LanguageModel(path=str(folder))


def no_such_family(folder: Path) -> None:
    LanguageModel("gpt22").describe(VOCABULARY)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (untied_without_head, r"has no weights for lm_head\.weight"),
        (too_many_tokens, r"the data has 62 tokens, the model in .* only 61: set data\.tokenizer to the model's own"),
        (no_weights, r"model\.path=.*: no model\.safetensors there"),
        (no_such_family, r"model\.family=gpt22 is no model type of transformers; gpt2 is one"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_is_no_model_is_refused(tmp_path: Path, what: Callable[[Path], None], message: str) -> None:
    with pytest.raises(RankError) as error:
        run(1, what, tmp_path)
    assert error.value.kind == "ValueError"
    assert re.search(message, error.value.message), error.value.message


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.path=.*no config\.json there; give a folder written by save_pretrained"
    ):
        LanguageModel(path=str(tmp_path))


# What engines refuse.


def classes(kind: str) -> tuple[int, set[str]]:
    """How many units are sharded, and how parameters lie."""
    model = made(LanguageModel("gpt2", CONFIGS["gpt2"]), ENGINES[kind]())
    units = sum(isinstance(module, FSDPModule) for module in model.modules())
    return units, {str(getattr(p, "placements", "plain")) for p in model.parameters()}


def test_every_engine_shards_what_its_name_says() -> None:
    assert run(2, classes, "ddp") == [(0, {"plain"})] * 2
    assert run(2, classes, "fsdp2") == [(3, {"(Shard(dim=0),)"})] * 2
    assert run(2, classes, "zero2") == [(3, {"(Shard(dim=0),)"})] * 2
    assert run(4, classes, "hsdp") == [(3, {"(Replicate(), Shard(dim=0))"})] * 4
