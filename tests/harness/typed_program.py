"""A training program that uses the public names, as a user's type checker sees it."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn

import distopt
from distopt.layout import ShardLayout, infer_layout, zero1_layout


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], folder: Path) -> float:
    groups = distopt.param_groups(model, weight_decay=0.01)
    optimizer = distopt.LAMB(groups, lr=2e-3, betas=(0.9, 0.999))
    others: list[torch.optim.Optimizer] = [
        distopt.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        distopt.Adagrad([{"params": list(model.parameters()), "lr": 0.1}], lr=0.01),
        distopt.RMSprop(model.named_parameters()),
        distopt.Adam(list(model.parameters()), lr=1e-3, maximize=True),
        distopt.AdamW(groups, lr=1e-3),
        distopt.LARS(groups, lr=0.1, trust_clip=(0.0, 10.0)),
    ]
    schedule: torch.optim.lr_scheduler.LRScheduler = distopt.warmup_cosine(optimizer, warmup_steps=2, total_steps=10)
    sam = distopt.SAM(optimizer, rho=0.05, interval=2, model=model)
    loss = torch.zeros(())
    for inputs, targets in batches:

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (model(inputs) - targets).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        sam.step(closure)
        norm: Tensor = distopt.clip_grad_norm_(optimizer, max_norm=1.0)
        optimizer.step()
        schedule.step()
        loss = closure() + norm
    path: Path = distopt.save_checkpoint(folder, model, optimizer, schedule, extra={"step": len(batches)})
    extra: dict[str, object] = distopt.load_checkpoint(path, model, optimizer, schedule)
    distopt.prove(optimizer, model)
    fingerprint: distopt.Fingerprint = distopt.fingerprint(model)
    assert fingerprint == distopt.fingerprint(model) and others and extra
    return loss.item()


def zero1(model: nn.parallel.DistributedDataParallel) -> distopt.ShardedOptimizer:
    optimizer = distopt.AdamW(distopt.param_groups(model), lr=1e-3)
    layout: ShardLayout = zero1_layout(model, gradients="reduce_scatter")
    optimizer.bind(layout)
    optimizer.bind(distopt.layout.zero1_layout(model))
    inferred: ShardLayout = infer_layout(model.parameters())
    assert inferred is not layout
    return optimizer


def accelerated(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model, optimizer = accelerator.prepare(model, optimizer)
    distopt.attach(accelerator, model, optimizer, zero_stage=1)
