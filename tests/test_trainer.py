"""SAM and distopt's optimizers inside the Trainer of transformers, on one process and on two."""

from __future__ import annotations

import math
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

import distopt
from distopt.layout import local
from tests.harness.cells import covering, some
from tests.harness.distributed import RankError, run
from tests.harness.engines import CONFIGS, SEQUENCES, VOCABULARY
from tests.harness.trainers import error, language_model, sequences, trainer, whole

STEPS = 3
# As in tests.test_engines: float32 sums over a batch in another order, which each step passes on.
TOLERANCE = 2e-5
DROPOUT = CONFIGS["gpt2"] | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}


def trained(
    folder: Path,
    config: dict[str, Any] | nn.Module,
    accumulation: int,
    fsdp2: bool = False,
    schedule: str = "linear",
    **options: Any,
) -> list[Tensor]:
    """The parameters after a Trainer has gone over the data once, in batches of `SEQUENCES` over all ranks."""
    made = trainer(
        folder,
        "fsdp2_full" if fsdp2 else "ddp",
        STEPS,
        options,
        config,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        lr_scheduler_type=schedule,
    )
    made.train()
    assert all(isinstance(p, DTensor) for p in made.model_wrapped.parameters()) == fsdp2
    return whole(made)


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


def on_ranks(
    folder: Path, config: dict[str, Any], accumulation: int, options: dict[str, Any], fsdp2: bool = False
) -> list[Tensor]:
    return trained(folder / str(dist.get_rank()), config, accumulation, fsdp2, **options)


SGD = {"optimizer_cls_and_kwargs": (distopt.SGD, {"lr": 0.3, "momentum": 0.9})}
LAMB = {"optimizer_cls_and_kwargs": (distopt.LAMB, {"lr": 0.02})}
SAM = {"sam": partial(distopt.SAM, rho=0.1)}
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


class Stop(Exception):
    pass


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


# Mixed precision.


def warned(folder: Path, bf16: bool) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(folder, "ddp", STEPS, SGD | {"sam": partial(distopt.SAM, rho=1e-5)}, bf16=bf16).train()
    return [str(warning.message) for warning in told if "SAM's perturbation is lost" in str(warning.message)]


def test_a_perturbation_that_bf16_rounds_away_is_warned_of_once(tmp_path: Path) -> None:
    """Nobody told SAM what the Trainer computes with, so that it measured nothing."""
    assert run(1, warned, tmp_path, False) == [[]]
    assert [len(told) for told in run(1, warned, tmp_path, True)] == [1]


def scaling(folder: Path, options: dict[str, Any], callbacks: Any = ()) -> Any:
    """A Trainer with fp16 and a loss scale, which Accelerate has for GPUs only: this is all that lacks."""
    made = trainer(folder, "ddp", STEPS, options | {"callbacks": list(callbacks)})
    made.accelerator.state._mixed_precision, made.accelerator.native_amp = "fp16", True
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return made


