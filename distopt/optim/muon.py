"""Muon: momentum whose matrices are made orthogonal."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt import layout as layouts
from distopt.bounds.optimizer import BOUNDS, MATRICES
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.kernels.update import Update
from distopt.layout import ShardLayout
from distopt.layout.matrix_exchange import MatrixExchange, exchanges
from distopt.optim.matrix_update import matrix_updates
from distopt.optim.mixed import MixedOptimizer
from distopt.optim.newton_schulz import newton_schulz, newton_schulz_cost, scale
from distopt.optim.options import DECOUPLED, options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


def momenta(shards: Shards) -> Sequence[Tensor]:
    """Updates the momentum of shards in place, and returns what is to be made orthogonal."""
    momentum, buffers = shards.group["momentum"], shards.buffers["momentum_buffer"]
    grads = [g.to(m.dtype) for g, m in zip(shards.grads, buffers)]
    torch._foreach_lerp_(buffers, grads, 1.0 - momentum)
    return torch._foreach_lerp(grads, buffers, momentum) if shards.group["nesterov"] else buffers


class Muon(MixedOptimizer):
    r"""Muon for hidden matrices: momentum, made orthogonal. Other param groups have the rule of AdamW or Lion.

        m <- momentum * m + (1 - momentum) * g
        u = momentum * m + (1 - momentum) * g            without nesterov: u = m
        direction = scale * NS(u) + weight_decay * p     NS: `newton_schulz` of the full matrix
        p <- p - lr * direction

        optimizer = distopt.Muon(distopt.param_groups(model, matrices="muon"), lr=2e-3, adjust_lr_fn="match_rms_adamw")

    `torch.optim.Muon`, with its arguments, defaults and state; as there, m is an average of gradients, where the paper
    has their sum, which is the same direction. A layer of three dimensions is a stack of matrices (experts), one of
    four or more a filter [out, in * height * width]; a fused qkv weight is one matrix. `original` takes the first
    dimension of a matrix for the outputs: transformers' Conv1D (GPT-2) stores it the other way round.

    Momentum is sharded as its parameter. Each full matrix travels to one rank, which computes with it, and back: one
    all-to-all each way for a bucket of layers (under DDP back only). The ranks have shares of the work that are as
    equal as the longest-processing-time rule makes them. Under DDP that needs `distopt.layout.ddp_layout`, which the
    training job binds; without it every rank computes all of them. The matrices travel in the dtype of `newton_schulz`,
    which loses nothing. Given equal gradients the weights have the same bits on every engine.

    Args:
        params: Parameters, or param groups as dicts, which may name their `rule`: `muon`, `adamw` or `lion`.
        lr: Learning rate, >= 0; a number, or a tensor with one element.
        weight_decay: Decoupled decay of the weights, >= 0.
        momentum: Decay of the momentum, in [0, 1).
        nesterov: Look ahead by one step of the momentum.
        ns_coefficients: a, b and c of `newton_schulz`.
        eps: Its least divisor, >= 0; of groups with the rule `adamw` AdamW's own eps, 1e-8.
        ns_steps: Its iterations, from 1 to 99.
        adjust_lr_fn: `original` (None): scale = sqrt(max(1, rows / columns)); `match_rms_adamw`: scale = 0.2
            sqrt(max(rows, columns)), with which lr and weight decay may be AdamW's.
        betas: Those of groups with the rule `adamw` or `lion`.
        ns_dtype: The dtype of `newton_schulz`: `bfloat16`, as torch's, or `float32` (float64 for such weights).
        exchange_mib: The MiB of matrices that a rank receives or sends at most in one exchange, of which two are under
            way; a larger layer travels by itself.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: For groups with the rule `adamw` or `lion`.
        trust_clip: Bounds of the trust ratio.
        capturable: Must be False.
        torch_options: Options of torch's that change nothing here, and the cautious options of `ShardedOptimizer`, for
            groups with the rule `adamw` or `lion`.

    Raises:
        ValueError: Also for a vector in a group with the rule `muon`.

    Reference: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024,
    https://kellerjordan.github.io/posts/muon/; Liu et al., Muon is Scalable for LLM Training, 2025, arXiv 2502.16982.
    """

    torch_options = DECOUPLED
    bounds = BOUNDS | MATRICES
    own = "muon"
    renamed = ("eps",)
    needs_float32 = "sends full matrices of float32 weights or masters"
    _exchanges: tuple[ShardLayout | None, dict[Any, list[MatrixExchange]]]  # of the layout of the last step

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        ns_dtype: str = "bfloat16",
        exchange_mib: int = 128,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()) | {"rule": self.own}, **torch_options)

    def own_rule(self, group: dict[str, Any]) -> Rule:
        return Rule(
            buffers=("momentum_buffer",),
            signed=("momentum_buffer",),
            scalars={"decoupled": group["weight_decay"]},
            decay="decoupled",
            work=lambda rows, columns: group["ns_steps"] * newton_schulz_cost(rows, columns),
        )

    def directions(self, shards: Shards) -> list[Tensor]:
        """Computes the directions, of orthogonal matrices in the place of gradients."""
        layout, adjust = self._exchanges[0], shards.group["adjust_lr_fn"]
        assert layout is not None
        factors = [scale(*_rows_and_columns(layout, layer), adjust) for layer in shards.layers]
        directions = torch._foreach_mul(shards.grads, factors)
        if decoupled := shards.rule.scalars["decoupled"]:
            torch._foreach_add_(directions, shards.params, alpha=decoupled)
        return list(directions)

    def own_updates(self, layout: ShardLayout, shards: Shards) -> list[Update]:
        group = shards.group
        layers = tuple(layout.members(layouts.trained(group["params"])))
        dtype = _dtype(layout, layers, group["ns_dtype"])
        orthogonal = functools.partial(
            newton_schulz,
            coefficients=tuple(group["ns_coefficients"]),
            steps=group["ns_steps"],
            eps=group["eps"],
        )
        found = self._exchanges_of(layout, layers, 2**20 * group["exchange_mib"] // dtype.itemsize)
        return matrix_updates(found, shards, momenta, orthogonal, self.directions, dtype)

    def required(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = super().required(group)
        return names if group["rule"] != self.own else tuple(name for name in names if name != "step")  # as torch's

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for i, p in enumerate(group["params"] if group["rule"] == self.own else ()):
                named = group["param_names"][i] if "param_names" in group else f"parameter {i} of the param group"
                _check_matrix(layouts.full_shape(p), named)
        except ValueError:
            self.param_groups.pop()
            raise

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group["rule"] != self.own:
            return
        for name in ("trust_ratio", "cautious", "cautious_decay"):
            if group[name]:
                raise ValueError(
                    f"{name}=True: the steps of the rule 'muon' have a size of their own: give {name}=False, or the "
                    "group another rule"
                )

    def _exchanges_of(self, layout: ShardLayout, layers: tuple[int, ...], limit: int) -> list[MatrixExchange]:
        known, found = self._exchanges
        if known is not layout:
            self._exchanges = layout, (found := {})
        if (layers, limit) not in found:
            for layer in layers:
                _check_matrix(layout.full_shape(layout.params[layer]), f"layer {layer}")
            found[layers, limit] = exchanges(layout, layers, limit, newton_schulz_cost)
        return found[layers, limit]

    def _forget_layout(self) -> None:
        super()._forget_layout()
        self._exchanges = None, {}


def _check_matrix(shape: torch.Size, name: str) -> None:
    if len(shape) < 2:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, and the rule 'muon' is for matrices: give it a param group with "
            "rule='adamw'; distopt.param_groups(model, matrices='muon') makes such groups"
        )


def _rows_and_columns(layout: ShardLayout, layer: int) -> tuple[int, int]:
    shape = layout.full_shape(layout.params[layer])
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], shape[1:].numel())


def _dtype(layout: ShardLayout, layers: Sequence[int], name: str) -> torch.dtype:
    if name == "bfloat16":
        return torch.bfloat16
    return functools.reduce(torch.promote_types, (layout.params[layer].dtype for layer in layers), torch.float32)
