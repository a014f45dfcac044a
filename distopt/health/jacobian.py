"""The product of the layers' Jacobian norms, by random probes: what a network does to a gradient on its way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distopt.bounds import integer


class Gains(NamedTuple):
    """By how much a gradient changes on its way back.

    Attributes:
        layers: The factor of each layer, from the first to the last.
        product: Their product.
        through: The factor from the output of the last layer to the input of the first, measured directly.
    """

    layers: list[float]
    product: float
    through: float


def jacobian_gains(layers: Sequence[nn.Module], forward: Callable[[], Any], *, probes: int = 8, seed: int = 0) -> Gains:
    r"""Estimates the norms of the Jacobians of a network's layers by products with random vectors.

        gain_l^2  = E |J_l^T u|^2 / |u|^2 = |J_l|_F^2 / n_l             u ~ N(0, 1), J_l = d y_l / d x_l of n_l outputs
        product   = prod over l of gain_l                               below 1: vanishing; above: exploding
        through^2 = E |(J_L ... J_1)^T u|^2 / |u|^2                     the same for all layers together

    The gain is the factor of a gradient in a random direction, and not the spectral norm, which bounds it from above;
    `product` and `through` agree where the Jacobians are independent, as at initialisation. x_l and y_l are the first
    floating-point tensor that a layer is given and returns, over the whole batch. The error of the estimate falls as
    1 / sqrt(probes * n_l).

    Args:
        layers: Modules that the forward pass calls once each, in this order, such as a transformer's blocks.
        forward: Runs the forward pass of the model on a batch.
        probes: The number of random vectors, >= 1.
        seed: Of the probes, >= 0.

    Raises:
        ValueError: For an argument out of its bound, for sharded weights, of which each rank has a part, and for a
            layer that is not called, or does not depend on what it was given.

    Reference: the product of the layers' weights in Pascanu, Mikolov, Bengio, On the difficulty of training recurrent
    neural networks, ICML 2013, arXiv 1211.5063; gains at initialisation: Pennington, Schoenholz, Ganguli, Resurrecting
    the sigmoid in deep learning through dynamical isometry, NeurIPS 2017, arXiv 1711.04735.
    """
    integer(1).check("probes", probes)
    integer(0).check("seed", seed)
    if not layers:
        raise ValueError("layers is empty: give the modules whose Jacobians are to be measured")
    if any(hasattr(p, "placements") for layer in layers for p in layer.parameters()):
        raise ValueError(
            "the layers are sharded, and a probe needs them in full: measure a model of one process, such as "
            "`python -m distopt.export` writes"
        )
    ends = _ends(layers, forward)
    generator = torch.Generator().manual_seed(seed)
    pairs = [*ends, (ends[0][0], ends[-1][1])]
    squares = [0.0] * len(pairs)
    for _ in range(probes):
        for i, (x, y) in enumerate(pairs):
            u = torch.randn(y.shape, generator=generator).to(y)
            (back,) = torch.autograd.grad(y, x, u, retain_graph=True, allow_unused=True)
            if back is None:
                raise ValueError(f"layer {i} does not depend on its input: give layers that compute from a tensor")
            squares[i] += float(back.double().square().sum() / u.double().square().sum())
    *gains, through = (math.sqrt(square / probes) for square in squares)
    return Gains(gains, math.prod(gains), through)


def _ends(layers: Sequence[nn.Module], forward: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """Runs the forward pass; returns the input and the output of each layer, in one graph."""
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def before(i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tensor = _first(args, kwargs.values())
            if i in inputs or tensor is None:
                raise ValueError(f"layer {i} is called twice, or without a floating-point tensor: give others")
            inputs[i] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()

            def given(value: Any) -> Any:
                return inputs[i] if value is tensor else value

            return tuple(map(given, args)), {name: given(value) for name, value in kwargs.items()}

        return hook

    def after(i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = _first(output if isinstance(output, (tuple, list)) else (output,))
            if tensor is not None:
                outputs[i] = tensor

        return hook

    handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(layers)]
    handles += [layer.register_forward_hook(after(i)) for i, layer in enumerate(layers)]
    try:
        with torch.enable_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [i for i in range(len(layers)) if i not in inputs or i not in outputs]:
        raise ValueError(f"the forward pass did not call layer {missing[0]} of {len(layers)}: give those that it calls")
    return [(inputs[i], outputs[i]) for i in range(len(layers))]


def _first(*groups: Any) -> Tensor | None:
    found = (value for group in groups for value in group if isinstance(value, Tensor) and value.is_floating_point())
    return next(found, None)