def overflowing(folder: Path, poisoned: int) -> tuple[list[bool], list[float], list[float]]:
    """Whether each step moved the weights, the loss scale before each and at the end, and the steps that were counted;
    in the second one rank's loss in that pass is inf."""
    from transformers import TrainerCallback

    seen: list[list[Tensor]] = []
    scales: list[float] = []
    calls: list[None] = []

    class Watching(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.append(values(model.parameters()))
            scales.append(made.accelerator.scaler.get_scale())

    def poison(module: Any, args: Any, logits: Tensor) -> Tensor:
        calls.append(None)
        return logits * (math.inf if len(calls) == 2 + poisoned and dist.get_rank() == 1 else 1.0)

    adamw = {"optimizer_cls_and_kwargs": (distopt.AdamW, {"lr": 0.01})}
    made = scaling(folder / str(dist.get_rank()), adamw | SAM, [Watching()])
    made.model.lm_head.register_forward_hook(poison)
    made.train()
    assert len(calls) == 2 * STEPS
    seen.append(values(made.model.parameters()))
    moved = [not all(torch.equal(p, q) for p, q in zip(a, b)) for a, b in pairwise(seen)]
    steps = {float(state["step"]) for state in made.optimizer.state.values()}
    return moved, [*scales, made.accelerator.scaler.get_scale()], sorted(steps)


def values(params: Any) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("poisoned", [1, 2])
def test_an_overflow_in_either_pass_leaves_the_step_out(tmp_path: Path, poisoned: int) -> None:
    """On one rank only; weights are restored, all ranks skip the step and halve the scale, and training continues."""
    expected = ([True, False, True], [1024.0, 1024.0, 512.0, 512.0], [2.0])
    assert run(2, overflowing, tmp_path, poisoned) == [expected] * 2


def friendly(folder: Path) -> None:
    scaling(folder, SGD | {"sam": distopt.FriendlySAM}).create_optimizer()


def test_friendly_sam_under_a_loss_scale_is_refused(tmp_path: Path) -> None:
    """Its mean of gradients would be of several scales."""
    with pytest.raises(
        RankError, match=r"FriendlySAM remembers gradients.*loss scale.*use mixed_precision=bf16"
    ) as error:
        run(1, friendly, tmp_path)
    assert error.value.kind == "ValueError"


class Normed(nn.Module):
    """Batch norm inside of a model that the Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.norm = nn.Embedding(VOCABULARY, 8), nn.BatchNorm1d(8)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.norm(self.embedding(input_ids).flatten(0, 1)) @ self.embedding.weight.T
        return {"loss": cross_entropy(logits[:-1], labels.flatten()[1:])}


def normed(folder: Path) -> tuple[list[float], int]:
    """The running means after each forward pass of each micro-batch and at the end; how many batches were counted."""
    model, means = Normed(), []
    model.norm.register_forward_hook(lambda *_: means.append(float(model.norm.running_mean.sum())))
    trained(folder, model, 2, sam=partial(distopt.SAM, rho=1.0), **SGD)
    return [*means, float(model.norm.running_mean.sum())], int(model.norm.num_batches_tracked)


def test_the_statistics_of_batch_norm_are_those_of_the_first_pass(tmp_path: Path) -> None:
    """Nobody told SAM of the model, so that the second pass moved them too, and was counted, without a word."""
    (((*_, first, _, second, after), counted),) = run(1, normed, tmp_path)
    assert after == first and first != second
    assert counted == 2 * STEPS


def test_a_trainer_whose_passes_may_differ_is_refused() -> None:
    """Unless it says that they do not; its own compute_loss is what a subclass is for."""
    from transformers import Trainer

    from distopt.integrations.transformers import SAMTrainerMixin

    def stop(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise Stop

    made = type("Made", (Trainer,), {"__init__": stop})
    for name, below, above in (
        ("training_step", True, False),  # above the mixin's it is called for the first pass alone
        ("_prepare_inputs", True, True),
        ("compute_loss", False, False),
    ):
        inner = type("Inner", (made,), {name: stop})
        outer = type("Outer", (SAMTrainerMixin, made), {name: stop})
        for kind, refused in ((type("Both", (SAMTrainerMixin, inner), {}), below), (outer, above)):
            message = rf"has its own {name}, which SAM's second pass would call again"
            with pytest.raises(ValueError, match=message) if refused else pytest.raises(Stop):
                kind(**SAM)
            for allowed, options in ((kind, {}), (type("Declared", (kind,), {"same_in_both_passes": True}), SAM)):
                with pytest.raises(Stop):
                    allowed(**options)


def twice(folder: Path) -> int:
    made = trainer(folder, "ddp", STEPS, SGD | {"sam": partial(distopt.LookSAM, rho=0.1, interval=2)})
    made.train()
    made.train()
    return int(made.optimizer.param_groups[0]["sam_steps"])


def test_training_again_continues_with_the_same_sam(tmp_path: Path) -> None:
    """Another SAM was put around Accelerate's wrapper of the first, and both counted the steps of the interval."""
    assert run(1, twice, tmp_path) == [2 * STEPS]


def test_a_vanishing_perturbation_changes_nothing_with_dropout(tmp_path: Path) -> None:
    """Both passes draw the same masks, and the step after starts where one pass would have left the generator."""
    tiny = SGD | {"sam": partial(distopt.SAM, rho=1e-12)}
    (plain,) = run(1, on_ranks, tmp_path, DROPOUT, 2, SGD)
    (sam,) = run(1, on_ranks, tmp_path, DROPOUT, 2, tiny)
    assert error(sam, plain) < TOLERANCE
