"""A check that a model does not attend across the examples that are packed into one sequence."""

from __future__ import annotations

import torch
from torch import nn

from distopt.engine import Engine


@torch.no_grad()
def check_no_cross_contamination(
    engine: Engine, model: nn.Module, device: torch.device, vocabulary: int, key: str = "data.packing"
) -> None:
    """Checks that examples, or documents, in one sequence do not attend to each other; every rank has to call it.

    One forward pass over two sequences that differ in their first example: the logits of the second must be equal.

    Args:
        engine: The engine that runs the model.
        model: The wrapped model.
        device: The device of this process.
        vocabulary: The size of the vocabulary.
        key: The switch that keeps them apart, for the message.

    Raises:
        ValueError: If they attend to each other.
    """
    tokens = torch.arange(16, device=device).remainder(vocabulary).repeat(2, 1)
    tokens[1, :8] = tokens[1, :8].flip(0)
    positions = torch.arange(8, device=device).repeat(2, 2)
    model.eval()
    try:
        with engine.autocast(device):
            first, second = model(input_ids=tokens, position_ids=positions).logits[:, 8:].float()
    except TypeError:
        first, second = torch.zeros(1, dtype=torch.float32), torch.ones(1, dtype=torch.float32)
    model.train()
    engine.refresh(model)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(second.abs().max())):
        raise ValueError(
            f"{key}=true: this model does not keep what a sequence holds apart by positions, so that one part would be "
            f"learnt from the others: set {key}=false"
        )
