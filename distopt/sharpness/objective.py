"""A loss as a function of the weights: its value, its gradient and its Hessian-vector products, on any sharding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distopt import collective
from distopt.engine.fsdp2 import leave_pass
from distopt.layout import infer_layout, local
from distopt.layout.fsdp2 import reshard

Vector = list[Tensor]  # one local tensor for each parameter, sharded as it is


class Objective:
    r"""The mean loss of a model over batches and ranks, as a function of its weights.

        L(w) = mean over ranks and batches of loss(model, batch)

    Vectors are lists of local tensors, one per parameter and sharded as the parameter, in its dtype. Every method is
    collective: every rank has to call it. Results are the same on every rank. The model is in `eval` mode meanwhile
    (no dropout); weights, gradients, buffers' mode and `requires_grad` are afterwards as before.

    Hessian-vector products are exact (a second backward pass) where every rank has the full weights: one process, DDP
    and ZeRO-1. FSDP2's hooks do not support a second backward pass, so on shards they are central differences

        H v = (grad L(w + h v / |v|) - grad L(w - h v / |v|)) |v| / (2 h)        h = sqrt(eps) (1 + |w|)

    with eps that of the dtype: the rounding of the weights gives a relative error of about sqrt(eps) (3e-4 in float32,
    1e-8 in float64), and the curvature's own change another of h^2 L'''' / 6 L''.

    Args:
        model: The model: plain, in DistributedDataParallel, or sharded by `fully_shard`.
        loss: `loss(model, batch)` returns the mean loss of a batch, a scalar.
        batches: This rank's batches, on the model's device; equally many on every rank, each of the same weight.

    Attributes:
        model: The model without DDP's wrapper.
        params: The parameters that require a gradient; the others are constants.
        layout: How they are sharded.
        numel: The number of weights over all ranks.
        progress: Called after each pass over a batch.

    Raises:
        ValueError: Without batches or trainable parameters; for 16-bit parameters; under DeepSpeed.

    Reference: Pearlmutter, Fast Exact Multiplication by the Hessian, Neural Computation 1994,
    doi 10.1162/neco.1994.6.1.147.
    """

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any]) -> None:
        _refuse_deepspeed(model)
        inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        self.model: nn.Module = inner  # DDP's backward pass would send
        self.loss, self.batches = loss, list(batches)
        self.progress: Callable[[], None] = lambda: None
        reshard(self.model)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        _check(self.params, self.batches)
        self.layout = infer_layout(self.params)
        self.numel = sum(p.numel() for p in self.params)
        self._layers = self.layout.layers(self.params)
        self._sharded = any(hasattr(p, "placements") for p in self.params)

    def weights(self) -> Vector:
        """Returns views of the weights."""
        return [local(p.detach()) for p in self.params]

    def layer_norms(self, vector: Vector) -> Tensor:
        """Returns the 2-norm of each parameter's full part of a vector: float64, shape [parameters]."""
        return self.layout.norms(self._layers, vector)[0]

    def dots(self, *pairs: tuple[Vector, Vector]) -> list[float]:
        """Returns the inner products of pairs of vectors, by one all-reduce per mesh axis that shards."""
        return [float(products.sum()) for products in self.layout.dots(self._layers, *pairs)]

    def norm(self, vector: Vector) -> float:
        """Returns the 2-norm of a vector."""
        return math.sqrt(max(0.0, self.dots((vector, vector))[0]))

    @contextlib.contextmanager
    def moved(self, *moves: tuple[float, Vector]) -> Iterator[None]:
        """Adds multiples of vectors to the weights, which are restored bit for bit, also if the block raises."""
        weights = self.weights()
        before = [w.clone() for w in weights]
        try:
            with torch.no_grad():
                for factor, vector in moves:
                    torch._foreach_add_(weights, vector, alpha=factor)
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, before)
            reshard(self.model)

    def value(self) -> float:
        """Returns the loss at the weights."""
        with torch.no_grad(), self._evaluating():
            return self._mean(torch.stack([self._loss(batch).double() for batch in self.batches]).mean())

    def value_and_gradient(self) -> tuple[float, Vector]:
        """Returns the loss and its gradient at the weights. A parameter that the loss does not use has zeros."""
        with self._evaluating():
            return self._backward() if self._sharded else self._grad()

    def product(self, vector: Vector) -> Vector:
        """Returns the Hessian at the weights times a vector."""
        if not self._sharded:
            with self._evaluating(), sdpa_kernel(SDPBackend.MATH):  # others have no second derivative
                return self._exact_product(vector)
        length = self.norm(vector)
        if length == 0.0:
            return [torch.zeros_like(v) for v in vector]
        h = math.sqrt(torch.finfo(self.params[0].dtype).eps) * (1.0 + self.norm(self.weights()))
        with self.moved((h / length, vector)):
            _, ahead = self.value_and_gradient()
        with self.moved((-h / length, vector)):
            _, behind = self.value_and_gradient()
        return [(a - b) * (length / (2.0 * h)) for a, b in zip(ahead, behind)]

    def _loss(self, batch: Any) -> Tensor:
        loss = self.loss(self.model, batch)
        self.progress()
        return loss

    def _mean(self, value: Tensor) -> float:
        (mean,) = collective.mean([value.detach()])
        return float(mean)

    def _grad(self) -> tuple[float, Vector]:
        total, value = [torch.zeros_like(p) for p in self.params], torch.zeros((), dtype=torch.float64)
        for batch in self.batches:
            loss = self._loss(batch)
            torch._foreach_add_(total, torch.autograd.grad(loss, self.params, materialize_grads=True))
            value += loss.detach().double().cpu()
        torch._foreach_div_(total, len(self.batches))
        return self._mean((value / len(self.batches)).to(self.layout.device)), collective.mean(total)

    def _exact_product(self, vector: Vector) -> Vector:
        total = [torch.zeros_like(p) for p in self.params]
        for batch in self.batches:
            grads = torch.autograd.grad(self._loss(batch), self.params, create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * v).sum() for g, v in zip(grads, vector)]).sum()
            if slope.requires_grad:  # a loss that is linear in the weights has no second derivative
                torch._foreach_add_(total, torch.autograd.grad(slope, self.params, materialize_grads=True))
        torch._foreach_div_(total, len(self.batches))
        return collective.mean(total)

    def _backward(self) -> tuple[float, Vector]:
        """By a backward pass into `.grad`, as FSDP2 needs it, which averages over the ranks."""
        kept = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        value = torch.zeros((), dtype=torch.float64)
        try:
            for batch in self.batches:
                loss = self._loss(batch) / len(self.batches)
                loss.backward()
                value += loss.detach().double().cpu()
            reshard(self.model)
            grads = [None if p.grad is None else local(p.grad) for p in self.params]
        finally:
            for p, grad in zip(self.params, kept):
                p.grad = grad
        gradient = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, self.weights())]
        return self._mean(value.to(self.layout.device)), gradient

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            yield
        except BaseException:
            leave_pass(self.model)
            raise
        finally:
            for module, mode in modes.items():
                module.training = mode
            reshard(self.model)


def _check(params: Sequence[Tensor], batches: Sequence[Any]) -> None:
    if not batches:
        raise ValueError("sharpness needs at least one batch, got none")
    if not params:
        raise ValueError("no parameter of the model requires a gradient: there is nothing to move")
    if narrow := {str(p.dtype) for p in params if torch.finfo(p.dtype).bits < 32}:
        raise ValueError(f"sharpness needs weights of 32 bits or more, got {narrow.pop()}: call model.float() first")


def _refuse_deepspeed(model: nn.Module) -> None:
    wrapped = any(kind.__module__.startswith("deepspeed.") for kind in type(model).__mro__)
    if wrapped or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ValueError(
            "sharpness does not run under DeepSpeed, which owns weights and gradients: load the checkpoint on "
            "engine=ddp or fsdp2"
        )
