"""SAM and distopt's optimizers inside the Trainer of transformers, on one process and on two."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

import distopt
from distopt.layout import local
from tests.harness.cells import covering, some
from tests.harness.distributed import run
from tests.harness.engines import CONFIGS, SEQUENCES
from tests.harness.sam_trainers import SAM, SGD, STEPS, TOLERANCE, Stop, on_ranks, trained
from tests.harness.trainers import error, language_model, sequences


def by_hand(rho: float, make: Any, ranks: int = 1) -> list[Tensor]:
    """The same training on whole batches, with SAM written out.

    ranks: how many ascend by their own gradient, each of every other micro-batch of two.
    """
    model = language_model(CONFIGS["gpt2"])
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = make([{"params": decayed}, {"params": others}])
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def gradient(batch: Tensor) -> list[Tensor]:
        model.zero_grad()
        logits = model(batch).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        return [p.grad.clone() for p in params]

    rate = optimizer.param_groups[0]["lr"]
    for step, batch in enumerate(sequences(STEPS).split(SEQUENCES)):
        before = [p.detach().clone() for p in params]
        seconds = []
        for rank in range(ranks):
            part = torch.cat(batch.chunk(2 * ranks)[rank::ranks])
            first = gradient(part)
            norm = torch.stack([g.norm() for g in first]).norm()
            with torch.no_grad():
                for p, g in zip(params, first):
                    p.add_(rho * g / norm)
            seconds.append(gradient(part))
            with torch.no_grad():
                for p, old in zip(params, before):
                    p.copy_(old)
        for p, *grads in zip(params, *seconds):
            p.grad = sum(grads) / ranks
        distopt.clip_grad_norm_(optimizer, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / STEPS)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


LAMB = {"optimizer_cls_and_kwargs": (distopt.LAMB, {"lr": 0.02})}
LOCAL = partial(distopt.SAM, rho=0.1, scope="local")


OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lars": (distopt.LARS, {"lr": 0.3, "momentum": 0.9, "trust_coefficient": 0.1, "weight_decay": 0.0}),
    "adagrad": (distopt.Adagrad, {"lr": 0.02}),
    "rmsprop": (distopt.RMSprop, {"lr": 2e-3}),
    "adam": (distopt.Adam, {"lr": 0.01}),
}


def made_and_given(folder: Path, name: str) -> tuple[list[Tensor], list[Tensor], float]:
    """What a Trainer trains with an optimizer it makes, and with one it gets with a schedule; the last rate."""
    optimizer, options = OTHERS[name]
    made = trained(folder / "made", CONFIGS["gpt2"], 1, optimizer_cls_and_kwargs=(optimizer, options))
    model = language_model(CONFIGS["gpt2"])
    own = optimizer(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1 - step / STEPS)  # as the Trainer's linear one
    given = trained(folder / "given", model, 1, schedule="constant", optimizers=(own, schedule))
    return made, given, own.param_groups[0]["lr"]


@pytest.mark.parametrize("name", some(["lars", "adam"], OTHERS))
def test_the_others_are_those_written_out(tmp_path: Path, name: str) -> None:
    optimizer, options = OTHERS[name]
    expected = by_hand(0.0, partial(optimizer, **options))
    assert error(by_hand(0.0, partial(optimizer, **{**options, "lr": 1.01 * options["lr"]})), expected) > 5 * TOLERANCE
    ((made, given, rate),) = run(1, made_and_given, tmp_path, name)
    assert error(made, expected) < TOLERANCE and error(given, expected) < TOLERANCE
    assert rate == 0.0


@pytest.mark.parametrize(
    ("world", "fsdp2", "accumulation"),
    some(
        [(1, False, 1), (2, False, 2), (2, True, 1)],
        [(world, fsdp2, n) for world, fsdp2 in [(1, False), (2, False), (2, True)] for n in (1, 2)],
    ),
)
def test_sam_is_that_written_out(tmp_path: Path, world: int, fsdp2: bool, accumulation: int) -> None:
    """With clipping of the second gradient, a schedule, and micro-batches replayed."""
    expected = by_hand(0.1, partial(distopt.SGD, lr=0.3, momentum=0.9))
    assert error(by_hand(1e-9, partial(distopt.SGD, lr=0.3, momentum=0.9)), expected) > 100 * TOLERANCE
    for params in run(world, on_ranks, tmp_path, CONFIGS["gpt2"], accumulation, SGD | SAM, fsdp2):
        assert error(params, expected) < TOLERANCE


def test_with_local_scope_each_rank_ascends_by_its_own_gradient(tmp_path: Path) -> None:
    """The Trainer averaged the first gradient over the ranks, without a word."""
    sgd = partial(distopt.SGD, lr=0.3, momentum=0.9)
    expected = by_hand(0.1, sgd, ranks=2)
    assert error(by_hand(0.1, sgd), expected) > 100 * TOLERANCE
    for params in run(2, on_ranks, tmp_path, CONFIGS["gpt2"], 2, SGD | {"sam": LOCAL}):
        assert error(params, expected) < TOLERANCE
    one, other = run(2, on_ranks, tmp_path, CONFIGS["gpt2"], 1, SGD | {"sam": partial(LOCAL, interval=2)})
    assert error(one, other) == 0.0


TRAINED = [LAMB, LAMB | SAM, SGD | {"sam": partial(distopt.LookSAM, rho=0.1, interval=2)}]


@pytest.mark.parametrize(("options", "fsdp2"), covering(TRAINED, [True, False]))
def test_two_processes_train_as_one(tmp_path: Path, fsdp2: bool, options: dict[str, Any]) -> None:
    (expected,) = run(1, on_ranks, tmp_path, CONFIGS["gpt2"], 2, options)
    for params in run(2, on_ranks, tmp_path, CONFIGS["gpt2"], 2, options, fsdp2):
        assert error(params, expected) < TOLERANCE


def stopped(folder: Path, member: Any, fsdp2: bool) -> tuple[bool, float, float]:
    """A forward pass at perturbed weights raises, in the second step. Whether each rank's shards are as before it; the
    loss of the model that is left, and of a plain one with its weights."""
    seen: list[list[Tensor]] = []
    calls: list[None] = []

    from transformers import TrainerCallback

    class Watching(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append([local(p).detach().clone() for p in model.parameters()])
            models.append(model)

    models: list[Any] = []
    model = language_model(CONFIGS["gpt2"])
    passes = 2 if member is distopt.SAM else 1

    def stop(*_: Any) -> None:
        calls.append(None)
        if len(calls) == 2 * passes:  # the last pass of the second step
            raise Stop

    model.transformer.h[1].register_forward_hook(stop)
    with pytest.raises(Stop):
        trained(folder / str(dist.get_rank()), model, 1, fsdp2, callbacks=[Watching()], sam=member, **SGD)
    same = [torch.equal(local(p), b) for p, b in zip(models[0].parameters(), seen[-1], strict=True)]
    calls += [None] * 100
    plain = language_model(CONFIGS["gpt2"])
    held = [p.full_tensor() if isinstance(p, DTensor) else p for p in models[0].parameters()]
    with torch.no_grad():
        for p, value in zip(plain.parameters(), held, strict=True):
            p.copy_(value)
        batch = sequences(STEPS)[:SEQUENCES]
        losses = [m.eval()(batch, labels=batch).loss.item() for m in (models[0], plain)]
    return len(seen) == 2 and all(same), *losses


@pytest.mark.parametrize(("member", "fsdp2"), covering([distopt.MomentumSAM, distopt.SAM], [False, True]))
def test_a_pass_that_raises_leaves_the_weights(tmp_path: Path, member: Any, fsdp2: bool) -> None:
    """As an interrupt does in a notebook: the next evaluation was of perturbed weights, and so was what was saved."""
    for same, left, plain in run(2, stopped, tmp_path, member, fsdp2):
        assert same
        assert left == pytest.approx(plain, rel=1e-6)


def test_momentum_sam_needs_one_pass(tmp_path: Path) -> None:
    options = SGD | {"sam": partial(distopt.MomentumSAM, rho=0.3)}
    (expected,) = run(1, on_ranks, tmp_path, CONFIGS["gpt2"], 1, options)
    (plain,) = run(1, on_ranks, tmp_path, CONFIGS["gpt2"], 1, SGD)
    assert error(plain, expected) > 100 * TOLERANCE
    for fsdp2 in (False, True):
        for params in run(2, on_ranks, tmp_path, CONFIGS["gpt2"], 2, options, fsdp2):
            assert error(params, expected) < TOLERANCE


def between_micro_batches(folder: Path, member: Any, fsdp2: bool) -> tuple[int, bool]:
    """How often a callback saw the weights between the micro-batches of a step, and whether as before the step; it
    raises at last."""
    from transformers import TrainerCallback

    seen: list[bool] = []
    before: list[Tensor] = []

    class Watching(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            before[:] = [local(p).detach().clone() for p in model.parameters()]

        def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(all(torch.equal(local(p), b) for p, b in zip(model.parameters(), before, strict=True)))
            if len(seen) == 2:  # with a momentum to perturb by
                raise Stop

    with pytest.raises(Stop):
        trained(folder / str(dist.get_rank()), CONFIGS["gpt2"], 2, fsdp2, callbacks=[Watching()], sam=member, **SGD)
    return len(seen), all(seen)


@pytest.mark.parametrize(("member", "fsdp2"), covering([distopt.SAM, distopt.MomentumSAM], [False, True]))
def test_between_micro_batches_the_weights_are_unperturbed(tmp_path: Path, member: Any, fsdp2: bool) -> None:
    """MomentumSAM's stayed perturbed from the first to the last, and so for ever after an interrupt there."""
    assert run(2, between_micro_batches, tmp_path, member, fsdp2) == [(2, True)] * 2
