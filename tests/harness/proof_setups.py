"""What the set-ups of the proof are made of, and the table that their decorators fill."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import distopt
from tests.harness.sharded import mesh

Made = tuple[torch.optim.Optimizer, nn.Module | None]


class Case(NamedTuple):
    """says: a regular expression of the error, None if there has to be none. worlds: at which it can be made."""

    make: Callable[[], Made]
    says: str | None
    worlds: tuple[int, ...]


CASES: dict[str, Case] = {}


def right(*worlds: int) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    return wrong(None, *worlds)


def wrong(says: str | None, *worlds: int) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(make: Callable[[], Made]) -> Callable[[], Made]:
        CASES[make.__name__] = Case(make, says, worlds or (2, 4))
        return make

    return add


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def pair() -> nn.Sequential:
    """Two layers of equal shapes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def data(step: int = 0) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))


def back(model: Any, step: int = 0) -> None:
    model(data(step)).square().mean().backward()


def lamb(params: Any, **options: Any) -> distopt.LAMB:
    return distopt.LAMB(params, **{"lr": 0.1, **options})


def ones_for(params: Any) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def grid() -> DeviceMesh:
    return mesh((2, dist.get_world_size() // 2), ("replicate", "shard"))


def line() -> DeviceMesh:
    return mesh((dist.get_world_size(),), ("shard",))


def cut(model: nn.Module, over: DeviceMesh | None = None, **options: Any) -> Any:
    return fully_shard(model, mesh=over or line(), **options)


def with_deepspeed(
    stage: int, model: nn.Module | None = None, dtype: str = "fp32", groups: Any = None, **more: Any
) -> tuple[Any, Any]:
    """The optimizer and DeepSpeed's engine, which has to be destroyed."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", verbose=False)
        model = model or net()
        optimizer = lamb(groups or model.parameters())
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": dtype == "bf16"},
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, **more)
        optimizer.bind(distopt.layout.deepspeed_layout(engine))
    return optimizer, engine
