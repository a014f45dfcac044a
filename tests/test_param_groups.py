"""Param groups: every trainable parameter once, in the right group, for plain, meta and wrapped models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distopt.param_groups import param_groups

ROOT = Path(__file__).parents[1]
PLAIN = {"weight_decay": 0.0, "trust_ratio": False}


class Toy(nn.Module):
    """Tied, frozen, 0-D, 1-D, 2-D and 4-D parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.conv = nn.Conv2d(1, 1, 3, bias=False)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.wte.weight


class Shardable(nn.Module):
    """The same without the scalar, which fully_shard refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)


def named(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[list[str], dict[str, Any]]]:
    """The names of each group's parameters, and its options."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [([names[id(p)] for p in g["params"]], {k: v for k, v in g.items() if k != "params"}) for g in groups]


MATRICES = ["wte.weight", "layers.0.weight", "layers.1.weight", "conv.weight"]
OTHERS = ["scale", "layers.0.bias", "layers.1.bias", "norm.weight", "norm.bias"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_matrices_decay_and_the_rest_does_not(device: str) -> None:
    with torch.device(device):
        model = Toy()
    assert named(model, param_groups(model, weight_decay=0.1)) == [(MATRICES, {"weight_decay": 0.1}), (OTHERS, PLAIN)]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            {"wte": {"lr": 1e-4}},
            [
                (MATRICES[1:], {"weight_decay": 0.1}),
                (OTHERS, PLAIN),
                (["wte.weight"], {"weight_decay": 0.1, "lr": 1e-4}),
            ],
        ),
        # 1-D parameters keep their defaults under a pattern, unless it says otherwise.
        (
            {r"layers\.0\.": {"lr": 3e-4}},
            [
                (["wte.weight", "layers.1.weight", "conv.weight"], {"weight_decay": 0.1}),
                (["scale", "layers.1.bias", "norm.weight", "norm.bias"], PLAIN),
                (["layers.0.weight"], {"weight_decay": 0.1, "lr": 3e-4}),
                (["layers.0.bias"], {**PLAIN, "lr": 3e-4}),
            ],
        ),
        (
            {"": {"weight_decay": 0.5, "trust_ratio": True}},
            [
                (MATRICES, {"weight_decay": 0.5, "trust_ratio": True}),
                (OTHERS, {"weight_decay": 0.5, "trust_ratio": True}),
            ],
        ),
        # The first match wins: layers.1.bias belongs to "bias", of "layers" only the weights are left.
        (
            {"bias": {"lr": 1.0}, "layers": {"lr": 2.0}},
            [
                (["wte.weight", "conv.weight"], {"weight_decay": 0.1}),
                (["scale", "norm.weight"], PLAIN),
                (["layers.0.bias", "layers.1.bias", "norm.bias"], {**PLAIN, "lr": 1.0}),
                (["layers.0.weight", "layers.1.weight"], {"weight_decay": 0.1, "lr": 2.0}),
            ],
        ),
    ],
    ids=["one", "mixed", "all", "first wins"],
)
def test_overrides(overrides: dict, expected: list) -> None:
    model = Toy()
    groups = named(model, param_groups(model, weight_decay=0.1, overrides=overrides))
    assert [(sorted(names), options) for names, options in groups] == [(sorted(n), options) for n, options in expected]


def test_torch_takes_the_groups_and_refuses_none_twice() -> None:
    model = Toy()
    optimizer = torch.optim.AdamW(param_groups(model, overrides={"layers": {"betas": (0.5, 0.9)}}), lr=1.0)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999)] * 2 + [(0.5, 0.9)] * 2


def test_the_default_weight_decay() -> None:
    assert [group["weight_decay"] for group in param_groups(nn.Linear(2, 2))] == [0.01, 0.0]


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp_prefixes_names_and_patterns_still_match(one_rank: None) -> None:
    model = nn.parallel.DistributedDataParallel(Shardable())
    groups = param_groups(model, overrides={r"norm\.": {"lr": 1e-4}})
    assert named(model, groups) == [
        (["module.linear.weight"], {"weight_decay": 0.01}),
        (["module.linear.bias"], PLAIN),
        (["module.norm.weight", "module.norm.bias"], {**PLAIN, "lr": 1e-4}),
    ]


def test_fsdp2_gives_the_sharded_parameters(one_rank: None) -> None:
    model = fully_shard(Shardable(), mesh=init_device_mesh("cpu", (1,)))
    groups = param_groups(model)
    assert named(model, groups) == [
        (["linear.weight"], {"weight_decay": 0.01}),
        (["linear.bias", "norm.weight", "norm.bias"], PLAIN),
    ]
    assert all(isinstance(p, dist.tensor.DTensor) for group in groups for p in group["params"])


ZERO_INIT = """
import deepspeed.ops, torch.distributed as dist
from torch import nn
from distopt.ending import end_of_process
from distopt.param_groups import param_groups

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else one minute of compiling an op that is not used
with end_of_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1, "zero_optimization": {"stage": 3}}):
        model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    assert [p.ndim for p in model.parameters()] == [1, 1, 1, 1], "zero.Init shows the shapes: ds_shape may go"
    names = {id(p): name for name, p in model.named_parameters()}
    decay, plain = ([names[id(p)] for p in group["params"]] for group in param_groups(model))
    assert (decay, plain) == (["0.weight"], ["0.bias", "1.weight", "1.bias"]), (decay, plain)
"""


def test_deepspeed_zero_init_hides_the_shapes() -> None:
    """DeepSpeed 0.19.8: every parameter looks 1-D, so asking p.ndim nothing would decay and no error would say so."""
    # Its own process: DeepSpeed keeps the process group for ever.
    env = {**os.environ, "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    job = subprocess.run([sys.executable, "-c", ZERO_INIT], cwd=ROOT, env=env, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number >= 0, got nan"),
        (
            {"overrides": {"wpe": {}}},
            "no trainable parameter follows the override 'wpe': .* 9 names.* scale, wte.weight",
        ),
        ({"overrides": {"frozen": {}}}, "no trainable parameter follows the override 'frozen'"),
        ({"overrides": {"head": {}}}, "no trainable parameter follows the override 'head'"),
        ({"overrides": {"layers": {}, "layers.0": {}}}, "override 'layers.0': .* an earlier override takes them all"),
        ({"overrides": {"*.bias": {}}}, r"the override '\*.bias' is not a regular expression \(nothing to repeat"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(Toy(), **options)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)], ids=["none", "frozen"])
def test_refuses_a_model_with_nothing_to_train(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="no parameter with requires_grad=True: unfreeze"):
        param_groups(model)
