"""A rank's range of a bucket in the memory of the host, where an optimizer updates it without memory of the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from distopt.layout.bucket import Bucket


class HostRange:
    """Copies of the weights and gradients that this rank owns of a bucket, which the device copies from and to.

    In pinned memory, so that copies run beside what the device computes. Weights are sent after each update; those that
    were changed on the device since (a model's state dict, an average of weights) are fetched before the next. Such a
    change is noticed by torch's count of in-place operations, so that a write through `param.data` is not.

    Args:
        bucket: The bucket, on a device or on the host.

    Attributes:
        weights, grads: Flat tensors of the host.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._versions: dict[Tensor, int] = {}
        numel, pinned = bucket.own.stop - bucket.own.start, bucket.weights.is_cuda
        self.weights = torch.empty(numel, dtype=bucket.weights.dtype, pin_memory=pinned)
        self.grads = torch.empty(numel, dtype=bucket.grads.dtype, pin_memory=pinned)

    def counterpart(self, tensor: Tensor) -> Tensor | None:
        """Returns the copy that has the elements of a weight or gradient; None for a tensor outside of the bucket."""
        memory = tensor.untyped_storage().data_ptr()
        if memory == self._bucket.weights.untyped_storage().data_ptr():
            return self.weights
        return self.grads if memory == self._bucket.grads.untyped_storage().data_ptr() else None

    def fetch_grads(self) -> None:
        """Starts to copy the gradients to the host."""
        self.grads.copy_(self._bucket.grads[self._bucket.own], non_blocking=True)

    def fetch_weights(self, param: Tensor) -> None:
        """Copies the weights of one parameter to the host, if they were changed on the device since the last time."""
        if self._versions.get(param) == param._version:
            return
        self._versions[param] = param._version
        at, (start, numel) = self._bucket.ranges_in_own[param]
        self.weights.narrow(0, at, numel).copy_(param.detach().view(-1).narrow(0, start, numel))

    def send_weights(self) -> None:
        """Starts to copy the weights to the device."""
        self._bucket.weights[self._bucket.own].copy_(self.weights, non_blocking=True)
