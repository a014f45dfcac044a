"""THE TABLE of engines, and what tests of them share: small real language models, batches, full parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distopt.engine import DDP, FSDP2, DeepSpeed, Engine, Zero1
from distopt.models.language_model import LanguageModel, blocks


def _fsdp2(**options: Any) -> FSDP2:
    """Every block is a unit, since all blocks of these small models would share one."""
    return FSDP2(**{"unit_mib": 0} | options)


ENGINES: dict[str, Callable[..., Engine]] = {
    "ddp": DDP,
    "zero1": Zero1,
    "fsdp2": _fsdp2,
    "zero2": partial(_fsdp2, reshard_after_forward=False),
    "hsdp": partial(_fsdp2, replicas=2),
    "deepspeed_zero1": lambda **kwargs: DeepSpeed(1, **kwargs),
    "deepspeed_zero2": lambda **kwargs: DeepSpeed(2, **kwargs),
    "deepspeed_zero3": lambda **kwargs: DeepSpeed(3, **kwargs),
}
DEEPSPEED = [kind for kind in ENGINES if "deepspeed" in kind]
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_layer=2, n_head=2, n_embd=32, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "llama": dict(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=32,
        intermediate_size=48,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    ),
}
# Experts are stacked: three of them, which four ranks cannot share by rows.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {**CONFIGS["llama"], "num_local_experts": 3, "num_experts_per_tok": 2},
}
VOCABULARY, SEQUENCES, LENGTH, STEPS = 61, 8, 16, 4  # 61 rows are not the same number for 2 or 4 ranks
CPU = torch.device("cpu")


def made(language_model: LanguageModel, engine: Engine) -> nn.Module:
    model = language_model.empty(language_model.describe(VOCABULARY))
    return engine.build(model, blocks(model), lambda unit, device: language_model.fill(model, unit, device), CPU)


def batch(step: int) -> Tensor:
    """This rank's part of the batch of a step."""
    numbers = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=numbers)
    return tokens.chunk(dist.get_world_size())[dist.get_rank()]


def mean(value: Tensor) -> float:
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


@torch.no_grad()
def full(model: nn.Module) -> dict[str, Tensor]:
    """Full copies of the parameters by name, in float32; every rank has to call it."""
    wrapped = hasattr(model, "set_gradient_accumulation_boundary") or isinstance(model, DistributedDataParallel)
    named = (model.module if wrapped else model).named_parameters()
    return {name: _full(p).detach().clone() for name, p in named}


def _full(param: Tensor) -> Tensor:
    if isinstance(param, DTensor):
        return param.full_tensor()
    if hasattr(param, "_hp_mapping") or hasattr(param, "ds_tensor"):
        import deepspeed

        if not param.requires_grad:  # it has no float32 master
            with deepspeed.zero.GatheredParameters([param]):
                return param.detach().float().clone()
        return deepspeed.utils.safe_get_full_fp32_param(param)
    return param
