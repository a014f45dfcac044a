"""The bytes of one of many ranks, in a process group that sends nothing."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
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
