"""LAMB, Muon and SAM in the SFTTrainer of TRL."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distopt
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.pretrained import chats, write_model
from tests.harness.trainers import SEQUENCES, SETUPS, arguments, error, sharding, whole

# float32 sums over a batch in another order, which each step passes on.
TOLERANCE = 2e-5
SAM = partial(distopt.SAM, rho=0.1)
LAMB = {"optimizer_cls_and_kwargs": (distopt.LAMB, {"lr": 0.02})}


def muon(model: nn.Module, **options: Any) -> distopt.Muon:
    """What transformers calls a factory: a function of the model, here with groups of its own."""
    groups = distopt.param_groups(model, 0.1, {"lm_head": {"lr": 0.005}}, matrices="muon")
    return distopt.Muon(groups, adjust_lr_fn="match_rms_adamw", ns_dtype="float32", **options)


MUON = {"optimizer_cls_and_kwargs": (lambda: muon, {"lr": 0.02})}
OPTIONS: dict[str, dict[str, Any]] = {"lamb": LAMB, "muon": MUON, "sam": LAMB | {"sam": SAM}}


def trainer(base: Path, setup: str, accumulation: int, options: dict[str, Any], **more: Any) -> Any:
    """A Trainer for three steps of supervised fine-tuning on chats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TRL 1.16 imports
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        from distopt.integrations.transformers import SAMTrainerMixin

        class Trainer(SAMTrainerMixin, SFTTrainer):
            pass

        args = arguments(
            base.parent / "trl",
            setup,
            SFTConfig,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            max_length=64,
            bf16=False,
            gradient_checkpointing=False,
            **more,
        )
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return sharding(Trainer, setup)(
            model,
            args,
            train_dataset=Dataset.from_list(chats(3 * SEQUENCES)),
            processing_class=AutoTokenizer.from_pretrained(base),
            **options,
        )


def finetuned(base: Path, setup: str, options: str, accumulation: int) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters before and after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = trainer(base, setup, accumulation, OPTIONS[options])
        before = [p.detach().clone() for p in made.model.parameters()]
        made.train()
        return before, whole(made)


def logged(base: Path) -> list[list[dict[str, float]]]:
    """What the steps of AdamW, and of SAM around it with two radii, have logged, by two micro-batches each."""
    logs = []
    for rho in (None, 1e-9, 1.0):
        sam = {} if rho is None else {"sam": partial(distopt.SAM, rho=rho)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adamw = {"optimizer_cls_and_kwargs": (distopt.AdamW, {"lr": 1e-3})}
            made = trainer(base, "ddp", 2, adamw | sam, logging_steps=1, train_sampling_strategy="sequential")
            made.train()
        logs.append([entry for entry in made.state.log_history if "entropy" in entry])
    return logs


def test_the_second_pass_counts_no_token_and_no_metric(tmp_path: Path) -> None:
    """TRL counts where it computes the loss: tokens twice, and means that were half of perturbed weights."""
    ((plain, tiny, wide),) = run(1, logged, write_model(tmp_path / "base"))
    assert len(plain) == 3 and plain[0]["num_tokens"] > 0
    names = ("num_tokens", "entropy", "mean_token_accuracy", "loss")
    for ours, theirs in zip(tiny, plain, strict=True):
        assert [ours[name] for name in names] == pytest.approx([theirs[name] for name in names], rel=1e-4)
    assert [entry["num_tokens"] for entry in wide] == [entry["num_tokens"] for entry in plain]
    assert wide[0]["entropy"] == pytest.approx(plain[0]["entropy"], rel=1e-6)


def test_trainers_that_generate_their_batches_are_refused() -> None:
    """GRPO's second pass generated anew, from the perturbed weights, and moved on in its buffer of batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TRL 1.16 imports
        import trl

        from distopt.integrations.transformers import SAMTrainerMixin

    for name, own in (("GRPOTrainer", "training_step"), ("RLOOTrainer", "training_step")):
        kind = type("SAMTrainer", (SAMTrainerMixin, getattr(trl, name)), {})
        with pytest.raises(ValueError, match=f"{name} has its own {own}, which SAM's second pass would call again"):
            kind(sam=SAM)
    for name in ("SFTTrainer", "RewardTrainer", "DPOTrainer", "KTOTrainer"):
        kind = type("SAMTrainer", (SAMTrainerMixin, getattr(trl, name)), {"compute_loss": lambda *_: None})
        with pytest.raises(TypeError, match=r"required positional argument|model"):  # TRL's own: it was let through
            kind(sam=SAM)


@pytest.mark.parametrize(
    ("options", "setup"),
    some(
        [("muon", "ddp"), ("sam", "fsdp2_full")],
        [("lamb", "ddp"), ("sam", "fsdp2_full"), *(("muon", setup) for setup in SETUPS)],
    ),
)
def test_two_processes_fine_tune_as_one(tmp_path: Path, options: str, setup: str) -> None:
    base = write_model(tmp_path / "base")
    ((before, expected),) = run(1, finetuned, base, "ddp", options, 1)
    assert error(before, expected) > 100 * TOLERANCE
    for _, params in run(2, finetuned, base, setup, options, 2):
        assert error(params, expected) < TOLERANCE
