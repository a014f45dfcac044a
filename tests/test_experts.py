"""Expert parallelism, as torchtitan has it: experts along `ep` and then by FSDP2, beside layers on all ranks."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distopt
from distopt.layout import infer_layout, local
from tests.harness.cells import some
from tests.harness.distributed import RankError, run
from tests.harness.jobs import fork
from tests.harness.optimizers import distance, named
from tests.harness.sharded import backward, full, shard, sharded, whole

HALF, STEPS = 2, 4


def made(kind: str, name: str) -> tuple[nn.Module, Any]:
    """The model of experts on this rank, or unsharded, and SAM around one of the optimizers."""
    model = whole("experts")
    if dist.is_initialized():
        shard(kind, model)
    row = named(name)
    return model, distopt.SAM(row.make(row.groups([*model.parameters()])), rho=0.1)


def train(kind: str, model: nn.Module, sam: Any, first: int, last: int) -> None:
    """Steps with all that takes a norm: the perturbation, clipping, and trust ratios, row sums or full matrices."""
    for step in range(first, last):
        model.zero_grad()
        backward(model, kind, step)
        sam.perturb()
        model.zero_grad()
        backward(model, kind, step)
        sam.restore()
        distopt.clip_grad_norm_(sam, max_norm=1.0)
        if dist.is_initialized():
            distopt.prove(sam, model, state=True)
        sam.step()


def through(folder: str, name: str) -> tuple[list[Tensor], dict[str, str], list[bool]]:
    """The weights after half of the steps, which are saved, after all of them, and the checksums of those saved."""
    model, sam = made("experts", name)
    train("experts", model, sam, 0, HALF)
    distopt.save_checkpoint(f"{folder}/{name}", model, sam)
    prints = distopt.fingerprint(model, sam)
    train("experts", model, sam, HALF, STEPS)
    return full(model), prints.params | {"total": prints.total}, list(infer_layout(model.parameters()).counted)


def resumed(kind: str, folder: str, name: str) -> tuple[list[Tensor], dict[str, str]]:
    """The second half from that checkpoint, on other ranks; the checksums of what was loaded."""
    model, sam = made(kind, name)
    distopt.load_checkpoint(f"{folder}/{name}", model, sam)
    prints = distopt.fingerprint(model, sam)
    train(kind, model, sam, HALF, STEPS)
    return full(model), prints.params | {"total": prints.total}


@lru_cache
def unsharded(name: str) -> list[Tensor]:
    model, sam = made("", name)
    train("", model, sam, 0, STEPS)
    return full(model)


@pytest.mark.parametrize("name", some(["lamb", "muon"], ["lamb", "lars", "adafactor", "muon"]))
def test_a_step_is_that_of_the_unsharded_model_and_resumes_on_other_ranks(name: str, tmp_path: Path) -> None:
    """Five experts over two, then by rows or by columns over the ranks that have the same ones."""
    expected = unsharded(name)
    ran = run(4, through, str(tmp_path), name)
    counted = torch.tensor([counts for _, _, counts in ran])
    shared = [i for i, (param, _) in enumerate(whole("experts").named_parameters()) if param == "experts.common"]
    assert counted.sum(0).tolist() == [2 if i in shared else 4 for i in range(len(expected))]
    again = [*run(2, resumed, "fsdp2", str(tmp_path), name), *run(4, resumed, "experts", str(tmp_path), name)]
    for weights, prints in [each[:2] for each in ran] + again:
        assert distance(weights, expected) < 1e-12
        assert prints == ran[0][1]


# What the proof sees.


def drifted(name: str) -> None:
    """One rank has another copy of what both of its ep group should have, or of nothing that it shares."""
    model = sharded("experts")
    if dist.get_rank() == 3:
        with torch.no_grad():
            local(model.get_parameter(name)).view(-1)[0] += 1.0
    opt = distopt.LAMB(model.parameters())
    backward(model, "experts", 0)
    distopt.prove(opt, model)


def without_gradient() -> None:
    """A rank whose experts had no tokens, and whose program therefore skipped them."""
    model = sharded("experts")
    opt = distopt.LAMB(model.parameters())
    backward(model, "experts", 0)
    if dist.get_rank() == 1:
        model.experts.up.grad = None
    opt.step()


def test_replicas_that_differ_are_named() -> None:
    with pytest.raises(RankError, match=r"experts.common.*ranks? .* have copies of the weights that differ"):
        run(4, drifted, "experts.common")
    run(4, drifted, "experts.up")  # no other rank has that part: other weights, and the same on every layout


def test_a_gradient_that_one_rank_lacks_is_refused() -> None:
    with pytest.raises(RankError, match=r"ranks differ in whether there is a gradient: rank 1 against all others"):
        run(4, without_gradient)


@pytest.mark.parametrize("rank", [0, 5])
def test_a_remainder_that_torch_cannot_read_again_is_refused_on_every_rank(rank: int, tmp_path: Path) -> None:
    """torch 2.13 wrote a checkpoint of seven experts over two, then over three ranks, and raised when it was read."""
    from tests.harness.fake_ranks import refused_experts

    process = fork(refused_experts, rank, tmp_path / "said.json")
    process.join(60.0)
    assert process.exitcode == 0
    ((experts, said),) = json.loads((tmp_path / "said.json").read_text()).items()
    assert experts == "7"
    assert "torch 2.13 writes checkpoints that it cannot read: choose a size that both numbers of ranks divide" in said
