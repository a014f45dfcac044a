"""A small model that is trained, saved and resumed, and all that a checkpoint has to hold of it."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.optim import schedules as schedules

HALF, STEPS, ROWS = 3, 6, 12  # rows of a batch, which 1, 2, 3 and 4 ranks share equally
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": distopt.AdamW,
    "lamb": distopt.LAMB,
    "adafactor": distopt.Adafactor,
    "muon": lambda groups, lr: distopt.Muon([groups[0], groups[1] | {"rule": "adamw"}], lr=lr, ns_dtype="float32"),
    "torch adamw": torch.optim.AdamW,
    "torch sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, dampening=0.3),
}


class Net(nn.Module):
    """Odd sizes, so that shards are uneven and, on four ranks, empty; a parameter that never has a gradient."""

    def __init__(self, dropout: float = 0.0, width: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(5, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, 3)
        self.idle = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.norm(self.dropout(torch.tanh(self.first(x)))))


def start(engine: str, name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple:
    """A model on an engine, its optimizer and schedule, before the first step."""
    torch.manual_seed(seed)
    model: nn.Module = Net(dropout).to(dtype)
    if engine in ("ddp", "zero1"):
        model = DistributedDataParallel(model, find_unused_parameters=True)
    elif engine in ("fsdp2", "hsdp"):
        world = dist.get_world_size()
        shape, axes = ((2, world // 2), ("replicate", "shard")) if engine == "hsdp" else ((world,), ("shard",))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=axes)
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    groups = [{"params": [p for p in model.parameters() if p.ndim == dims]} for dims in (2, 1)]
    optimizer = OPTIMIZERS[name](groups, lr=0.02 * (1 + seed))
    if engine == "zero1":
        optimizer.bind(distopt.layout.zero1_layout(model))
    return model, optimizer, schedules.warmup_cosine(optimizer, warmup_steps=2, total_steps=STEPS)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, first: int, last: int) -> None:
    """Steps on batches that depend on the step alone; every rank takes its rows."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(ROWS, n, generator=generator).to(dtype)[rank::world] for n in (5, 3))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()


def full(value: Any) -> np.ndarray:
    value = value.full_tensor() if hasattr(value, "full_tensor") else torch.as_tensor(value)
    return value.detach().clone().numpy()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """All that a step reads, whole, by name; and where torch's random numbers are."""
    found = {"random": full(torch.get_rng_state())}
    for name, value in model.state_dict().items():
        found[name.removeprefix("module.")] = full(value)
    for name, p in model.named_parameters():
        for buffer, value in optimizer.state.get(p, {}).items():
            found[f"{name.removeprefix('module.')}:{buffer}"] = full(value)
    for i, group in enumerate(optimizer.param_groups):
        found[f"lr {i}"], found[f"initial_lr {i}"] = full(group["lr"]), full(group["initial_lr"])
    return found


def assert_equal(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def gradients(model: nn.Module) -> list[np.ndarray | None]:
    return [None if p.grad is None else full(p.grad) for p in model.parameters()]


def trained(name: str = "lamb", steps: int = HALF, **options: Any) -> tuple:
    parts = start("none", name, **options)
    train(*parts, 0, steps)
    return parts


def sealed(path: Path, change: Callable[[dict[str, Any], Path], None]) -> None:
    """Changes a checkpoint, and makes its checksums right again, as one who means harm would."""
    content = json.loads((path / "manifest.json").read_text())
    change(content, path / content["folder"])
    for name in content["files"]:
        if (file := path / content["folder"] / name).is_file():
            content["files"][name] = [file.stat().st_size, zlib.crc32(file.read_bytes())]
    del content["checksum"]
    text = "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()) + ",\n"
    (path / "manifest.json").write_text(f'{text}"checksum": "{zlib.crc32(text.encode()):08x}"\n}}\n')
