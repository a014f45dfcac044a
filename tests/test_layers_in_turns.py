"""Where every layer is full on this rank, a kernel applies it as soon as its trust ratio is known: the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from distopt.kernels.cpu import CompiledUpdate
from distopt.optim import ratios

# Layers that are measured alone, of several pieces, next to small ones that are measured together; empty and 0-D ones.
SHAPES = ((600, 700), (5,), (300, 200), (0, 3), (), (64, 64), (90_001,), (513, 520))


def train(monkeypatch: pytest.MonkeyPatch, in_turns: bool, clips: bool, consumes: bool, **options: Any) -> list[Tensor]:
    """Four steps: one layer is zero, one has no gradient in the third step, one an infinite one in the last."""
    generator = torch.Generator().manual_seed(0)
    params = [(torch.randn(shape, generator=generator) * 0.02).requires_grad_() for shape in SHAPES]
    params[5].data.zero_()
    opt = distopt.LAMB(params, lr=0.01, **options)
    seen: list[Tensor] = []
    with monkeypatch.context() as patched:
        if not in_turns:
            patched.setattr(ratios, "_full_here", lambda *_: False)
        for step in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            if step == 2:
                params[0].grad = None
            if step == 3:
                params[1].grad[0] = math.inf  # type: ignore[index]
            opt.step(clip=distopt.Clip(opt, 0.5) if clips else None, consumes_grads=consumes)
            seen += opt.trust_ratios().values()
    return [*(p.detach() for p in params), *(value for p in params for value in opt.state[p].values()), *seen]


@pytest.mark.parametrize("options", [{}, {"trust_clip": (0.02, 0.03), "maximize": True}], ids=["plain", "bounded"])
@pytest.mark.parametrize(("clips", "consumes", "threads"), [(False, False, 2), (True, True, 1), (False, True, 3)])
def test_layers_in_turns_have_the_bits_of_all_at_once(
    clips: bool, consumes: bool, threads: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, expected = (train(monkeypatch, turns, clips, consumes, **options) for turns in (True, False))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found, expected, strict=True))


class Halved(distopt.LAMB):
    def trust_ratio(self, group: dict[str, Any], weight_norm: Tensor, other_norm: Tensor) -> Tensor:
        return 0.5 * weight_norm / other_norm


@pytest.mark.parametrize(("cls", "in_turns"), [(distopt.LAMB, True), (Halved, False), (distopt.LARS, False)])
def test_the_kernel_knows_the_ratio_of_lamb_alone(cls: Any, in_turns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    original = CompiledUpdate.apply_by_layer
    monkeypatch.setattr(CompiledUpdate, "apply_by_layer", lambda self: asked.append(self) or original(self))
    param = torch.full((3, 4), 2.0, requires_grad=True)
    opt = cls([param], lr=0.1, weight_decay=0.0)
    param.grad = torch.ones(3, 4)
    opt.step()
    assert bool(asked) is in_turns
    if cls is not distopt.LARS:  # the direction of a first step is the sign of the gradient
        factor = 0.5 if cls is Halved else 1.0
        assert param.flatten().tolist() == pytest.approx([2.0 - 0.1 * factor * 2.0] * 12, rel=1e-5)
