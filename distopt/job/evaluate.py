"""Evaluation of the model: its loss on held-out text, and a sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt import collective
from distopt.data.batch import Batch, next_token_loss
from distopt.models.generation import sampling

if TYPE_CHECKING:
    from distopt.engine import Engine


@torch.no_grad()
def validation_loss(
    engine: Engine, model: nn.Module, batches: Iterable[Tensor | Batch], device: torch.device
) -> Tensor:
    """Returns this rank's mean loss in nats per token, a scalar tensor.

    Args:
        engine: The engine that runs the model.
        model: The wrapped model.
        batches: Batches of equally many sequences, int64 [sequences, length + 1].
        device: The device of this process.
    """
    model.eval()
    losses = []
    for batch in batches:
        with engine.autocast(device):
            losses.append(next_token_loss(model, batch.to(device)))
    model.train()
    engine.refresh(model)
    return torch.stack(losses).mean()


@torch.no_grad()
def sample(
    engine: Engine,
    model: nn.Module,
    prompt: list[int],
    length: int,
    seed: int,
    device: torch.device,
    ends: Sequence[int] = (),
) -> list[int]:
    """Continues a prompt by sampled tokens (temperature 0.8, top 50); every rank has to call it.

    A sharded model is gathered block by block for each token, so all ranks sample the same tokens together.

    Args:
        engine: The engine that runs the model.
        model: The wrapped model.
        prompt: The tokens of the prompt, at least one.
        length: The largest number of tokens to sample.
        seed: The seed of the sampling.
        device: The device of this process.
        ends: The tokens that end it.

    Returns:
        The tokens of the prompt and of its continuation.
    """
    inner: Any = engine.unwrap(model)
    tokens = torch.tensor([prompt], device=device)
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), engine.autocast(device):
        torch.manual_seed(seed)
        # A rank whose logits differ in the last bit may end at another token: it computes until all have ended.
        mask, several = torch.ones_like(tokens), collective.world() > 1
        out = inner.generate(tokens, attention_mask=mask, generation_config=sampling(length, ends), synced_gpus=several)
    model.train()
    engine.refresh(model)
    return out[0].tolist()
