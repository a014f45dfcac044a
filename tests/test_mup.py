"""muP: the table of the paper, param groups and decay, and activations that do not grow with the width."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from distopt.init import widths
from distopt.models.configuration import new_config
from distopt.models.meta import base_config
from distopt.optim.mup import rule_of


class Net(nn.Module):
    """An embedding, a hidden matrix, a norm and a last layer."""

    def __init__(self, width: int, outputs: int = 10) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(16, width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.embedding(tokens)).tanh()))


# Yang et al., Table 3, at r times the base width: deviation (the root of the variance), Adam, SGD.
TABLE = {
    "embedding.weight": (lambda r: 1.0, lambda r: 1.0, lambda r: r),
    "hidden.weight": (lambda r: r**-0.5, lambda r: 1.0 / r, lambda r: 1.0),
    "hidden.bias": (lambda r: 1.0, lambda r: 1.0, lambda r: r),
    "norm.weight": (lambda r: 1.0, lambda r: 1.0, lambda r: r),
    "norm.bias": (lambda r: 1.0, lambda r: 1.0, lambda r: r),
    "head.weight": (lambda r: 1.0 / r, lambda r: 1.0 / r, lambda r: 1.0 / r),
}


@pytest.mark.parametrize("r", [1, 2, 8])
def test_the_factors_are_those_of_the_paper(r: int) -> None:
    found = widths(Net(8 * r), Net(8))
    assert found.keys() == TABLE.keys()
    for name, (std, adam, sgd) in TABLE.items():
        width = found[name]
        assert (width.std, width.lr("adam"), width.lr("sgd")) == pytest.approx((std(r), adam(r), sgd(r))), name


def options_of(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["param_names"]}


@pytest.mark.parametrize("rule", ["adam", "sgd"])
@pytest.mark.parametrize("independent", [False, True])
def test_param_groups_scale_rates_and_keep_the_decay_of_a_step(rule: str, independent: bool) -> None:
    if rule == "sgd" and independent:
        with pytest.raises(ValueError, match="independent_decay=True: SGD's decay is a part of the gradient"):
            distopt.param_groups(Net(8), lr=0.1, rule=rule, independent_decay=True)
        return
    with torch.device("meta"):
        model, base = Net(32), Net(8)
    shapes = distopt.base_shapes(base)
    groups = distopt.param_groups(model, 0.5, {"hidden": {"lr": 0.2}}, lr=0.1, mup=shapes, rule=rule,
                                  independent_decay=independent)  # fmt: skip
    for name, (lr, decay) in options_of(groups).items():
        peak = 0.2 if "hidden" in name else 0.1
        assert lr == pytest.approx(peak * TABLE[name][1 if rule == "adam" else 2](4))
        wanted = 0.0 if name.endswith("bias") or "norm" in name else 0.5 if independent else 0.5 * peak
        assert lr * decay == pytest.approx(wanted), name


def test_independent_decay_follows_the_schedule_and_not_the_rate() -> None:
    """Without gradients AdamW only decays: by the product of 1 - s_t * weight_decay, at any learning rate."""
    for lr in (1e-3, 0.5):
        weight = nn.Linear(3, 3, bias=False)
        start = weight.weight.detach().clone()
        optimizer = distopt.AdamW(distopt.param_groups(weight, 0.01, lr=lr, independent_decay=True), lr=lr)
        schedule = distopt.warmup_cosine(optimizer, warmup_steps=3, total_steps=10)
        product = 1.0
        for step in range(10):
            factor = min(1.0, (step + 1) / 3)
            factor *= 0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * max(0, step - 2) / 7))
            product *= 1.0 - 0.01 * factor
            weight.weight.grad = torch.zeros(3, 3)
            optimizer.step()
            schedule.step()
        assert torch.allclose(weight.weight, product * start, rtol=1e-5)  # ten roundings of float32


def change(width: int, scaled: bool, rule: str) -> float:
    """The change of the logits in five steps, root of the mean square."""
    model, base = Net(width), Net(32) if scaled else None
    distopt.initialize(model, "mup" if scaled else "xavier_normal", mup=base, std=0.18 if scaled else None)
    lr = 0.02 if rule == "adam" else 0.2
    groups = distopt.param_groups(model, 0.0, lr=lr, mup=base, rule=rule)
    optimizer = (distopt.Adam if rule == "adam" else distopt.SGD)(groups, lr=lr)
    numbers = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, n, (64,), generator=numbers) for n in (16, 10))
    first = model(tokens).detach()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), targets).backward()
        optimizer.step()
    return (model(tokens) - first).square().mean().sqrt().item()


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_logits_change_alike_at_every_width(rule: str) -> None:
    """The coordinate check. From width 64 to 1024 the change of the logits stays within a factor of two under muP;
    under the standard parametrization it grows."""
    flat = [change(width, True, rule) for width in (64, 256, 1024)]
    growing = [change(width, False, rule) for width in (64, 256, 1024)]
    assert max(flat) < 2.0 * min(flat), flat
    assert growing[2] > 3.0 * growing[0] and growing[2] > growing[1] > growing[0], growing


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Net(64), "embedding.weight has the shape [16, 64] in the base model and [16, 32] in the model"),
        (nn.Linear(2, 2), "bias is missing in the model"),
        ({}, "embedding.weight is missing in the base model"),
        (64, "mup must be the base model, or its shapes by name, got int"),
    ],
)
def test_a_base_model_that_does_not_fit_is_refused(base: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        widths(Net(32), base)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_tied_weights_are_refused() -> None:
    model, base = Net(32, 16), Net(8, 16)
    for net in (model, base):
        net.head.weight = net.embedding.weight
    with pytest.raises(ValueError, match=r"embedding\.weight is tied: .*; untie them"):
        widths(model, base)


def test_what_is_missing_or_has_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="mup needs the peak of the learning rate"):
        distopt.param_groups(Net(16), mup=Net(8))
    with pytest.raises(ValueError, match="independent_decay needs the peak of the learning rate"):
        distopt.param_groups(Net(16), independent_decay=True)
    weight = [torch.zeros(2, 2, requires_grad=True)]
    assert rule_of(distopt.AdamW(weight)) == "adam" and rule_of(distopt.SGD(weight)) == "sgd"
    for optimizer in (distopt.LAMB(weight), distopt.AdamW(weight, trust_ratio=True)):
        with pytest.raises(ValueError, match="has no row in muP's table"):
            rule_of(optimizer)
    with pytest.raises(ValueError, match="independent_decay=True: the decay of Adam"):
        rule_of(distopt.Adam(weight), independent_decay=True)


def test_the_base_configuration_has_heads_of_the_same_size() -> None:
    config = new_config("llama", dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
                                      intermediate_size=96), 61, None)  # fmt: skip
    base = base_config(config, 32)
    assert (base.hidden_size, base.num_attention_heads, base.num_key_value_heads) == (32, 2, 1)
    assert base.intermediate_size == 48 and config.hidden_size == 64
    for width, message in (
        (48, "init.base_width=48 must divide the model's width of 64"),
        (128, "init.base_width=128 must divide the model's width of 64"),
        (16, "num_key_value_heads=2 is no multiple of that"),
    ):
        with pytest.raises(ValueError, match=message):
            base_config(config, width)
