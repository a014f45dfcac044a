"""Units of FSDP2: how blocks are grouped, that grouping changes no bit, and even shards of stacked experts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from distopt.engine import FSDP2, units
from distopt.engine.units import grouped, unit_bytes
from distopt.layout.places import global_indices, own_place, shard_dim
from distopt.models.language_model import LanguageModel
from distopt.plan.footprint import Param, numel, shards
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, ENGINES, EXPERTS, batch, full, made
from tests.harness.language_models import Settings, train
from tests.test_engines import communicated
from tests.test_plan import measured, planned

MIB = 2**20


def test_blocks_are_grouped_evenly_by_bytes() -> None:
    assert grouped([3] * 12, 16) == [range(0, 4), range(4, 8), range(8, 12)]  # not 5, 5 and 2
    assert grouped([3] * 12, 36) == [range(12)]
    assert grouped([3] * 3, 0) == [range(0, 1), range(1, 2), range(2, 3)]
    assert grouped([100, 100], 16) == [range(0, 1), range(1, 2)]
    assert grouped([1, 1, 98, 1, 1], 51) == [range(0, 2), range(2, 5)]
    assert grouped([], 16) == []
    assert (unit_bytes(None, 2), unit_bytes(None, 512), unit_bytes(3, 512)) == (16 * MIB, 128 * MIB, 3 * MIB)


def trained(kind: str, unit_mib: int, precision: str, options: dict[str, Any]) -> tuple[list[float], list[float], Any]:
    result = train(kind, "llama", Settings(precision=precision, engine={"unit_mib": unit_mib, **options}))
    return result.losses, result.norms, result.params


@pytest.mark.parametrize(
    ("kind", "precision", "options"),
    [
        ("fsdp2", "fp32", {"activation_checkpointing": True}),
        ("zero2", "bf16", {}),
        pytest.param("fsdp2", "bf16", {}, marks=pytest.mark.matrix),
        pytest.param("zero2", "fp32", {"activation_checkpointing": True}, marks=pytest.mark.matrix),
    ],
)
def test_grouping_blocks_changes_no_bit(kind: str, precision: str, options: dict[str, Any]) -> None:
    """Every element is summed over the same two ranks, whatever message it is in."""
    alone, together = (run(2, trained, kind, unit_mib, precision, options)[0] for unit_mib in (0, 16))
    assert alone[:2] == together[:2]
    assert all(torch.equal(alone[2][name], together[2][name]) for name in alone[2])


def test_a_unit_is_one_message() -> None:
    """Both blocks together, which are the last unit, and the rest: no gather in the backward pass."""
    assert run(2, communicated, "fsdp2", 1, {"unit_mib": None}) == [{"gather": 2, "scatter": 2, "allreduce": 0}] * 2


def ends_of_llama() -> tuple[list[int], dict[str, int]]:
    """Which of embedding and head are gathered before, in and after a forward pass, and a step's collectives."""
    engine = ENGINES["fsdp2"]()
    model: Any = made(LanguageModel("llama", CONFIGS["llama"]), engine)
    embedding, head = model.model.embed_tokens, model.lm_head
    seen: list[bool] = []
    note = lambda *_: seen.append(not hasattr(embedding.weight, "placements"))  # noqa: E731
    model.model.layers[0].register_forward_pre_hook(note)
    head.register_forward_pre_hook(lambda *_: seen.append(not hasattr(head.weight, "placements")))
    distopt.engine.train_step.backward(engine, model, [batch(0)])
    return seen, communicated("fsdp2", 1, {})


def test_embedding_and_head_are_not_gathered_with_the_rest() -> None:
    """They were in the group of the root, which is gathered from the first operation of a pass to the last."""
    seen, _ = run(2, ends_of_llama)[0]
    assert seen == [False, True]  # the embedding is freed before the first block


