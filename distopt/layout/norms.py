"""Norms and inner products of every layer of a sharded model, with one all-reduce for all layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.kernels import exact
from distopt.kernels.device_lists import DeviceLists
from distopt.kernels.norms import products, squared_norms


class LayerNorms:
    """The sums that a layout can answer. Every method is collective: every rank has to call it.

    Attributes:
        params, device, groups, counted, wire: As in `distopt.layout.ShardLayout`.
    """

    params: tuple[Tensor, ...]
    device: torch.device
    groups: tuple[dist.ProcessGroup, ...]
    counted: tuple[bool, ...]
    wire: torch.device | None
    _indices: DeviceLists  # those of the step before

    @property
    def num_layers(self) -> int:
        """The number of layers over all ranks."""
        return len(self.params)

    def rows(self, layers: Sequence[int]) -> list[int]:
        """Returns the elements of a row (one index of dimension 0) of each of these layers."""
        raise NotImplementedError

    @torch.no_grad()
    def norms(self, layers: Sequence[int], *shards: Sequence[Tensor]) -> list[Tensor]:
        """Computes the global 2-norm of every layer, for each of these lists of shards.

            norm[i] = sqrt(sum over ranks and over shards of layer i of |shard|^2)

        One all-reduce per mesh axis that shards, of `len(shards) * num_layers` values in 16 digits each, whatever the
        number of tensors; none where nothing is sharded. A rank without elements takes part too. Nothing is read back
        to the host; inf and NaN propagate to every rank.

        On the CPU the result is the same bits on every layout that shards between rows, at every number of ranks: the
        sums of blocks of rows are added without rounding. A layout that shards within rows (tensor parallelism,
        DeepSpeed), and a GPU, which sums each shard on its own, differ by rounding.

        Args:
            layers: The index of the layer of each shard, as `ShardLayout.layers` gives it.
            *shards: Lists of shards, of any float dtype.

        Returns:
            One float64 tensor of shape [num_layers] for each list, on `device`.
        """
        rows = self.rows(layers)
        return list(self.total(layers, *(squared_norms(each, rows) for each in shards)).sqrt_())

    @torch.no_grad()
    def dots(self, layers: Sequence[int], *pairs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[Tensor]:
        """Computes the inner product of every layer, for each of these pairs of lists of shards.

            dot[i] = sum over ranks and over shards of layer i of a . b

        As `norms`, and at its cost.
        """
        rows = self.rows(layers)
        return list(self.total(layers, *(products(a, b, rows) for a, b in pairs)))

    @torch.no_grad()
    def total(self, layers: Sequence[int], *columns: Tensor) -> Tensor:
        """Adds up values of shards, layer by layer and over all ranks, with one all-reduce per mesh axis that shards.

        Args:
            layers: The index of the layer of each shard.
            *columns: Values in the digits of `distopt.kernels.exact`, of shape [len(layers), exact.DIGITS] each; the
                same number of columns on every rank.

        Returns:
            float64 tensor of shape [len(columns), num_layers] on `device`.
        """
        return self.reduced(self.local_sums(layers, *columns))

    @torch.no_grad()
    def local_sums(self, layers: Sequence[int], *columns: Tensor) -> Tensor:
        """Adds up values of shards layer by layer on this rank alone: the first half of `total`, without a collective.

        Returns:
            float64 tensor of shape [len(columns), num_layers, exact.DIGITS] on `device`.
        """
        sums = torch.zeros(len(columns), self.num_layers, exact.DIGITS, dtype=torch.float64, device=self.device)
        if layers:
            stacked = torch.stack(columns).to(self.device)
            if not self._all_counted:
                keep = tuple(i for i, layer in enumerate(layers) if self.counted[layer])
                layers, stacked = [layers[i] for i in keep], stacked[:, self._indices.get(keep, self.device)]
            sums.index_add_(1, self._indices.get(tuple(layers), self.device), stacked)
        return sums

    @torch.no_grad()
    def reduced(self, sums: Tensor) -> Tensor:
        """Adds `local_sums` over all ranks: the second half of `total`, one all-reduce per mesh axis that shards.

        Sums of several kinds may be concatenated for one call.

        Returns:
            float64 tensor of shape [columns, num_layers] on `device`.
        """
        return exact.value(self.added(sums))

    @torch.no_grad()
    def added(self, values: Tensor) -> Tensor:
        """Adds a tensor, of the same shape on every rank, over all ranks: one all-reduce per mesh axis that shards.

        Of a layer that is not `counted` here the values have to be 0. What is added up without rounding, such as the
        digits of `distopt.kernels.exact`, is the same bits at every number of ranks.
        """
        values = values.to(self.wire or self.device)
        for group in self.groups:
            dist.all_reduce(values, group=group)
        return values.to(self.device)

    @functools.cached_property
    def _all_counted(self) -> bool:
        return all(self.counted)
