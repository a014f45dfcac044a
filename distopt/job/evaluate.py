"""How good the model is: its loss on held-out text, and a sample of what it writes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt.data.batch import Batch, next_token_loss

if TYPE_CHECKING:
    from distopt.engine import Engine


@torch.no_grad()
def validation_loss(
    engine: Engine, model: nn.Module, batches: Iterable[Tensor | Batch], device: torch.device
) -> Tensor:
    """This rank's mean loss, in nats a token, over batches of as many sequences each, [sequences, length + 1]."""
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
    engine: Engine, model: nn.Module, prompt: list[int], length: int, seed: int, device: torch.device
) -> list[int]:
    """Continues a prompt by `length` sampled tokens (temperature 0.8, the 50 likeliest); every rank has to call it.

    The same on every rank: a sharded model is gathered block by block for each token, so all ranks walk together.
    """
    from transformers import GenerationConfig

    inner: Any = engine.unwrap(model)
    config = GenerationConfig(
        max_new_tokens=length, min_new_tokens=length, do_sample=True, temperature=0.8, top_k=50, pad_token_id=0
    )
    tokens = torch.tensor([prompt], device=device)
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), engine.autocast(device):
        torch.manual_seed(seed)
        out = inner.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config)
    model.train()
    engine.refresh(model)
    return out[0].tolist()
