"""What `distopt.attach` saves and loads."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import distopt
from tests.harness.accelerated import ACCUMULATION, STEPS, TOLERANCE, lamb, load, prepared, reference, start, train
from tests.harness.distributed import RankError, run
from tests.harness.optimizers import distance
from tests.harness.sharded import full, whole


def save(folder: Path, zero: int) -> list[Tensor]:
    accelerator = start()
    script = prepared(accelerator, zero)
    train(accelerator, *script, range(STEPS // 2))
    accelerator.save_state(str(folder))
    train(accelerator, *script, range(STEPS // 2, STEPS))
    accelerator.save_state(str(folder.parent / "later"))
    return full(script[0])


@pytest.mark.parametrize("saved", [0, 1])
def test_a_saved_run_resumes_at_another_world_size_and_stage(tmp_path: Path, saved: int) -> None:
    """Accelerate keeps rank 0's shards: a run under ZeRO-1 went on from zeros for all other rows, off by 6e-2."""
    folder = tmp_path / "state"
    for params in run(2, save, folder, saved):
        assert distance(params, reference()) < TOLERANCE
    for world, zero in [(1, saved), (2, saved), (4, saved), (4, 1 - saved), (1, 1 - saved)]:
        for params, step in run(world, load, folder, zero):
            assert distance(params, reference()) < TOLERANCE, (world, zero)
            assert step == ACCUMULATION * STEPS // 2  # on ranks too that were not there
    # Nothing of the model and nothing of the optimizer's state stands there a second time.
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert not [name for name in files if name.startswith(("model", "pytorch_model"))]
    assert torch.load(folder / "optimizer.bin") == {"distopt": "the state is in the folder distopt"}
    assert json.loads((folder / "distopt" / "manifest.json").read_text())["optimizer"] == "LAMB"


def free_and_save(folder: Path) -> bool:
    """Another model after free_memory, as where a batch size is searched for; whether the first one is gone."""
    accelerator = start()
    first = prepared(accelerator, 1)
    train(accelerator, *first, range(1))
    accelerator.save_state(str(folder))
    gone = weakref.ref(next(first[0].parameters()))
    del first
    accelerator.free_memory()
    accelerator._custom_objects.clear()
    gc.collect()
    second = prepared(accelerator, 1)
    accelerator.step = 0
    train(accelerator, *second, range(STEPS // 2))
    accelerator.save_state(str(folder))
    accelerator.load_state(str(folder))
    return gone() is None


def test_after_free_memory_the_next_model_is_saved(tmp_path: Path) -> None:
    assert all(run(2, free_and_save, tmp_path / "state"))
    for params, _ in run(2, load, tmp_path / "state", 1):
        assert distance(params, reference()) < TOLERANCE


def state_dicts() -> tuple[list[str], set[str]]:
    """The errors of pickling, and what can still be done with the state dict."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    accelerator = start()
    model, optimizer, schedule = prepared(accelerator, 1)
    train(accelerator, model, optimizer, schedule, range(1))
    errors = []
    for write in (
        lambda state: torch.save(state, io.BytesIO()),
        lambda state: torch.save({"optimizer": state}, io.BytesIO()),
        pickle.dumps,
    ):
        for state in (optimizer.state_dict(), optimizer.optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())):
            with pytest.raises(ValueError) as error:
                write(state)
            errors.append(str(error.value))
    before = optimizer.state_dict()
    optimizer.load_state_dict(copy.deepcopy(before))
    for key, buffers in optimizer.state_dict()["state"].items():
        assert torch.equal(buffers["exp_avg"].to_local(), before["state"][key]["exp_avg"].to_local())
    return errors, set(get_optimizer_state_dict(model, optimizer.optimizer)["state"])


def test_a_file_of_one_ranks_shards_is_refused() -> None:
    names = {name for name, p in whole("replicated").named_parameters() if p.requires_grad}
    for errors, saved in run(2, state_dicts):
        assert len(errors) == 9
        assert all("sharded over the processes" in error and "save_state" in error for error in errors)
        assert saved == names


def stepped(zero: int) -> tuple[list[Tensor], bool]:
    """The weights after a step before `prepare` and one after `attach`, and whether the state is sharded."""
    accelerator = start()
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    inner = lamb(model)
    model(torch.ones(1, 4)).sum().backward()
    inner.step()
    inner.zero_grad()
    model, optimizer = accelerator.prepare(model, inner)
    distopt.attach(accelerator, model, optimizer, zero_stage=zero)
    accelerator.backward(model(torch.ones(1, 4)).sum())
    optimizer.step()
    (state, *_) = inner.state.values()
    return [p.detach() for p in model.parameters()], hasattr(state["exp_avg"], "placements")


def test_state_that_is_whole_may_be_there_already() -> None:
    """Under zero_stage=1 each process keeps its part of it."""
    (whole, sharded), (other, cut) = (run(2, stepped, zero)[0] for zero in (0, 1))
    assert (sharded, cut) == (False, True)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(whole, other, strict=True))


def save_without_attach(folder: Path) -> None:
    accelerator = start()
    model = whole("replicated")
    accelerator.prepare(model, lamb(model))
    accelerator.save_state(str(folder))


def test_a_folder_saved_without_attach_is_refused(tmp_path: Path) -> None:
    run(2, save_without_attach, tmp_path)
    with pytest.raises(RankError, match=r"was saved without distopt\.attach") as error:
        run(2, load, tmp_path, 1)
    assert error.value.kind == "ValueError"
