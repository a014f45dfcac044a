"""Cautious updates, beyond the rows of the table (`cautious_adamw` and others), which compare them on every layout."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

import distopt
from distopt.optim import Rule
from tests.harness.distributed import run
from tests.harness.optimizers import initial
from tests.harness.sharded import mesh


def step(cls: type[distopt.ShardedOptimizer], weights: Tensor, *grads: Tensor, **options: Any) -> Tensor:
    p = weights.clone().requires_grad_()
    optimizer = cls([p], **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def test_the_mask_of_a_penalty_is_that_of_the_penalized_gradient() -> None:
    """Gradient descent without momentum never steps against its gradient, with an L2 penalty in it or without: a mask
    of the loss's gradient alone would drop what the penalty turns."""
    weights, grads = torch.tensor([3.0, -3.0, 1.0]), torch.tensor([-0.1, -0.1, 0.5])
    for decay in (0.0, 0.1):
        ways = [step(distopt.SGD, weights, grads, lr=0.1, weight_decay=decay, cautious=on) for on in (False, True)]
        assert torch.equal(*ways)


def test_no_fewer_than_a_thousandth_of_a_layer_scales_it() -> None:
    """One of 4,000 elements agrees: it is scaled by 1000, and not by 4000; a layer in which none does stands still."""
    first, turned = torch.ones(4000), -torch.ones(4000) * 0.1
    turned[7] = 1.0
    moved = step(distopt.SGD, torch.zeros(4000), first, turned, lr=1.0, momentum=0.9, cautious=True)
    alone = step(distopt.SGD, torch.zeros(4000), first, lr=1.0, momentum=0.9, cautious=True)
    assert (moved - alone).nonzero().tolist() == [[7]]
    assert (alone - moved)[7].item() == pytest.approx(1000.0 * 1.9, rel=1e-6)
    turned[7] = -0.1
    assert torch.equal(step(distopt.SGD, torch.zeros(4000), first, turned, lr=1.0, momentum=0.9, cautious=True), alone)


def test_signs_are_compared_and_not_products_which_underflow() -> None:
    tiny = torch.full((4,), 1e-30)
    assert torch.equal(step(distopt.SGD, torch.zeros(4), tiny, lr=1.0, cautious=True), -tiny)


def test_an_overflow_stays_visible() -> None:
    bad = torch.tensor([1.0, torch.nan])
    assert not torch.isfinite(step(distopt.AdamW, torch.ones(2), bad, cautious=True)).all()


def test_a_decay_is_dropped_where_the_step_leads_away_from_zero() -> None:
    weights, grads = torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([1.0, -1.0, 1.0, 0.0])
    decayed = step(distopt.AdamW, weights, grads, lr=0.1, eps=0.1, weight_decay=0.5, cautious_decay=True)
    plain = step(distopt.AdamW, weights, grads, lr=0.1, eps=0.1, weight_decay=0.0)
    torch.testing.assert_close(plain - decayed, 0.1 * 0.5 * torch.tensor([1.0, 0.0, 0.0, 1.0]), rtol=0.0, atol=1e-7)


class Unsaid(distopt.Lion):
    """A rule of somebody's that does not name the scalar of its decay."""

    def rule(self, group: dict[str, Any]) -> Rule:
        rule = super().rule(group)
        return Rule(buffers=rule.buffers, scalars=rule.scalars)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (distopt.SGD, {"cautious_decay": True}, "cautious_decay=True: the weight decay of SGD is not added to its"),
        (Unsaid, {"cautious": True, "weight_decay": 0.1}, "does not say where weight_decay=0.1 is added"),
        (distopt.LARS, {"cautious": True}, "cautious=True: the trust ratio of LARS multiplies the gradient"),
        (distopt.AdamW, {"cautious": True, "capturable": True}, "capturable=True needs kernels"),
        (distopt.AdamW, {"cautious": 1}, "cautious must be true or false, got 1"),
        (distopt.AdamW, {"cautious_decay": "yes"}, "cautious_decay must be true or false, got 'yes'"),
    ],
)
def test_what_a_rule_does_not_have_is_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        cls([p], lr=0.1, **options)
    optimizer = cls([p], lr=0.1)
    optimizer.param_groups[0].update(options)
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not optimizer.state  # no step was counted


def collectives(cautious: bool, cls: type[distopt.ShardedOptimizer]) -> int:
    """The all-reduces of a step of two groups, one of them without the option; on uneven shards."""
    world = mesh((dist.get_world_size(),), ("shard",))
    params = [nn.Parameter(distribute_tensor(p, world, [Shard(0)])) for p in initial((3, 5), (1, 4), (5, 2))]
    groups = [{"params": params[:2], "cautious": cautious}, {"params": params[2:]}]
    optimizer = cls(groups, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        optimizer.step()
    return all_reduce.call_count


def count_all() -> list[int]:
    return [collectives(cautious, cls) for cls in (distopt.LAMB, distopt.AdamW) for cautious in (False, True)]


def test_it_costs_no_collective_next_to_trust_ratios_and_one_without() -> None:
    assert run(2, count_all) == [[1, 1, 0, 1]] * 2
