"""First values of the weights: closed-form variances, and the same bits on every sharding, engine and world size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import distopt
from distopt.counter import key, uniforms
from distopt.init import Initialization
from distopt.models.language_model import LanguageModel, blocks
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, CPU, DEEPSPEED, ENGINES, VOCABULARY, full

SCHEMES = ("xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "truncated_normal", "orthogonal")


class Several(nn.Module):
    """One module of each kind; 61 rows are no multiple of 2, 3 or 4 ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(61, 48, padding_idx=3), nn.LayerNorm(48)
        self.linear, self.tied = nn.Linear(48, 122), nn.Linear(48, 61, bias=False)
        self.conv = nn.Conv1d(8, 64, 5, groups=2)
        self.tied.weight = self.embedding.weight


# Standard deviations from the papers: fan_in and fan_out of linear are 48 and 122; of conv, 4 * 5 inputs of an output,
# and 32 * 5 outputs of an input.
FANS = {"linear.weight": (48, 122), "conv.weight": (20, 160)}


def expected(scheme: str, fan_in: int, fan_out: int) -> float:
    if "xavier" in scheme:
        return math.sqrt(2.0 / (fan_in + fan_out))
    return math.sqrt((2.0 if "he_" in scheme else 1.0) / fan_in)


@pytest.mark.parametrize("scheme", SCHEMES[:-1])
def test_the_variances_are_those_of_the_papers(scheme: str) -> None:
    """Of n numbers the standard deviation has the relative error sqrt(1 / 2n) if they are normal: five of these."""
    model = Several()
    distopt.initialize(model, scheme, seed=1)
    for name, fans in FANS.items():
        values = model.get_parameter(name).detach().double().flatten()
        std, five = expected(scheme, *fans), 5.0 * math.sqrt(0.5 / len(values))
        assert values.std().item() == pytest.approx(std, rel=five)
        assert abs(values.mean().item()) < 5.0 * std / math.sqrt(len(values))
        bound = {"u": math.sqrt(3.0), "t": 2.0 / 0.8796256610342398}.get(
            scheme[-7:][0] if "uni" in scheme else scheme[0]
        )
        if bound:
            assert 0.98 * bound * std < values.abs().max().item() <= bound * std * (1.0 + 1e-6)
    assert torch.equal(model.norm.weight, torch.ones(48)) and not model.norm.bias.any() and not model.linear.bias.any()
    assert not model.embedding.weight[3].any()
    assert model.embedding.weight[4:].std().item() == pytest.approx(0.02, rel=0.1)


