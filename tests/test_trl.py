"""LAMB and SAM in the SFTTrainer of TRL."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from tests.distributed import run
from tests.pretrained import chats, write_model
from tests.trainers import SEQUENCES, arguments, error, sharding, whole

# float32 sums over a batch in another order, which each step passes on.
TOLERANCE = 2e-5
LAMB = {"optimizer_cls_and_kwargs": (distopt.LAMB, {"lr": 0.02})}
OPTIONS: dict[str, dict[str, Any]] = {"lamb": LAMB, "sam": LAMB | {"sam": partial(distopt.SAM, rho=0.1)}}


def finetuned(base: Path, setup: str, options: str, accumulation: int) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters before and after three steps of supervised fine-tuning on chats."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what TRL 1.16 imports
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        from distopt.trainer import SAMTrainerMixin

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
        )
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        made = sharding(Trainer, setup)(
            model,
            args,
            train_dataset=Dataset.from_list(chats(3 * SEQUENCES)),
            processing_class=AutoTokenizer.from_pretrained(base),
            **OPTIONS[options],
        )
        before = [p.detach().clone() for p in model.parameters()]
        made.train()
        return before, whole(made)


@pytest.mark.parametrize(
    ("options", "setup"), [pytest.param("lamb", "ddp", marks=pytest.mark.matrix), ("sam", "fsdp2_full")]
)
def test_two_processes_fine_tune_as_one(tmp_path: Path, options: str, setup: str) -> None:
    base = write_model(tmp_path / "base")
    ((before, expected),) = run(1, finetuned, base, "ddp", options, 1)
    assert error(before, expected) > 100 * TOLERANCE
    for _, params in run(2, finetuned, base, setup, options, 2):
        assert error(params, expected) < TOLERANCE
