"""Param groups: every trainable parameter once, in the right group, for plain, meta and wrapped models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distopt
from distopt.optim.param_groups import param_groups
from tests.harness.jobs import python

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
    for group in groups:
        assert group["param_names"] == [names[id(p)].removeprefix("module.") for p in group["params"]]
    options = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in groups]
    return [([names[id(p)] for p in g["params"]], rest) for g, rest in zip(groups, options)]


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


class Marked(nn.Module):
    """Parameters of two and more dimensions that are marked as not decaying, each in its way, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))  # by no_weight_decay(), as in timm
        self.linear = nn.Linear(4, 4)
        self.marked = nn.Linear(4, 4, bias=False)
        self.marked.weight._no_weight_decay = True  # type: ignore[assignment]
        self.new_gain = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, bias=False))
        self.old_gain = torch.nn.utils.weight_norm(nn.Linear(4, 3, bias=False))
        self.orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4, bias=False))
        self.experts = nn.ParameterDict({"up": torch.ones(2, 4, 4), "up_bias": torch.ones(2, 4)})
        self.q_norm = nn.ParameterDict({"weight": torch.ones(2, 4)})  # one scale for each head
        self.relative_bias = nn.Embedding(5, 2)  # its name has bias in it, but it is a table

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


ASKING = {
    "pos_embed",
    "marked.weight",
    "new_gain.parametrizations.weight.original0",
    "old_gain.weight_g",
    "experts.up_bias",
    "q_norm.weight",
    "linear.bias",
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.ModuleDict({"vit": m})], ids=["itself", "in another"])
def test_parameters_marked_as_not_decaying_do_not_decay(wrap: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Decaying them is a silent change of the model's training: Mamba's dynamics, ViT's positions, weight norm's g."""
    model = wrap(Marked())
    with caplog.at_level("INFO", "distopt"):
        decay, rest = param_groups(model)
    assert {name.removeprefix("vit.") for name in rest["param_names"]} == ASKING
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))
    assert rest["weight_decay"] == 0.0 and rest["trust_ratio"] is False
    assert "7 do not: 1 have fewer than two dimensions, 6 are marked as not decaying (" in caplog.text


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_an_override_has_precedence_over_a_mark() -> None:
    groups = named(model := Marked(), param_groups(model, overrides={"pos_embed": {"weight_decay": 0.3}}))
    assert groups[-1] == (["pos_embed"], {"weight_decay": 0.3, "trust_ratio": False})


def test_mamba_keeps_its_dynamics() -> None:
    """transformers' Mamba does not mark A_log, as the original does: it would decay towards another model."""
    from transformers import MambaConfig, MambaForCausalLM

    with torch.device("meta"):
        model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4))
    decay, rest = param_groups(model)
    assert {"backbone.layers.0.mixer.A_log", "backbone.layers.0.mixer.D"} <= set(rest["param_names"])
    assert "backbone.layers.0.mixer.x_proj.weight" in decay["param_names"]


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.compile's own imports
def test_names_are_those_without_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    wrapped = torch.compile(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))))
    overrides = {r"^0\.weight": {"lr": 0.5}}
    groups = [param_groups(model, overrides=overrides) for model in (plain, wrapped)]  # type: ignore[arg-type]
    assert [[g["param_names"] for g in made] for made in groups] == [
        [["1.weight"], ["0.bias", "1.bias"], ["0.weight"]]
    ] * 2


@pytest.mark.parametrize("make", [torch.optim.AdamW, distopt.AdamW, distopt.LAMB])
def test_names_go_with_state_dicts_and_come_from_none(make: Any) -> None:
    """A state dict of a time without names loads, and leaves the optimizer's own."""
    model = Shardable()
    optimizer = make(param_groups(model), lr=0.1)
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = optimizer.state_dict()
    assert [group["param_names"] for group in state["param_groups"]] == [
        ["linear.weight"],
        ["linear.bias", "norm.weight", "norm.bias"],
    ]
    for group in state["param_groups"]:
        del group["param_names"]
    optimizer.load_state_dict(state)
    assert [group["param_names"][0] for group in optimizer.param_groups] == ["linear.weight", "linear.bias"]


def test_torch_accepts_the_groups() -> None:
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
from distopt.job.process import end_of_process
import distopt
from distopt.optim.param_groups import param_groups

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
    job = python("-c", ZERO_INIT, LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    assert job.code == 0, job.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number >= 0, got nan"),
        (
            {"overrides": {"wpe": {}}},
            "no trainable parameter matches the override 'wpe': .* 9 names.* scale, wte.weight",
        ),
        ({"overrides": {"frozen": {}}}, "no trainable parameter matches the override 'frozen'"),
        ({"overrides": {"head": {}}}, "no trainable parameter matches the override 'head'"),
        ({"overrides": {"layers": {}, "layers.0": {}}}, "override 'layers.0': .* an earlier override takes them all"),
        ({"overrides": {"wte": {"learning_rate": 1.0}}}, "'wte' has the option 'learning_rate', .*did you mean 'lr'"),
        ({"overrides": {"wte": {"initial_lr": 5.0}}}, "'initial_lr', which no optimizer .*did you mean 'lr'"),
        ({"overrides": {"wte": {"weight_dekay": 1.0}}}, "did you mean 'weight_decay'"),
        ({"overrides": {"wte": {"params": []}}}, "the option 'params', which no optimizer"),
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