def test_moments_and_tails_are_those_of_a_normal() -> None:
    """A million numbers, each moment and share within five of its standard deviations."""
    n = 2**20
    layer = nn.Linear(1024, n // 1024, bias=False)
    distopt.initialize(layer, "he_normal")
    z = layer.weight.detach().double().flatten() / math.sqrt(2.0 / 1024)
    for power, moment, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs((z**power).mean().item() - moment) < 5.0 * math.sqrt(variance / n)
    for bound in (1.0, 2.0, 3.0, 4.0):
        share = math.erfc(bound / math.sqrt(2.0))
        assert abs((z.abs() > bound).double().mean().item() - share) < 5.0 * math.sqrt(share / n)
    assert abs((z[1:] * z[:-1]).mean().item()) < 5.0 / math.sqrt(n)


def test_the_hash_is_that_of_splitmix64() -> None:
    """In Python's integers, which do not wrap around."""
    state, mask = key("7/h.0.weight") % 2**64, 2**64 - 1
    got = uniforms(key("7/h.0.weight"), torch.arange(100)).tolist()
    for i in range(100):
        x = (state + (i + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        assert got[i] == (((x ^ (x >> 31)) >> 12) + 0.5) / 2**52


def test_orthogonal() -> None:
    model = Several()
    distopt.initialize(model, "orthogonal", gain=2.0)
    for weight in (model.linear.weight.T, model.conv.weight.flatten(1).T):
        small = weight.detach().double()
        small = small if len(small) < small.shape[1] else small.T
        assert torch.allclose(small @ small.T, 4.0 * torch.eye(len(small), dtype=torch.float64), atol=1e-5)


def test_gpt2_scales_the_residual_projections() -> None:
    source = LanguageModel("gpt2", CONFIGS["gpt2"] | {"n_layer": 4, "n_embd": 64})
    model = source.empty(source.describe(VOCABULARY)).to_empty(device="cpu")
    distopt.initialize(model, "gpt2")
    for name, param in model.named_parameters():
        if param.ndim > 1:
            std = 0.02 / math.sqrt(8) if "c_proj" in name else 0.02
            assert param.std().item() == pytest.approx(std, rel=0.1), name


def hashes(scheme: str, sharding: str) -> dict[str, str]:
    """The fingerprint of a model that has got its values as shards."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    with torch.device("meta"):
        model = Several()
    if sharding == "fsdp2":
        fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    model.tied.weight = model.embedding.weight
    if sharding == "columns":  # as tensor parallelism does
        model.linear.weight = nn.Parameter(distribute_tensor(model.linear.weight.detach(), mesh, [Shard(1)]))
        model.conv.weight = nn.Parameter(distribute_tensor(model.conv.weight.detach(), mesh, [Shard(1)]))
        model.linear.bias = nn.Parameter(distribute_tensor(model.linear.bias.detach(), mesh, [Replicate()]))
    distopt.initialize(model, scheme, seed=3)
    return dict(distopt.fingerprint(model).params)


def test_shards_have_the_bits_of_the_unsharded_model() -> None:
    for scheme in ("he_normal", "xavier_uniform", "truncated_normal", "orthogonal"):
        (whole,) = run(1, hashes, scheme, "plain")
        assert len(set(whole.values())) == len(whole) - 2  # three constants of zeros: the biases of three modules
        for world, sharding in ((2, "fsdp2"), (3, "fsdp2"), (4, "fsdp2"), (2, "columns"), (3, "columns")):
            assert run(world, hashes, scheme, sharding) == [whole] * world, (scheme, world, sharding)


def job_hashes(kind: str, family: str, scheme: str) -> dict[str, str]:
    source = LanguageModel(family, CONFIGS[family])
    init = Initialization(scheme, seed=5)
    model = source.empty(source.describe(VOCABULARY))
    engine = ENGINES[kind]()
    model = engine.build(model, blocks(model), lambda unit, where: source.fill(model, unit, where, init.fill), CPU)
    if kind in DEEPSPEED:
        optimizer = distopt.SGD(distopt.param_groups(model), lr=0.1)
        model = engine.attach(model, optimizer, 1, math.inf)
        return {name: repr(p.double().sum().item()) for name, p in full(model).items()}
    return {name: repr(p.double().sum().item()) for name, p in full(model).items()}


def test_the_first_values_are_the_same_on_every_engine() -> None:
    (whole,) = run(1, job_hashes, "ddp", "gpt2", "gpt2")
    for kind, world in [("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)]:
        assert run(world, job_hashes, kind, "gpt2", "gpt2") == [whole] * world, (kind, world)


@pytest.mark.matrix
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ENGINES)
def test_the_first_values_are_the_same_on_every_engine_and_world(kind: str, family: str) -> None:
    (whole,) = run(1, job_hashes, "ddp", family, "he_normal")
    for world in (1, 2, 3, 4):
        if not (kind == "hsdp" and world % 2):
            assert run(world, job_hashes, kind, family, "he_normal") == [whole] * world, world


def test_another_seed_or_name_gives_other_values_and_16_bits_are_rounded() -> None:
    def made(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)
        distopt.initialize(model, seed=seed)
        return torch.stack([p.detach() for p in model.parameters() if p.ndim > 1])

    one = made(1)
    assert not torch.equal(one, made(2)) and not torch.equal(one[0], one[1])
    assert torch.equal(one.bfloat16(), made(1, torch.bfloat16))
    assert torch.equal(one, made(1, torch.float64).float())


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.pos = nn.Linear(4, 4), nn.Parameter(torch.full((1, 9, 400), 7.0))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Positions(), {}, "pos of shape [1, 9, 400] belongs to Positions, whose fan is unknown: give its standard dev"),
        (nn.LSTM(3, 4), {}, "weight_ih_l0 of shape [16, 3] belongs to LSTM, whose fan is unknown"),
        (nn.Linear(2, 2), {"scheme": "he"}, "scheme must be one of xavier_uniform"),
        (nn.Linear(2, 2), {"seed": -1}, "seed must be an integer >= 0"),
        (nn.Linear(2, 2), {"std": 0.1}, "std=0.1: the scheme he_normal has none"),
        (nn.Linear(2, 2), {"gain": 0.0}, "gain must be a number > 0 or null, got 0.0"),
        (nn.Linear(2, 2), {"scheme": "mup"}, "init=mup needs the base model"),
        (nn.Linear(2, 2), {"scheme": "gpt2"}, "no parameter is a projection into the residual stream"),
        (nn.Linear(2, 2), {"stds": {"head": 0.1}}, "no parameter matches stds.head"),
        (nn.Linear(2, 2), {"stds": {"(": 0.1}}, "stds: '(' is not a regular expression"),
        (nn.Linear(2, 2, device="meta"), {}, "weight is on the meta device, without memory: call model.to_empty"),
        (nn.Linear(4097, 4096, device="meta"), {"scheme": "orthogonal"}, "weight has 16781312 elements"),
    ],
)
def test_refused_in_one_line_that_says_what_to_do(model: nn.Module, options: dict[str, Any], message: str) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError) as error:
        distopt.initialize(model, **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert all(p.is_meta or torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_parameter_without_a_fan_gets_the_deviation_that_is_given() -> None:
    model = Positions()
    distopt.initialize(model, stds={"^pos$": 0.5})
    assert model.pos.std().item() == pytest.approx(0.5, rel=0.06)