def test_experts_are_sharded_along_a_dimension_that_the_ranks_divide() -> None:
    assert [shard_dim((128, 1536, 2048), ranks) for ranks in (64, 128, 512, 768)] == [0, 0, 1, 1]
    assert shard_dim((8, 100, 2048), 64) == 2
    assert [shard_dim((50257, 4096), ranks) for ranks in (2, 512, 4096)] == [0, 0, 1]  # 0.9 % and 5.9 % of padding
    assert [shard_dim(shape, 4) for shape in ((3,), (), (3, 5, 7))] == [0, 0, 0]
    # Qwen3-30B-A3B: 128 experts; per layer the experts, attention and router, and the embedding outside.
    layer = [(128, 1536, 2048), (128, 2048, 768), (4096, 2048), (512, 2048), (512, 2048), (2048, 4096), (128, 2048)]
    params = [Param(shape, True, 2) for shape in (*layer * 48, (151936, 2048), (151936, 2048))]
    padded = {ranks: ranks * shards(params, ranks) / numel(params) for ranks in (64, 512)}
    assert max(padded.values()) <= 1.05  # 3.9 at 512 ranks by rows


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("zero2", marks=pytest.mark.matrix)])
def test_a_model_of_experts_trains_as_on_one_process(kind: str) -> None:
    """LAMB's ratios and clipping, over four ranks of three experts: rows would leave the last rank without any."""
    (expected,) = run(1, train, "ddp", "mixtral", Settings(optimizer="LAMB", sam="SAM"))
    for result in run(4, train, kind, "mixtral", Settings(optimizer="LAMB", sam="SAM")):
        assert result.losses == pytest.approx(expected.losses, rel=1e-6)
        assert result.norms == pytest.approx(expected.norms, rel=1e-5)
        for name, p in result.params.items():
            assert ((p - expected.params[name]).norm() / expected.params[name].norm()).item() < 2e-5, name


def saved_and_loaded(folder: Path, save: bool) -> tuple[dict[str, str], list[Any], int, dict[str, Tensor]]:
    """Fingerprints after an initialisation, the placements of the experts, and the next step of what was saved."""
    kind = "fsdp2" if save else "ddp"
    engine = ENGINES[kind]()
    model = made(LanguageModel("mixtral", EXPERTS["mixtral"]), engine)
    inner = engine.unwrap(model)
    distopt.initialize(inner, "he_normal", seed=1, stds={"experts|gate": 0.02})
    prints = dict(distopt.fingerprint(inner).params)
    optimizer = distopt.AdamW(distopt.param_groups(inner), lr=1e-2)
    model = engine.attach(model, optimizer, 1, 1.0)
    distopt.proof.prove_every(optimizer, inner, 1)
    experts = [p for name, p in inner.named_parameters() if "experts" in name]
    layouts = [(str(getattr(p, "placements", "")), getattr(p, "to_local", lambda p=p: p)().numel()) for p in experts]
    step = lambda i: distopt.engine.train_step.update(engine, model, optimizer, [batch(i)], 1.0)  # noqa: E731
    if save:
        step(0)
        distopt.save_checkpoint(folder, inner, optimizer)
    else:
        distopt.load_checkpoint(folder, inner, optimizer)
    step(1)
    return prints, layouts, sum(p.numel() for p in experts), full(model)


def test_even_shards_are_initialized_proved_saved_and_loaded(tmp_path: Path) -> None:
    sharded = run(4, saved_and_loaded, tmp_path / "saved", True)
    plain = run(2, saved_and_loaded, tmp_path / "saved", False)
    assert sharded[0][0] == plain[0][0]
    for _, layouts, total, _ in sharded:
        assert {placements for placements, _ in layouts} == {"(Shard(dim=1),)"}
        assert sum(local for _, local in layouts) * 4 == total
    for name, p in plain[0][3].items():
        assert ((p - sharded[0][3][name]).norm() / p.norm()).item() < 2e-5, name


def in_units(least: int, kind: str) -> dict[str, int]:
    """As `measured`, of an engine whose units have at least so many bytes."""
    options = {"reshard_after_forward": kind == "fsdp2"}
    default, units._LEAST = units._LEAST, least
    ENGINES["units"] = lambda **more: FSDP2(**options, **more)
    try:
        return measured("units", "llama") if dist.is_initialized() else planned("units", "llama", 2)
    finally:
        units._LEAST = default
        del ENGINES["units"]


@pytest.mark.parametrize(
    ("kind", "least"), [("fsdp2", 2**18), *[pytest.param("zero2", n, marks=pytest.mark.matrix) for n in (2**18, 2**24)]]
)
def test_the_memory_of_units_is_the_planned_one(kind: str, least: int) -> None:
    """Three blocks in two units or in one, an embedding and a head on their own."""
    plan, found = in_units(least, kind), run(2, in_units, least, kind)[0]
    assert plan["peak"] == pytest.approx(found["peak"], rel=0.002)
    assert plan["parameters"] == pytest.approx(found["parameters"], rel=0.03)


def indices_by_dimension(shape: tuple[int, ...]) -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    numbers = torch.arange(math.prod(shape)).view(shape)
    placed = [distribute_tensor(numbers, mesh, [Shard(dim)]) for dim in range(len(shape))]
    found = [torch.cat([index for _, index in global_indices(own_place(p), p.shape, p.device)]) for p in placed]
    return all(torch.equal(index, p.to_local().reshape(-1)) for index, p in zip(found, placed))


def test_the_index_of_a_local_element_is_known_along_every_dimension() -> None:
    """Dimensions other than the first were refused."""
    assert run(2, indices_by_dimension, (3, 5, 4)) == [True, True]
