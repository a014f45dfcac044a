"""Muon and AdamW as one optimizer in the Trainer: the run of a plain loop at any number of processes, also resumed."""

from __future__ import annotations

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import distopt
from distopt.layout import unwrap_optimizer
from tests.harness.cells import some
from tests.harness.distributed import RankError, run
from tests.harness.engines import CONFIGS, SEQUENCES, VOCABULARY
from tests.harness.trainers import SETUPS, error, sequences, trainer, whole

STEPS, STOP = 4, 2
TOLERANCE = 1e-5  # float32 sums over a batch in another order, which Newton-Schulz and each step pass on
RATE, DECAY = 0.02, 0.1
OPTIONS = {"adjust_lr_fn": "match_rms_adamw", "ns_dtype": "float32"}


def llama() -> nn.Module:
    """Without biases: the gradient of a key's is zero but for rounding, which AdamW would blow up to a whole step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **CONFIGS["llama"]))
    model.loss_type = "ForCausalLM"
    return model  # type: ignore[no-any-return]


@lru_cache
def plain(steps: int = STEPS) -> list[Tensor]:
    """One process without a Trainer: whole batches, one clip, one schedule."""
    model = llama()
    optimizer = distopt.Muon(distopt.param_groups(model, DECAY, matrices="muon"), lr=RATE, **OPTIONS)
    for step, batch in enumerate(sequences(STEPS).split(SEQUENCES)[:steps]):
        optimizer.zero_grad()
        cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def made(folder: Path, setup: str, **arguments: Any) -> Any:
    muon = {"optimizer_cls_and_kwargs": (distopt.Muon, {"lr": RATE, **OPTIONS})}
    order = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "linear", "weight_decay": DECAY}
    return trainer(folder, setup, STEPS, muon, llama(), **order, **arguments)


def trained(folder: Path, setup: str, resumes: bool) -> tuple[list[Tensor], bool]:
    """The full parameters, and whether the optimizer knows of ranks that have copies, with which it shares its work."""
    saving: dict[str, Any] = {} if resumes else {"save_strategy": "steps", "save_steps": STOP}
    one = made(folder, setup, gradient_accumulation_steps=2, **saving)
    one.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resumes else None)
    assert one.state.global_step == STEPS
    return whole(one), unwrap_optimizer(one.optimizer).layout.copies is not None


@pytest.mark.parametrize(
    ("setup", "other"),
    some([("fsdp2_sharded", 1)], itertools.product(("ddp", "fsdp2_full", "fsdp2_sharded"), (1, 4))),
)
def test_it_trains_as_a_plain_loop_and_resumes_at_another_number_of_processes(
    tmp_path: Path, setup: str, other: int
) -> None:
    for resumes, world in ((False, 2), (True, other)):
        for params, shares in run(world, trained, tmp_path, setup, resumes):
            assert error(params, plain()) < TOLERANCE
            assert shares == (setup == "ddp")
    assert error(plain(STOP), plain()) > 1000 * TOLERANCE


@pytest.mark.parametrize("setup", some(["deepspeed2"], [s for s in SETUPS if "deepspeed" in s]))
def test_under_deepspeed_it_resumes_at_the_same_number_of_processes(tmp_path: Path, setup: str) -> None:
    """At another one DeepSpeed itself refuses: `distopt.save_checkpoint` is for that."""
    for resumes in (False, True):
        for params, _ in run(2, trained, tmp_path, setup, resumes):
            assert error(params, plain()) < TOLERANCE
    with pytest.raises(RankError, match="used a DP world size of 2 but the current world size is 1"):
        run(1, trained, tmp_path, setup, True)


def decays(options: dict[str, Any]) -> list[dict[str, float]]:
    """The weight decay of each parameter of the groups that the Trainer makes, by rule."""
    muon = {"optimizer_cls_and_kwargs": (distopt.Muon, {"lr": RATE} | options)}
    optimizer = trainer(Path("unused"), "ddp", 1, muon, llama(), weight_decay=DECAY).create_optimizer()
    return [
        {name: g["weight_decay"] for g in optimizer.param_groups if g["rule"] == rule for name in g["param_names"]}
        for rule in ("muon", "adamw")
    ]


def test_the_groups_are_those_of_param_groups_with_the_decay_of_the_arguments() -> None:
    ((muon, adamw),) = run(1, decays, {})
    assert len(muon) == 14 and all(".layers." in name for name in muon) and {*muon.values()} == {DECAY}
    assert {name for name, decay in adamw.items() if decay} == {"model.embed_tokens.weight", "lm_head.weight"}
    ((muon, _),) = run(1, decays, {"weight_decay": 0.2})
    assert {*muon.values()} == {0.2}
    ((muon, adamw),) = run(
        1, decays, {"params": [{"params": [nn.Parameter(torch.ones(2, 2))], "param_names": ["own"]}]}
    )
    assert (muon, adamw) == ({"own": 0.1}, {})
