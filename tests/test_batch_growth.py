"""A batch that grows, and the noise scale that says how far it should."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt.data.batch_sizes import BatchSizes
from distopt.data.mixture import MixedSequences
from distopt.data.order import Sequences
from distopt.engine.train_step import update
from distopt.health.noise_scale import NoiseScale
from tests.harness.distributed import run
from tests.harness.engines import CPU, ENGINES

TOKENS = np.arange(4 * 37 + 3, dtype=np.uint16)
GROWS = {3: 8, 5: 12}
SIZES = [4, 4, 4, 8, 8, 12, 12]


def test_a_size_is_a_pure_function_of_the_step() -> None:
    sizes = BatchSizes(4, {5: 12, 3: 8})  # in any order
    assert [sizes.size(step) for step in range(7)] == SIZES
    assert [sizes.before(step) for step in range(8)] == [sum(SIZES[:step]) for step in range(8)]
    assert BatchSizes(4).before(10**12) == 4 * 10**12
    for wrong in ({0: 8}, {3: 0}, {}, {"3": 8}, {3: 8.0}, 8):
        with pytest.raises(ValueError, match="batch_schedule must be sequences >= 1 by step >= 1"):
            BatchSizes(4, wrong)


def test_growing_batches_see_the_sequences_of_constant_ones_in_the_same_order() -> None:
    one = Sequences(TOKENS, sequence_length=4, batch_size=4)
    grown = Sequences(TOKENS, sequence_length=4, batch_size=4)
    grown.sizes = BatchSizes(4, GROWS)
    rows = np.concatenate([grown.rows(step) for step in range(7)])
    assert rows.tolist() == np.concatenate([one.rows(step) for step in range(13)]).tolist()
    assert torch.equal(torch.cat([grown.batch(5, rank, 4) for rank in range(4)]), grown.batch(5))

    def mixed() -> MixedSequences:
        return MixedSequences(
            {"a": one, "b": Sequences(TOKENS, sequence_length=4, batch_size=4)}, {"a": 0.5, "b": 0.5}, 4
        )

    grows = mixed()
    grows.sizes = BatchSizes(4, GROWS)
    members = [member for step in range(7) for member in grows.members(step)]
    assert members == [member for step in range(13) for member in mixed().members(step)]


# The noise scale.


class Bowl(nn.Module):
    """A loss whose gradient at p is p - mean(x): the gradient of all data is p, and the covariance the one of x."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(3, 5, bias=False)
        torch.nn.init.constant_(self.part.weight, 0.3)
        self.p = nn.Parameter(torch.full((7, 3), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """x: samples [n, 36]."""
        first, second = x[:, :15].view(-1, 5, 3), x[:, 15:].view(-1, 7, 3)
        squares = (self.part(torch.eye(3)).T - first).square().sum((1, 2)) + (self.p - second).square().sum((1, 2))
        return 0.5 * squares.mean()


def samples(step: int, count: int) -> Tensor:
    return torch.randn(count, 36, generator=torch.Generator().manual_seed(step))


def bowl_loss(model: nn.Module, batch: Tensor, pass_loss: object = None) -> Tensor:
    return model(batch)


MICRO, PASSES = 2, 3


def measured(kind: str) -> list[tuple[float, int, float]]:
    """|g|^2 of the small batch, its size, and |g|^2 of the large one, at some steps without moving the weights."""
    engine, world = ENGINES[kind](precision="fp32"), dist.get_world_size()
    bowl = Bowl()
    model = engine.build(bowl, [bowl.part], lambda unit, device: None, CPU)
    optimizer = distopt.SGD([*engine.unwrap(model).parameters()], lr=0.0)
    model = engine.attach(model, optimizer, PASSES, float("inf"))
    found = []
    for step in range(3):
        mine = samples(step, world * MICRO * PASSES).chunk(world)[dist.get_rank()]
        done = update(engine, model, optimizer, mine.split(MICRO), loss=bowl_loss, noise=True)
        small = done.small_square.clone()
        dist.all_reduce(small)
        found.append((float(small) / world, MICRO * engine.small_batches(world), done.grad_norm**2))
    return found


def gradient_square(batch: Tensor) -> float:
    at = torch.cat([torch.full((15,), 0.3), torch.full((21,), 0.5)]).double()
    return float((at - batch.double().mean(0)).square().sum())


@pytest.mark.parametrize(
    ("kind", "world"),
    [
        ("ddp", 2),
        ("zero1", 3),
        ("fsdp2", 2),
        *[pytest.param(k, 4, marks=pytest.mark.matrix) for k in ("zero2", "hsdp")],
    ],
)
def test_the_small_batch_is_measured_on_every_engine(kind: str, world: int) -> None:
    for ranks in run(world, measured, kind):
        for step, (small, size, large) in enumerate(ranks):
            batch = samples(step, world * MICRO * PASSES)
            firsts = [mine[:MICRO] for mine in batch.chunk(world)]
            right = np.mean([gradient_square(first) for first in firsts])
            if size == MICRO * world:  # all ranks together
                right = gradient_square(torch.cat(firsts))
            assert small == pytest.approx(right, rel=1e-5)
            assert large == pytest.approx(gradient_square(batch), rel=1e-5)


def test_the_noise_scale_is_that_of_the_data() -> None:
    """tr S = 36 and |G|^2 = 15 * 0.09 + 21 * 0.25 = 6.6: 5.45 sequences. With |g_B|^2 for |G|^2 it were 3.2."""
    scale = NoiseScale(decay=0.9995)
    for step in range(3000):
        batch = samples(step, 8)
        scale.update(gradient_square(batch[:2]), 2, gradient_square(batch), 8)
    assert scale.value == pytest.approx(36 / 6.6, rel=0.05)
    again = NoiseScale(decay=0.9995)
    again.load_state_dict(scale.state_dict())
    assert again.value == scale.value


def test_hidden_noise_is_not_told() -> None:
    scale = NoiseScale(decay=0.5)
    assert scale.value is None
    scale.update(1.0, 2, 0.1, 8)  # the large batch's gradient is smaller than its noise alone would be
    assert scale.value is None


@pytest.mark.parametrize("engine", ["deepspeed_zero1", "fsdp2"])
def test_an_engine_that_hides_micro_batches_says_so(engine: str) -> None:
    options: dict[str, Any] = {} if "deepspeed" in engine else {"sync_each_batch": False}
    with pytest.raises(ValueError, match=r"train\.noise_scale=null"):
        partial(ENGINES[engine], **options)().check_noise_scale()
