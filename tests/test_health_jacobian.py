"""The product of Jacobian norms by random probes: against matrices whose gains are known."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from distopt.health import jacobian_gains


def linear(weights: list[torch.Tensor]) -> nn.Sequential:
    layers = []
    for weight in weights:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
        layer.weight.data.copy_(weight)
        layers.append(layer)
    return nn.Sequential(*layers)


def test_a_rotation_times_a_number_has_that_gain_for_every_probe() -> None:
    """|(c Q)^T u| = c |u|: no error of sampling is left, and the product is that of the whole."""
    torch.manual_seed(0)
    factors = [0.5, 2.0, 0.9, 1.5]
    model = linear([c * nn.init.orthogonal_(torch.empty(7, 7, dtype=torch.float64)) for c in factors])
    x = torch.randn(3, 7, dtype=torch.float64)
    found = jacobian_gains(list(model), lambda: model(x), probes=1)
    assert found.layers == pytest.approx(factors, rel=1e-12)
    assert found.product == pytest.approx(math.prod(factors), rel=1e-12)
    assert found.through == pytest.approx(math.prod(factors), rel=1e-12)
    assert not x.requires_grad


def test_the_gain_is_the_frobenius_norm_over_the_root_of_the_outputs() -> None:
    """2,000 probes of 5 outputs: the error of the mean square is about sqrt(2 / 10,000) = 1.4 %."""
    torch.manual_seed(1)
    model = linear([torch.randn(5, 9, dtype=torch.float64)])
    found = jacobian_gains(list(model), lambda: model(torch.ones(1, 9, dtype=torch.float64)), probes=2000)
    assert found.layers[0] == pytest.approx(float(model[0].weight.detach().norm()) / math.sqrt(5), rel=0.03)


def test_blocks_that_return_tuples_and_take_keywords_are_probed() -> None:
    class Block(nn.Module):
        def forward(self, *, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, None]:
            return 3.0 * x, None

    blocks = [Block(), Block()]

    def forward() -> torch.Tensor:
        x = torch.randn(2, 4)
        for block in blocks:
            x, _ = block(x=x, mask=torch.ones(2, dtype=torch.bool))
        return x

    assert jacobian_gains(blocks, forward).through == pytest.approx(9.0, rel=1e-5)


class Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones(3, requires_grad=True) * 2.0


REFUSED: dict[str, tuple[list[nn.Module], dict[str, Any], str]] = {
    "none": ([], {}, "layers is empty: give the modules"),
    "probes": ([nn.Tanh()], {"probes": 0}, "probes must be an integer >= 1, got 0"),
    "seed": ([nn.Tanh()], {"seed": -1}, "seed must be an integer >= 0, got -1"),
    "not called": ([nn.Tanh(), nn.ReLU()], {}, "the forward pass did not call layer 1 of 2"),
    "independent": ([Constant()], {}, "layer 0 does not depend on its input"),
}


@pytest.mark.parametrize(("layers", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_probed_is_refused(layers: list[nn.Module], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        jacobian_gains(layers, lambda: layers[0](torch.ones(3)), **options)
    assert all(not layer._forward_hooks for layer in layers)


def test_a_layer_called_twice_is_refused() -> None:
    layer = nn.Tanh()
    with pytest.raises(ValueError, match="layer 0 is called twice"):
        jacobian_gains([layer], lambda: layer(layer(torch.ones(3))))
