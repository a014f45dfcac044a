"""SAM's second pass in the Trainer: loss scales, batch norm, subclasses."""

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
from torch.nn.functional import cross_entropy

import distopt
from tests.harness.distributed import RankError, run
from tests.harness.engines import VOCABULARY
from tests.harness.sam_trainers import DROPOUT, SAM, SGD, STEPS, TOLERANCE, Stop, on_ranks, trained
from tests.harness.trainers import error, trainer

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
