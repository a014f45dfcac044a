"""Adafactor: Adam's second moment from its means over rows and columns, and steps relative to the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt import layout as layouts
from distopt.bounds.optimizer import BOUNDS, FACTORED
from distopt.kernels import exact
from distopt.kernels.norms import squared_norms
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.kernels.update import ratio_of_each
from distopt.layout import ShardLayout
from distopt.optim.base import ShardedOptimizer
from distopt.optim.factored import RowsAndColumns, column_slot, row_slot, unfactored_slot
from distopt.optim.options import DECOUPLED, options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions


def normalized(grads: list[Tensor], rows: list[Tensor], columns: list[Tensor], eps: float | None) -> list[Tensor]:
    """Computes the update U of `Adafactor` before it is clipped and scaled: g / max(sqrt(rows * columns), eps).

    Args:
        grads: The gradients.
        rows: The factors of their rows, R / mean(R); of vectors the second moment.
        columns: The factors of their columns, C; 1 for vectors.
        eps: The least divisor; None for the machine epsilon.
    """
    updates = torch._foreach_mul(rows, columns)
    torch._foreach_clamp_min_(updates, [_eps(eps, u) ** 2 for u in updates])
    torch._foreach_rsqrt_(updates)
    torch._foreach_mul_(updates, grads)
    return list(updates)


class Adafactor(ShardedOptimizer):
    r"""Adafactor: Adam without momentum, whose second moment of a matrix is the product of a column and a row.

        beta2 = 1 - step^beta2_decay
        R <- beta2 * R + (1 - beta2) * mean of g^2 over each row            of the full matrix
        C <- beta2 * C + (1 - beta2) * mean of g^2 over each column
        V = R C / max(mean(R), eps1)                    of a vector: V <- beta2 * V + (1 - beta2) * g^2
        U = g / max(sqrt(V), eps1)
        rate = min(lr, 1 / sqrt(step)) * max(RMS(p), eps2) / max(1, RMS(U) / d)
        p <- p - rate * U - lr * weight_decay * p

    `torch.optim.Adafactor`, with its arguments, defaults and state. It differs from the paper's Algorithms 4 and 5 as
    torch's does: lr is the greatest relative step size, 1e-2 in the paper; eps1 bounds the divisors, where the paper
    adds its square to g^2; and means stand for sums, whose quotient is the same. The root mean squares are those of
    full layers. Momentum, which the paper leaves out to save memory, is not here.

    State: of a matrix `row_var` of shape [..., rows, 1] and `col_var` of shape [..., 1, columns], of a vector
    `variance`. More than two dimensions are stacked matrices, the last two. The factors are complete on every rank,
    also where parameters are sharded: rows + columns numbers, 53 MB per rank for Llama 70B. All layers' sums travel in
    one all-reduce of float64, and the norms in another one, per mesh axis that shards.

    Args:
        params: Parameters, or param groups as dicts.
        lr: The greatest relative step size, >= 0; a number, or a tensor with one element.
        beta2_decay: The power of the step that is 1 - beta2, <= 0.
        eps: eps1 and eps2, >= 0. None as eps1 is the machine epsilon of the weights that are updated (float32 masters
            of 16-bit parameters).
        d: The threshold of RMS(U) above which an update is clipped, >= 1.
        weight_decay: Decoupled decay of the weights, >= 0.
        maximize: As for `ShardedOptimizer`, like the others below.
        trust_ratio: Must be False: steps are relative to the weights already.
        trust_clip: Without effect.
        capturable: For CUDA graphs; refused, as the rule has no kernel.
        torch_options: Options of torch's that change nothing here, and the cautious options of `ShardedOptimizer`.

    Raises:
        ValueError: Also by `bind`, for DeepSpeed's partitions, which have one state for many layers.

    Reference: Shazeer, Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost, ICML 2018,
    arXiv 1804.04235.
    """

    torch_options = DECOUPLED
    needs_float32 = "compares its steps with its float32 weights"
    bounds = BOUNDS | FACTORED
    _all: RowsAndColumns | None = None  # of the layout of the last step

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()), **torch_options)

    def rule(self, group: dict[str, Any]) -> Rule:
        power, lr = group["beta2_decay"], float(group["lr"])
        return Rule(
            buffers=("row_var", "col_var", "variance"),
            slots={"row_var": row_slot, "col_var": column_slot, "variance": unfactored_slot},
            decay="decoupled",
            scalars={"decoupled": group["weight_decay"]},
            scales={
                "one_minus_beta2": lambda step: step**power,
                "relative": lambda step: min(1.0, step**-0.5 / lr) if lr else 1.0,
            },
        )

    def directions(self, shards: Shards) -> list[Tensor]:
        assert shards.ratios is not None
        b, relative = shards.buffers, shards.inputs["relative"]
        directions = normalized(shards.grads, b["rows"], b["columns"], shards.group["eps"][0])
        torch._foreach_mul_(directions, relative)
        assert shards.ratios is not None
        torch._foreach_mul_(directions, shards.ratios)
        if decoupled := shards.rule.scalars["decoupled"]:
            torch._foreach_add_(directions, shards.params, alpha=decoupled)
        return directions

    def check(self, group: dict[str, Any]) -> None:
        if group["trust_ratio"]:
            raise ValueError(
                "trust_ratio=True: the steps of Adafactor are relative to the norm of the weights already: give False, "
                "or use distopt.LAMB"
            )

    def bind(self, layout: ShardLayout) -> None:
        """As in the base class.

        Raises:
            ValueError: Also for flat partitions of several layers: DeepSpeed's.
        """
        owned = ((p, [layout.params[s.layer] for s in segments]) for p, segments in layout.segments.items())
        if any(len(layers) != 1 or layers[0] is not p for p, layers in owned):
            raise ValueError(
                "Adafactor has a state for each layer, and the layout flat partitions of many (DeepSpeed's): "
                "use another engine, ZeRO-1 of distopt or FSDP2"
            )
        super().bind(layout)

    def _measure(self, layout: ShardLayout, shards: list[Shards]) -> Callable[[], None]:
        if self._all is None or self._all.layout is not layout:
            self._all = RowsAndColumns(layout)
        shards[:] = [each.scaled() for each in shards]
        factors = self._averaged(layout, self._all.means(shards))
        for each in shards:
            _update_variance(each)
        shards[:] = [self._all.tiled(each, factors) for each in shards]
        layers: list[int] = []
        columns: list[list[Tensor]] = [[], []]
        for part in (part for each in shards for part in each.slices()):
            layers += part.layers
            updates = normalized(part.grads, part.buffers["rows"], part.buffers["columns"], part.group["eps"][0])
            columns[0].append(squared_norms(part.params, part.rows))
            columns[1].append(squared_norms(updates, part.rows))
        none = torch.zeros(0, exact.DIGITS, dtype=torch.float64)
        sums = layout.total(layers, *(torch.cat(column) if column else none for column in columns))
        weights, updates = sums.div_(self._all.numel).sqrt_()
        for i, each in enumerate(shards):
            ratios = weights.clamp(min=each.group["eps"][1]) / (updates / each.group["d"]).clamp_(min=1.0)
            shards[i] = replace(each, ratios=ratio_of_each(ratios, each))
        return lambda: None

    def _averaged(
        self, layout: ShardLayout, means: dict[int, tuple[Tensor, Tensor]]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Updates R and C of every layer with a gradient, also of those of which this rank has no part.

        Returns:
            By layer, the factors of V: R / mean(R) and C.
        """
        factors = {}
        for group in self.param_groups:
            power = group["beta2_decay"]
            for p in layouts.with_gradient(group["params"]):
                (segment,), state = layout.segments[p], self.state[p]
                if segment.layer not in means:
                    continue
                weight = float(state["step"]) ** power
                row, column = state["row_var"], state["col_var"]
                for average, mean in zip((row, column), means[segment.layer]):
                    average.lerp_(mean.to(average.dtype), weight)
                least = _eps(group["eps"][0], row)
                factors[segment.layer] = row / row.mean(-2, keepdim=True).clamp_(min=least), column
        return factors

    def _forget_layout(self) -> None:
        super()._forget_layout()
        self._all = None


def _update_variance(shards: Shards) -> None:
    """Updates the second moment of vectors."""
    weights = shards.inputs["one_minus_beta2"]
    for variance, g, weight in zip(shards.buffers["variance"], shards.grads, weights):
        if variance is not None:
            variance.lerp_(g.to(variance.dtype).square(), weight)


def _eps(eps: float | None, like: Tensor) -> float:
    return torch.finfo(like.dtype).eps if eps is None else eps
