"""One of many ranks, in a process group that sends nothing: its bytes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import distopt
from distopt.models.language_model import LanguageModel, blocks
from tests.harness.engines import CPU, ENGINES
from tests.test_plan import MODELS, VOCABULARY


def measure(world: int, kind: str, file: Path) -> None:
    """Writes the bytes of the first rank's parameters and state, as JSON. For a process of its own."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    language_model, engine = LanguageModel("llama", MODELS["llama"]), ENGINES[kind]()
    model = language_model.empty(language_model.describe(VOCABULARY))
    model = engine.build(model, blocks(model), lambda unit, device: None, CPU)  # stays on the meta device
    optimizer = distopt.AdamW(distopt.param_groups(model))
    optimizer.init_state()
    state = [t for of in optimizer.state.values() for t in of.values() if t.ndim]

    def size(tensors: list[torch.Tensor]) -> int:
        return sum(t.to_local().untyped_storage().nbytes() for t in tensors)  # type: ignore[attr-defined]

    file.write_text(json.dumps({"parameters": size(list(model.parameters())), "state": size(state)}))


def refused_experts(rank: int, file: Path) -> None:
    """Writes what a layout says on this one of 3 x 2 ranks, by the number of experts. For a process of its own."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=6)
    grid = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "ep"))
    said = {}
    for experts in (6, 7, 8):
        module = nn.Module()
        placed = distribute_tensor(torch.ones(experts, 3), grid["ep"], [Shard(0)], src_data_rank=None)
        module.weight = nn.Parameter(placed)
        fully_shard(module, mesh=grid["dp"])
        try:
            distopt.layout.infer_layout(module.parameters())
        except ValueError as error:
            said[experts] = str(error)
    file.write_text(json.dumps(said))
