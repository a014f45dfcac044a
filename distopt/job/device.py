"""What a run knows of its device: the share of its operations that the model uses, and the peak of its memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.layout.deepspeed_private import full_shape as unsharded_shape
from distopt.models.language_model import blocks

if TYPE_CHECKING:
    from accelerate import Accelerator

# Dense operations per second in bfloat16, in units of 1e12, from the vendors' data sheets; the first match of a name.
_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "MI300X": 1307,
}


def flops_per_token(model: Any, sequence_length: int) -> int | None:
    """Returns the operations of a forward and backward pass per token, without recomputation.

    6 N + 12 L H S for N weights in matrix products, L blocks of width H and sequences of S tokens, where a frozen
    weight counts 4 instead of 6: it has no gradient. None for a mixture of experts, whose tokens use a part.

    Reference: Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B.

    Args:
        model: A language model of transformers, sharded or not.
        sequence_length: S.
    """
    if any("experts" in name for name, _ in model.named_parameters()):
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    only_looked_up = embedding is not None and (head is None or head.weight is not embedding.weight)
    used = [p for p in model.parameters() if not (only_looked_up and p is embedding.weight)]
    products = sum((6 if p.requires_grad else 4) * unsharded_numel(p) for p in used)
    return products + 12 * len(blocks(model)) * int(model.config.get_text_config().hidden_size) * sequence_length


def unsharded_numel(param: Tensor) -> int:
    """Returns the number of elements of a parameter of any engine; DeepSpeed's ZeRO-3 leaves none in the tensor."""
    return math.prod(unsharded_shape(param))


def watch(
    model: Any, sequence_length: int, bf16: bool, accelerator: Accelerator
) -> Callable[[float], dict[str, float]]:
    """Returns a function that makes metrics of the device out of the tokens per second of all processes.

    `device_gib` is the peak of this process's memory in GiB, `mfu` the share of the device's operations that the model
    uses, for known devices in bfloat16; a CPU has neither.

    Args:
        model: The model.
        sequence_length: The number of tokens of a sequence.
        bf16: Whether the model computes in bfloat16.
        accelerator: The processes and their devices.
    """
    device = accelerator.device
    if device.type != "cuda":
        return lambda speed: {}
    name, flops = torch.cuda.get_device_name(device), flops_per_token(model, sequence_length)
    peak = next((1e12 * tflops for part, tflops in _TFLOPS.items() if part in name), None) if bf16 else None

    def metrics(speed: float) -> dict[str, float]:
        memory = {"device_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}
        if flops is None or peak is None:
            return memory
        return {"mfu": round(flops * speed / peak / accelerator.num_processes, 4), **memory}

    return metrics


def described(accelerator: Accelerator) -> str:
    """Returns the processes and their devices in words."""
    world, device = accelerator.num_processes, accelerator.device
    processes = f"{world} process{'es' * (world > 1)}"
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return f"{processes} on the CPU, of {threads} thread{'s' * (threads > 1)}"
    total = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{processes} on {torch.cuda.get_device_name(device)}, {total:.0f} GiB"
