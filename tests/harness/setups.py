"""What the reader of a page has already: `<!-- setup: name -->` before a block gives the page what `name` returns."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))


def _loss(model: nn.Module, step: int = 0) -> Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def _one_process() -> None:
    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)


def regression() -> dict[str, Any]:
    return {"loss_of": _loss}


def torch_loop() -> dict[str, Any]:
    """A model that is not sharded yet, the loss that its loop computes later, and a closure for SAM."""
    from torch.distributed import fsdp

    _one_process()
    model = _model()

    class Loss:
        """The loss of the model as it is when the backward pass begins."""

        def backward(self) -> None:
            _loss(model).backward()

    def closure() -> Tensor:
        model.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss

    def shard(model: nn.Module) -> None:
        fsdp.fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))

    return {"model": model, "fully_shard": shard, "loss": Loss(), "closure": closure}


def bound() -> dict[str, Any]:
    """A model under DDP, and the engine that DeepSpeed made of another one with the optimizer."""
    _one_process()
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built for a minute, and not used
    model = _model()
    optimizer = distopt.LAMB(model.parameters())
    config = {"train_batch_size": 1, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": 1}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    os.environ.pop("LOCAL_RANK")
    return {"model": DistributedDataParallel(_model()), "optimizer": optimizer, "engine": engine}


def accelerate_script() -> dict[str, Any]:
    from accelerate import Accelerator

    model = _model()
    optimizer = distopt.LAMB(model.parameters())
    loader = torch.utils.data.DataLoader(torch.ones(4, 8))
    return {"accelerator": Accelerator(cpu=True), "model": model, "optimizer": optimizer, "loader": loader}


def trainer() -> dict[str, Any]:
    import transformers

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=8, n_layer=1, n_head=1, n_embd=8))
    row = torch.ones(4, dtype=torch.long)
    args = transformers.TrainingArguments("out", use_cpu=True, report_to=[], max_steps=1)
    data = [{"input_ids": row, "labels": row}]
    return {"transformers": transformers, "model": model, "args": args, "data": data}


def normed_model() -> dict[str, Any]:
    """A model with a norm layer, by name."""
    layers = {"linear": nn.Linear(8, 16), "norm": nn.LayerNorm(16)}
    return {"distopt": distopt, "model": nn.ModuleDict(layers)}


def sam_loop() -> dict[str, Any]:
    """A SAM with its closure, and what a script of Accelerate has before it prepares."""
    from accelerate import Accelerator

    model = _model()
    sam = distopt.SAM(distopt.AdamW(model.parameters()))

    def closure() -> Tensor:
        sam.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    return {
        "distopt": distopt,
        "sam": sam,
        "closure": closure,
        "accelerator": accelerator,
        "model": model,
        "groups": distopt.param_groups(model),
        "loader": torch.utils.data.DataLoader(torch.arange(4)),
        "loss_of": lambda model, batch: _loss(model, int(batch)),
    }
