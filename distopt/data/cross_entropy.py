r"""The cross-entropy of a large vocabulary in chunks of tokens, without the logits of all of them.

    z = h W^T + b                                    one chunk of tokens at a time, in float32
    loss = scale * sum over targets of log(sum exp z) - z[target]
    dz = scale * (softmax(z) - onehot(target)),      dh = dz W,      dW = sum over chunks of dz^T h

The gradients are computed in the forward pass, while a chunk has its logits, so that the matrix products are those of
the unchunked loss, and the backward pass only multiplies them by the gradient of the loss. dh and dW are kept from
forward to backward, in the dtypes of h and W. In float32 they are those of the full logits up to the order of sums; in
bfloat16 dW is rounded once for each chunk.

Reference: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, ICLR 2025, arXiv 2411.09009; Hsu et al.,
Liger Kernel, arXiv 2410.10989, whose chunks these are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from distopt.data.accuracy import TokenAccuracy

IGNORED = -100  # the label of a position without a target, as in `torch.nn.functional.cross_entropy`
LARGE = 2**28  # logits of a micro-batch, 1 GiB in float32, from which on the loss is computed in chunks by default
CHUNK = 2**27  # logits of a chunk, 0.5 GiB in float32

# Models whose output is known to be that of their head.
_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float = 1.0,
    chunk: int = CHUNK,
    hits: Tensor | None = None,
) -> Tensor:
    """Compute scale * the sum of the cross-entropies of a linear layer's logits, in nats.

    Args:
        hidden: The inputs of the layer, shape [tokens, width].
        weight: Its weight, shape [vocabulary, width], in the dtype of `hidden`.
        bias: Its bias, shape [vocabulary], or None.
        labels: The index of each token's target, or -100 for none; int64, shape [tokens].
        scale: A factor of the loss.
        chunk: The number of logits that exist at a time, at most, but those of one token at least.
        hits: A 0-D tensor, to which the number of targets is added that have the largest logit; None for no count.

    Returns:
        A 0-D float32 tensor. It has no second derivative.
    """
    tokens = max(1, chunk // weight.shape[0])
    needed = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias))
    total: Tensor = _Chunked.apply(hidden, weight, bias, labels, scale, tokens, needed, hits)
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        tokens: int,
        needed: tuple[bool, bool, bool],
        hits: Tensor | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needed[0] else None
        d_weight = torch.zeros_like(weight) if needed[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needed[2] and bias is not None else None
        for start in range(0, len(hidden), tokens):
            part = slice(start, start + tokens)
            h, target = hidden[part], labels[part, None]
            is_target, index = target != IGNORED, target.clamp_min(0)
            z = F.linear(h, weight, bias).float()
            of_target, (largest, guess) = z.gather(1, index), z.max(1, keepdim=True)
            if hits is not None:
                hits += (guess == target).sum()
            z.sub_(largest).exp_()  # in place, which logsumexp would not be
            exp_sum = z.sum(1, keepdim=True)
            total += (exp_sum.log() + largest - of_target).masked_fill_(~is_target, 0.0).sum()
            if not any(needed):
                continue
            z.mul_(scale / exp_sum).scatter_add_(1, index, torch.full_like(exp_sum, -scale))
            z.masked_fill_(~is_target, 0.0)
            dz = z.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = dz @ weight
            if d_weight is not None:
                d_weight.addmm_(dz.t(), h)
            if d_bias is not None:
                d_bias += z.sum(0)
        ctx.gradients = d_hidden, d_weight, None if d_bias is None or bias is None else d_bias.to(bias.dtype)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the chunked cross-entropy has been differentiated already, which frees its gradients")
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad) for g in gradients), None, None, None, None, None


def head_of(model: nn.Module) -> nn.Linear | None:
    """Return the output layer of a language model; None if it is no plain linear layer, or its logits are changed."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    # FSDP2 derives a class from that of the module. An adapter around the layer has another forward pass.
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    return head if plain and not _changes_logits(model) else None


def _changes_logits(model: nn.Module) -> bool:
    """Return whether a configuration of transformers scales or caps the logits: Gemma, Cohere, Granite, Falcon-H1."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return False
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = [name for name in vars(config) if "logit" in name or name in ("lm_head_multiplier", "output_multiplier")]
    return any(getattr(config, name) not in (None, False, 0, 1) for name in names if "router" not in name)


def use_chunks(model: nn.Module, tokens: int, needs_logits: bool = False) -> bool:
    """Return whether the loss of so many tokens is computed in chunks.

    The model's attribute `chunked_loss` says it: true, false, or None for the rule, which is 2^28 logits or more, a
    head that `head_of` finds, and nothing else that needs the logits. Models without the attribute have full logits.

    Args:
        model: A language model, possibly wrapped.
        tokens: The number of tokens.
        needs_logits: Whether the loss depends on the logits otherwise (`SAM.loss`).

    Raises:
        ValueError: If it is true, and there is no such head, or the logits are needed.
    """
    model = getattr(model, "module", model)  # of DDP and DeepSpeed
    asked = getattr(model, "chunked_loss", False)
    if asked is False:
        return False
    if needs_logits and asked:
        raise ValueError(
            "model.chunked_loss=true: this loss needs the logits (FunctionalSAM, or your own): set it to false"
        )
    head = head_of(model)
    if head is None and asked:
        raise ValueError(
            f"model.chunked_loss=true: the output layer of {type(model).__name__} is no plain linear layer, or its "
            "logits are scaled or capped: set model.chunked_loss=false"
        )
    if head is None or needs_logits:
        return False
    return asked is True or tokens * head.out_features >= LARGE


def loss_in_head(
    model: nn.Module, labels: Tensor, scale: float, accuracy: TokenAccuracy | None = None, **inputs: Tensor
) -> Tensor:
    """Run a language model whose output layer computes scale * the sum of the cross-entropies instead of logits.

    The layer is called as a module, so that FSDP2 and DeepSpeed gather its weight once, and reduce its gradient once.

    Args:
        model: The model, wrapped by its engine, for which `use_chunks` holds.
        labels: The targets, shape [sequences, length].
        scale: A factor of the loss.
        accuracy: Counts the targets that have the largest logit; None for no count.
        **inputs: The inputs of the model.

    Raises:
        ValueError: If the model changes what its output layer returns.
    """
    inner = getattr(model, "module", model)
    head = head_of(inner)
    assert head is not None
    losses: list[Tensor] = []
    hits = torch.zeros((), dtype=torch.float32, device=labels.device) if accuracy else None

    def forward(hidden: Tensor) -> Tensor:
        weight: Tensor = head.weight
        bias: Tensor | None = head.bias
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        tokens = hidden.flatten(0, -2)
        losses.append(chunked_cross_entropy(tokens, weight, bias, labels.flatten(), scale, CHUNK, hits))
        return losses[-1]

    with _forward_of(head, forward):
        loss: Tensor = model(**inputs).logits
    if inner not in _checked:  # reads from the device, once
        if len(losses) != 1 or not torch.allclose(loss.detach(), losses[0].detach(), 0.0, 0.0, equal_nan=True):
            raise ValueError(
                f"{type(inner).__name__} changes the logits of its output layer, so that their loss cannot be computed "
                "in chunks: set model.chunked_loss=false"
            )
        _checked.add(inner)
    if accuracy and hits is not None:
        accuracy.add(hits, scale)
    return loss


def trust_head(model: nn.Module) -> None:
    """Take it as given that a model returns what its output layer does: for tensors without values."""
    _checked.add(model)


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
