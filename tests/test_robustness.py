"""Attacks against closed forms on linear losses, their bounds, and the same on a sharded model."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from distopt.robustness import accuracy, fgsm, pgd
from tests.harness.distributed import run
from tests.harness.jobs import ROOT

SLOPE = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
X = torch.tensor([[0.5, 0.5, 0.5], [0.0, 1.0, 0.2]], dtype=torch.float64)


def linear(x: Tensor) -> Tensor:
    return x @ SLOPE


@pytest.mark.parametrize("attack", [fgsm, lambda *a, **k: pgd(*a, **k, steps=40, step_size=0.05)])
def test_the_worst_input_of_a_linear_loss(attack: Any) -> None:
    """linf: a corner, by eps (|3| + |4|); l2: along the slope, by eps |slope| = 5 eps. The third pixel is free."""
    moved = attack(linear, X, 0.1)
    assert torch.allclose(linear(moved) - linear(X), torch.full((2,), 0.7, dtype=torch.float64))
    assert (moved - X).abs().max() <= 0.1 + 1e-15
    moved = attack(linear, X, 0.1, norm="l2")
    assert torch.allclose(linear(moved) - linear(X), torch.full((2,), 0.5, dtype=torch.float64), rtol=1e-3)
    assert (moved - X).norm(dim=1).max() <= 0.1 + 1e-12


@pytest.mark.parametrize("attack", [fgsm, pgd])
def test_the_range_of_inputs_is_kept(attack: Any) -> None:
    """The second sample is in a corner of the cube already, of which only the third pixel may move."""
    moved = attack(lambda x: x @ torch.tensor([-3.0, 4.0, 1.0], dtype=torch.float64), X, 0.6, clamp=(0.0, 1.0))
    assert torch.allclose(moved, torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.8]], dtype=torch.float64))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_more_restarts_are_never_better_for_the_model(norm: str) -> None:
    """On a loss with many maxima; no restart returns less than the sample itself."""
    torch.manual_seed(0)
    x = torch.rand(50, 4, dtype=torch.float64)

    def bumpy(x: Tensor) -> Tensor:
        return (20 * x).sin().sum(1)

    losses = [bumpy(pgd(bumpy, x, 0.5, norm=norm, steps=5, restarts=n)) for n in (1, 2, 8)]
    assert (losses[0] >= bumpy(x)).all() and (losses[1] >= losses[0]).all() and (losses[2] >= losses[1]).all()
    assert losses[2].mean() > losses[0].mean()
    moves = pgd(bumpy, x, 0.5, norm=norm, steps=5, restarts=8) - x
    assert (moves.abs().amax(1) if norm == "linf" else moves.norm(dim=1)).max() <= 0.5 + 1e-12


def test_no_radius_no_change_and_no_gradient_left() -> None:
    model = nn.Linear(3, 2).double()
    loss = lambda x: F.cross_entropy(model(x), torch.tensor([0, 1]), reduction="none")  # noqa: E731
    for attack in (fgsm, pgd):
        assert torch.equal(attack(loss, X, 0.0), X)
        attack(loss, X, 0.1)
    assert model.weight.grad is None and not X.requires_grad


def test_embeddings_of_a_language_model() -> None:
    """No range, axes of token and width; the loss of each sequence rises."""
    torch.manual_seed(0)
    table, head, tokens = nn.Embedding(11, 8), nn.Linear(8, 11), torch.randint(11, (3, 5))
    embedded = table(tokens).detach()

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(head(x).flatten(0, 1), tokens.flatten(), reduction="none").view(3, 5).mean(1)

    moved = pgd(loss, embedded, 1.0, norm="l2", steps=5)
    assert (loss(moved) > loss(embedded)).all()
    assert (moved - embedded).flatten(1).norm(dim=1).max() <= 1.0 + 1e-5


def test_accuracy() -> None:
    assert accuracy(lambda x: x, torch.eye(4), torch.tensor([0, 1, 2, 0])) == 0.75


def test_bad_input_is_refused() -> None:
    for options, said in (
        ({"eps": -0.1}, "eps must be a number >= 0, got -0.1"),
        ({"norm": "l1"}, "norm must be one of linf, l2, got 'l1'"),
        ({"clamp": (1.0, 0.0)}, "clamp must be (low, high) with low < high, got (1.0, 0.0)"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"restarts": 0}, "restarts must be an integer >= 1, got 0"),
        ({"step_size": 0.0}, "step_size must be a number > 0, got 0.0"),
        ({"loss": lambda x: x.sum()}, "one value for each of the 2 samples, got shape ()"),
    ):
        with pytest.raises(ValueError) as raised:
            pgd(**{"loss": linear, "inputs": X, "eps": 0.1, **options})
        assert said in str(raised.value)


def attacked(sharded: bool) -> Tensor:
    """This rank's attacked samples; PGD starts at the sample's place in the batch, so from one start for all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    x = torch.sin(torch.arange(12, dtype=torch.float64)).view(4, 3).chunk(world)[rank]
    classes = torch.tensor([0, 1, 2, 0]).chunk(world)[rank]

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), classes, reduction="none")

    moved = fgsm(loss, x, 0.1, norm="l2")
    assert (loss(pgd(loss, x, 0.1, steps=3)) >= loss(x)).all()
    assert all(p.grad is None for p in model.parameters())
    return moved


def test_on_a_sharded_model() -> None:
    (expected,) = run(1, attacked, False)
    assert torch.allclose(torch.cat(run(2, attacked, True)), expected, rtol=1e-12)


METHODS = ["AdamW", "PGD training, AdamW"]


@pytest.mark.matrix
def test_the_example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Few steps of one seed: an attack does not help, and training on its examples does.

    0.5: an input of a larger loss may still be classified rightly.
    """
    monkeypatch.setattr(sys, "argv", ["robustness.py", "--seeds", "1", "--steps", "60", "--only", *METHODS])
    example = Path(ROOT / "examples" / "robustness.py")
    runpy.run_path(str(example), run_name="__main__")
    rows = re.findall(r"^\| (\w.*), [\d.]+ \| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
    found = {name: [float(cell.split()[0]) for cell in cells.split(" | ")] for name, cells in rows}
    assert list(found) == METHODS
    for name, (clean, single, linf, l2) in found.items():
        assert clean + 0.5 >= max(single, linf, l2), name
    assert found["PGD training, AdamW"][2] > found["AdamW"][2]
