"""What optimizers share that estimate their own step size d from all layers: D-Adaptation and Prodigy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels import exact
from distopt.kernels.norms import products
from distopt.kernels.shards import Shards
from distopt.layout import FlatLayout, ShardLayout
from distopt.layout.tensors import Trained
from distopt.optim.base import ShardedOptimizer
from distopt.optim.options import DECOUPLED, options

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from distopt.optim.options import TorchOptions

_SHARED = ("lr", "betas", "momentum", "d0", "d_coef")  # enter d, of which there is one


class DistanceAdapted(ShardedOptimizer):
    """An optimizer whose steps are multiplied by d, an estimate of the distance from the start to a solution.

    A step has one more exchange, between those of `ShardedOptimizer`: inner products over all layers of all param
    groups, in one all-reduce per sharded mesh axis. d changes after the update, for the next step.

    d never falls. It is one number for all layers and param groups, the entry `d` of each param group beside its
    numerator `d_numerator`: float64 0-D tensors, which are saved and loaded with the groups, and equal on all ranks at
    every world size, since the inner products are sums over full layers without rounding.

    All param groups have the same lr, betas, d0 and d_coef, and no trust ratio, which would cancel d.

    Attributes:
        inner_products: The number of inner products of a step.
    """

    inner_products = 2

    torch_options = DECOUPLED
    needs_float32 = "measures distances between its weights and others in float32"
    group_state: tuple[str, ...] = ("d", "d_numerator")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        *,
        maximize: bool = False,
        trust_ratio: bool = False,
        trust_clip: tuple[float, float] | None = None,
        capturable: bool = False,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        super().__init__(params, options(locals()) | {"d": None, "d_numerator": None}, **torch_options)

    def factors(self, shards: Shards) -> list[tuple[list[Tensor], list[Tensor]]]:
        """Returns the factors of the inner products, and updates the state that they need, before `directions`."""
        raise NotImplementedError

    def prepare(self, totals: Tensor) -> None:
        """Keeps what the update needs of the inner products, before it."""

    def estimate(self, group: dict[str, Any], numerator: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the new numerator and the estimate of d from the last numerator and new sums, the second of which it
        divides by: where that is 0, the estimate does not count."""
        raise NotImplementedError

    def bind(self, layout: ShardLayout) -> None:
        """As in the base class.

        Raises:
            ValueError: Also for several partitions of DeepSpeed, which are stepped one after another.
        """
        if isinstance(layout, FlatLayout) and len(layout.partitions) > 1:
            raise ValueError(
                f"{type(self).__name__} needs all layers in one call of step(), and DeepSpeed makes one for each of "
                f"{len(layout.partitions)} partitions: give it one param group (without sub-groups at stage 3), or "
                "use another engine, ZeRO-1 of distopt or FSDP2"
            )
        super().bind(layout)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check_shared()
        except ValueError:
            self.param_groups.pop()
            raise
        self.param_groups[-1].update({name: self.param_groups[0][name] for name in self.group_state})

    def check(self, group: dict[str, Any]) -> None:
        if group["trust_ratio"]:
            raise ValueError(
                f"trust_ratio=True: the ratio would cancel the step size d of {type(self).__name__}: give False, or "
                "use distopt.LAMB"
            )

    def beta3(self, group: dict[str, Any]) -> float:
        """Returns the decay of the sums that estimate d."""
        return float(group["betas"][1] ** 0.5)

    def d(self, group: dict[str, Any]) -> Tensor | float:
        """Returns d, as it is in this step."""
        return group["d0"] if group["d"] is None else group["d"]

    def _measure(self, layout: ShardLayout, shards: list[Shards]) -> Callable[[], None]:
        layers: list[int] = []
        columns: list[list[Tensor]] = [[] for _ in range(self.inner_products)]
        for part in (part for each in shards for part in each.slices()):
            layers += part.layers
            for column, pair in zip(columns, self.factors(part)):
                column.append(products(*pair, part.rows))
        none = torch.zeros(0, exact.DIGITS, dtype=torch.float64)
        sums = layout.total(layers, *(torch.cat(column) if column else none for column in columns))
        totals = torch.stack([exact.total(of_layers) for of_layers in sums])
        self.prepare(totals)
        return lambda: self._adapt(totals)

    def _adapt(self, totals: Tensor) -> None:
        group = self.param_groups[0]
        start = {"d": group["d0"], "d_numerator": 0.0}
        d, numerator = (
            torch.as_tensor(start[name] if group[name] is None else group[name], dtype=torch.float64).to(totals.device)
            for name in start
        )
        numerator, found = self.estimate(group, numerator, totals)
        # |s|_1 is 0 before there is a gradient, and in a step without any, whose numerator is left of those before.
        d = torch.where((totals[1] > 0) & (found > d), found, d)
        for group in self.param_groups:
            group.update(d=d, d_numerator=numerator)

    def _begin(self) -> tuple[ShardLayout, list[Trained]]:
        self._check_shared()
        return super()._begin()

    def _check_shared(self) -> None:
        for name in _SHARED:
            values = [group[name] for group in self.param_groups if group["params"] and name in group]
            values = [list(value) if name == "betas" else float(value) for value in values]
            if others := [value for value in values if value != values[0]]:
                raise ValueError(
                    f"param groups have {name} {values[0]} and {others[0]}, and {type(self).__name__} has one step "
                    "size for all: give them the same, and let groups differ in weight_decay"
                )


def each(value: Tensor | float, tensors: list[Tensor]) -> list[Tensor]:
    """Returns a number as a 0-D tensor for each tensor, in its dtype: float64 would promote 0-D parameters."""
    kinds = {(t.dtype, t.device) for t in tensors}
    found = {kind: torch.as_tensor(value, dtype=kind[0], device=kind[1]) for kind in kinds}
    return [found[t.dtype, t.device] for t in tensors]
