"""The update of shards that are stored in fewer bits than they are computed with, by the rule's own function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distopt.kernels import blocks, exact, narrow_cpu, rounding
from distopt.kernels.narrow import WEIGHTS
from distopt.kernels.norms import squared_norms
from distopt.kernels.shards import Shards, computed
from distopt.kernels.update import Directions, SquaredNorms, ratio_of_each


class NarrowUpdate:
    """The update (`distopt.kernels.update.Update`) in float32, slice by slice: read, compute, write.

    A slice is all that is in float32 at a time. A trust ratio needs norms before the first number is written, so that
    the directions are computed twice.

    Args:
        directions: The rule: `ShardedOptimizer.directions`.
        shards: Its inputs, some of them narrow.
    """

    def __init__(self, directions: Directions, shards: Shards) -> None:
        self.group, self.layers = shards.group, shards.layers
        self._directions, self._shards = directions, shards

    def step(self) -> None:
        self.apply(None)

    def squared_norms(self) -> SquaredNorms:
        found: list[tuple[Tensor, Tensor]] = []
        self.layers = []
        for part in self._shards.slices():
            wide = read(part)
            weights = squared_norms(wide.params, part.rows)
            columns = zip(wide.buffers.items(), part.buffers.values())
            # Copies of the others too, since a rule updates its state in place.
            buffers = {
                name: [w.clone() if w is s else w for w, s in zip(new, stored)] for (name, new), stored in columns
            }
            directions = self._directions(replace(wide, buffers=buffers))
            found.append((weights, squared_norms(directions, part.rows)))
            self.layers += part.layers
        return tuple(torch.cat(column) for column in zip(*found)) or (torch.zeros(0, exact.DIGITS),) * 2

    def apply(self, ratios: Tensor | None) -> None:
        for part in self._shards.slices():
            wide = read(part)
            directions = self._directions(wide)
            if ratios is None:
                torch._foreach_add_(wide.params, directions, alpha=-self.group["lr"])
            else:
                factors = ratio_of_each(ratios, wide)
                torch._foreach_addcmul_(wide.params, directions, factors, value=-self.group["lr"])
            write(part, wide)


def narrow_indices(shards: Shards) -> list[int]:
    """Returns the indices of the shards of which weights or state are stored in fewer than 32 bits."""
    if shards.narrow is None:
        return []
    rows = zip(shards.params, *shards.buffers.values())
    return [i for i, row in enumerate(rows) if any(t is not None and t.dtype.itemsize < 4 for t in row)]


def gradient_norms(shards: Shards) -> SquaredNorms:
    """Returns |p|^2 and |gradient|^2 of each shard, slice by slice; changes no state."""
    if not shards.params:
        return (torch.zeros(0, exact.DIGITS, dtype=torch.float64),) * 2
    found = torch.zeros(2, len(shards.params), exact.DIGITS, dtype=torch.float64, device=shards.params[0].device)
    numbered = replace(shards, layers=list(range(len(shards.params))))
    for part in numbered.slices():
        index = torch.tensor(part.layers, device=found.device)
        for total, tensors in zip(found, (read(part).params, part.grads)):
            total.copy_(exact.carried(total.index_add(0, index, squared_norms(tensors, part.rows))))
    return found[0], found[1]


def read(part: Shards) -> Shards:
    """Returns shards with float32 copies of those columns that are narrow, in new memory."""
    columns = {WEIGHTS: part.params, **part.buffers}
    wide: dict[str, Any] = {name: [_read(part, name, i, t) for i, t in enumerate(of)] for name, of in columns.items()}
    return replace(part, params=wide.pop(WEIGHTS), buffers=wide, narrow=None)


def write(part: Shards, wide: Shards) -> None:
    """Stores the numbers of `read`, after an update, in the narrow shards."""
    for slot, (name, column) in enumerate({WEIGHTS: part.params, **part.buffers}.items()):
        values = wide.params if name == WEIGHTS else wide.buffers[name]
        for i, (stored, value) in enumerate(zip(column, values)):
            if stored is not value:
                _write(part, name, i, stored, value, slot)


def _extra(part: Shards, name: str, i: int) -> Tensor | None:
    assert part.narrow is not None
    return part.narrow.extras[name][i] if name in part.narrow.extras else None


def _read(part: Shards, name: str, i: int, stored: Tensor | None) -> Tensor | None:
    if stored is None or stored.dtype not in (torch.bfloat16, torch.uint8):
        return stored
    extra, form, like = _extra(part, name, i), part.form(name, i), part.params[i]
    if form is not None and extra is not None:
        values = narrow_cpu.load(stored, extra, form, part.rows[i])
        values = blocks.decode(stored, extra, form) if values is None else values
        return values.view(like.shape).to(computed(like))
    return stored.to(computed(like)) if extra is None else rounding.join(stored, extra)


def _write(part: Shards, name: str, i: int, stored: Tensor, value: Tensor, slot: int) -> None:
    assert part.narrow is not None
    extra, form, window = _extra(part, name, i), part.form(name, i), part.narrow.windows[i]
    value = value.float()
    key = rounding.key_of(part.narrow.keys[i], int(part.steps[i]), slot)
    if form is not None and extra is not None:
        if narrow_cpu.save(value.contiguous(), stored, extra, form, part.rows[i], key, window):
            return
        noise = rounding.noise(key, window.places(value.numel(), value.device))
        for tensor, found in zip((stored, extra), blocks.encode(value, form, noise)):
            tensor.copy_(found)
    elif extra is None:
        stored.copy_(rounding.at_random(value, key, window.places(value.numel(), value.device)))
    else:
        for tensor, half in zip((stored, extra), rounding.split(value)):
            tensor.copy_(half)
