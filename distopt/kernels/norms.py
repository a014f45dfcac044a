"""Inner products of shards, in digits whose sum is the same bits however the layers are sharded between rows.

The elements of a row (one index of a layer's dimension 0) are summed in blocks, each in one order; the sums of the
blocks are added without rounding (`distopt.kernels.exact`). Sharding between rows divides no block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distopt.kernels import cpu, exact

_BLOCK = 512  # elements; the same in cpu.c
_SPAN = 2**17  # elements that are converted to float64 at once
_PIECE = 2**24  # elements of a float32 inner product on a GPU


def squared_norms(tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Computes the squared 2-norm of each tensor.

    Args:
        tensors: Tensors of any float dtype. On a GPU each is summed in one piece, in float32 unless one is float64.
        rows: The elements of a row of each tensor's layer.

    Returns:
        Digits of shape [len(tensors), exact.DIGITS].
    """
    if tensors and tensors[0].device.type != "cpu":
        wide = any(t.dtype == torch.float64 for t in tensors)
        norms = torch._foreach_norm(list(tensors), 2.0, torch.float64 if wide else torch.float32)
        return exact.digits(torch.stack(norms).double().square_())
    return products(tensors, tensors, rows)


def products(left: Sequence[Tensor], right: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Computes the inner product of each pair of tensors; arguments and result as those of `squared_norms`."""
    if left and left[0].device.type != "cpu":
        return exact.digits(torch.stack([_on_gpu(a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right)]))
    found, done = cpu.products(left, right, rows)
    if missing := sorted(set(range(len(left))) - set(done)):
        found[missing] = _eager([(left[i], right[i], rows[i]) for i in missing])
    return found


def _on_gpu(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)  # torch rounds the product of 16 bits to 16 bits
    pieces = zip(a.split(_PIECE), b.split(_PIECE))
    return torch.stack([torch.dot(x.to(wide), y.to(wide)).double() for x, y in pieces]).sum()


def _eager(triples: Sequence[tuple[Tensor, Tensor, int]]) -> Tensor:
    """Computes what cpu.c computes, for other dtypes and without a compiler."""
    found = torch.zeros(len(triples), exact.DIGITS, dtype=torch.float64)
    pending: list[tuple[int, Tensor]] = []
    count = 0
    for i, (a, b, row) in enumerate(triples):
        for sums in _blocks(a.reshape(-1), b.reshape(-1), row):
            if pending and count + len(sums) > exact.ADDENDS - 1:
                found, pending, count = _added(found, pending), [], 0
            pending.append((i, sums))
            count += len(sums)
    return _added(found, pending) if pending else found


def _added(found: Tensor, pending: list[tuple[int, Tensor]]) -> Tensor:
    index = torch.cat([torch.full(sums.shape, i) for i, sums in pending])
    return exact.carried(found.index_add_(0, index, exact.digits(torch.cat([sums for _, sums in pending]))))


def _blocks(a: Tensor, b: Tensor, row: int) -> Iterator[Tensor]:
    """Yields the sums of blocks of rows, at most ADDENDS / 2 at once, also of the rest if a shard ends within a row."""
    step = max(1, _SPAN // row) * row
    for x, y in zip(a.split(step), b.split(step)):
        values = x.double() * y.double()
        full_rows = values.numel() // row * row
        matrix, rest = values[:full_rows].view(-1, row), values[full_rows:]
        full = row // _BLOCK * _BLOCK
        blocks = [block.sum().view(1) for block in rest.split(_BLOCK)]
        if full:
            blocks.append(matrix[:, :full].unflatten(1, (-1, _BLOCK)).sum(-1).view(-1))
        if full < row:
            blocks.append(matrix[:, full:].sum(-1))
        for sums in blocks:
            yield from sums.split(exact.ADDENDS // 2)
