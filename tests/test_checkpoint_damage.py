"""Damaged and hostile checkpoints: found, named, passed over; nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

import distopt
from distopt.checkpoint import (
    checkpoint_path,
    intact_checkpoint,
    load_checkpoint,
    load_weights,
    manifest,
    prune_checkpoints,
    save_checkpoint,
    verify,
)
from distopt.checkpoint import index as indices
from distopt.checkpoint.folder import small_files
from distopt.checkpoint.save import contents_of
from distopt.checkpoint.storage import Storage
from distopt.job.resume import find_start
from tests.harness.checkpoints import HALF, assert_equal, everything, sealed, start, train, trained
from tests.harness.distributed import run
from tests.harness.runs import copied

FILES = {"config.json": b'{"model_type": "gpt2"}', "tokenizer.json": b"{}"}


def saved(folder: Path) -> list[Path]:
    """Checkpoints of steps 1 and 2."""
    model, optimizer, schedule = trained(steps=1)
    return [
        save_checkpoint(checkpoint_path(folder, step), model, optimizer, schedule, {"step": step}, FILES)
        for step in (1, 2)
    ]


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def zeros(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data))
    stop = draw.randrange(start, len(data)) + 1
    while not any(data[start:stop]):  # zeros already
        start, stop = max(0, start - 1), min(len(data), stop + 1)
    data[start:stop] = bytes(stop - start)
    file.write_bytes(data)


def missing(file: Path, draw: random.Random) -> None:
    file.unlink()


def longer(file: Path, draw: random.Random) -> None:
    with file.open("ab") as end:
        end.write(draw.randbytes(draw.randrange(1, 100)))


DAMAGES = (flip, truncate, zeros, missing, longer)


def load(path: Path) -> None:
    load_checkpoint(path, *trained(steps=0))


def resumed_by_name(path: Path) -> None:
    start, _ = find_start(path.parent, str(path))
    load_weights(start.path, {})


def damages(older: Path, newest: Path, count: int, reads: Sequence[Callable[[Path], object]]) -> None:
    """Each damage to a checkpoint is found, named, passed over, and refused by name."""
    folder = newest.parent
    original = folder.parent / "original"
    shutil.copytree(newest, original)
    files = sorted(file.relative_to(original) for file in original.rglob("*") if file.is_file())
    assert len(files) >= 5, files
    for i in range(count):
        draw = random.Random(i)
        damage, file = DAMAGES[i % len(DAMAGES)], files[i // len(DAMAGES) % len(files)]
        damage(newest / file, draw)
        what = f"{i}: {damage.__name__} of {file}"
        found, lines = intact_checkpoint(folder)
        assert found == older and len(lines) == 1, (what, lines)
        assert lines[0].startswith(f"{newest.name}: ") and file.name in lines[0], (what, lines)
        for read in reads:
            with pytest.raises(ValueError) as caught:
                read(newest)
            assert file.name in str(caught.value), (what, caught.value)
        shutil.rmtree(newest)
        shutil.copytree(original, newest)
    assert intact_checkpoint(folder) == (newest, [])


def test_any_damage_is_found_named_and_passed_over(tmp_path: Path) -> None:
    damages(*saved(tmp_path / "all"), 40, [verify, load])


@pytest.mark.matrix
def test_a_thousand_damages(tmp_path: Path) -> None:
    damages(*saved(tmp_path / "all"), 1000, [verify, load])


@pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.matrix)])
def test_damages_to_a_run_of_the_job(finished: Path, tmp_path: Path, count: int) -> None:
    """The run resumes from the checkpoint before the damaged one, and refuses the damaged one by name."""
    older, newest = (copied(finished, tmp_path) / "checkpoints" / f"step_0000000{step}" for step in (4, 8))

    def resumed(path: Path) -> None:
        start, (line,) = find_start(path.parent, "auto")
        assert (start.path, start.step) == (older, 4) and line.endswith("; resuming from step_00000004")
        raise ValueError(line)

    damages(older, newest, count, [resumed, resumed_by_name, verify])


def test_a_file_that_cannot_be_opened_is_damage(tmp_path: Path) -> None:
    older, newest = saved(tmp_path)
    file = next(newest.glob("*/shard-00000.bin"))
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")  # a link may lead out of the checkpoint
    assert intact_checkpoint(tmp_path)[0] == older
    file.unlink()
    file.mkdir()
    assert intact_checkpoint(tmp_path)[0] == older


def sharded(path: Path, engine: str) -> str:
    parts = start(engine, "lamb")
    train(*parts, 0, HALF)
    total = distopt.fingerprint(parts[0], parts[1]).total
    save_checkpoint(path, *parts)
    return total


def test_the_fingerprint_is_that_of_the_run_whatever_saved_it(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "one", *(parts := trained()))
    totals = [distopt.fingerprint(*parts[:2]).total]
    assert verify(path).total == json.loads((path / "manifest.json").read_text())["fingerprint"] == totals[0]
    for engine in ("ddp", "fsdp2"):
        assert set(run(2, sharded, tmp_path / engine, engine)) == {verify(tmp_path / engine).total}


def resaved_elsewhere(path: Path) -> None:
    parts = start("fsdp2", "lamb", seed=1)
    load_checkpoint(path / "one", *parts)
    save_checkpoint(path / "two", *parts)


def test_the_fingerprint_stays_when_another_number_of_processes_saves_it_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "one", *trained())
    run(3, resaved_elsewhere, tmp_path)
    assert verify(tmp_path / "two") == verify(tmp_path / "one")


def test_the_command(tmp_path: Path) -> None:
    """It takes a checkpoint, or a run, of which it checks the newest one."""
    _, path = saved(tmp_path / "run/checkpoints")

    def command(of: Path) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "distopt.verify", str(of)]
        return subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)

    for of in (tmp_path / "run", path):
        good = command(of)
        assert good.returncode == 0 and f"{path} is intact: 5 files" in good.stdout, good.stderr
    flip(next(path.glob("*/training.pt")), random.Random(0))
    bad = command(path)
    assert (
        bad.returncode == 1 and "training.pt is not as it was written" in bad.stderr and "Traceback" not in bad.stderr
    )


class Hostile:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    _, path = saved(tmp_path / "all")

    def hostile(_: dict[str, Any], files: Path) -> None:
        torch.save({"param_groups": Hostile(ran), "schedule": None, "random": []}, files / "training.pt")

    sealed(path, hostile)
    with pytest.raises(ValueError, match=r"training\.pt cannot be read"):
        load_checkpoint(path, *trained(steps=0))
    with pytest.raises(ValueError, match="is damaged"):
        verify(path)
    metadata = pickle.dumps(Hostile(ran))
    storage = tmp_path / "dcp"
    storage.mkdir()
    (storage / ".metadata").write_bytes(metadata)
    with pytest.raises(ValueError, match=r"posix\.mkdir does not belong into the metadata of a checkpoint"):
        indices.read(Storage(storage), 1)
    assert not ran.exists()
    pickle.loads(metadata)
    assert ran.exists()  # it would have


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "..", "", ".hidden", "a\nb"])
def test_names_that_lead_out_of_a_checkpoint_are_refused(tmp_path: Path, name: str) -> None:
    _, path = saved(tmp_path / "all")
    (tmp_path / "all" / "x").write_text("secret")

    def listed(content: dict[str, Any], files: Path) -> None:
        content["files"][name] = [6, 0]

    sealed(path, listed)
    for read in (small_files, verify):
        with pytest.raises(ValueError, match="no plain name of a file"):
            read(path)


def test_what_would_run_code_when_it_is_loaded_is_not_saved(tmp_path: Path) -> None:
    model, optimizer, _ = trained(steps=1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    schedule.friend = Path("x")
    with pytest.raises(ValueError, match="cannot be saved, since it would run code when it is loaded"):
        save_checkpoint(tmp_path / "a", model, optimizer, schedule)
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    """As distopt wrote it: torch's distributed checkpoint, training.pt and a manifest of sizes."""
    model, optimizer, schedule = trained()
    contents = contents_of(model, optimizer)
    path = tmp_path / "step_00000003"
    dcp.save(contents.saved(), checkpoint_id=path, no_dist=True)
    training = {"param_groups": contents.groups, "schedule": schedule.state_dict(), "random": []}
    torch.save(training, path / "training.pt")
    content = {
        "format": 1,
        "world_size": 1,
        "parameters": manifest.described(contents.tensors),
        "optimizer": "LAMB",
        "state": {name: manifest.described(buffers) for name, buffers in contents.state.items()},
        "schedule": type(schedule).__name__,
        "extra": {"step": 3},
        "files": {file.name: file.stat().st_size for file in path.iterdir()},
    }
    (path / "manifest.json").write_text(json.dumps(content))
    assert intact_checkpoint(tmp_path) == (path, [])
    other = trained(steps=0, seed=1)
    assert load_checkpoint(path, *other) == {"step": 3}
    expected, got = everything(model, optimizer), everything(*other[:2])
    del expected["random"], got["random"]
    assert_equal(got, expected)


def test_on_a_file_system_of_fsspec(tmp_path: Path) -> None:
    """That of s3, by its counterpart in memory."""
    folder = "memory://bucket/run"
    model, optimizer, schedule = trained()
    for step in (1, 2):
        path = save_checkpoint(
            checkpoint_path(folder, step), model, optimizer, schedule, {"step": step}, {"config.json": b"{}"}
        )
        save_checkpoint(path, model, optimizer, schedule, {"step": step}, {"config.json": b"{}"})  # over the first
    assert path == "memory://bucket/run/step_00000002"
    assert intact_checkpoint(folder) == (path, []) and small_files(path) == {"config.json": b"{}"}
    other = trained(steps=0, seed=1)
    assert load_checkpoint(path, *other) == {"step": 2}
    assert_equal(everything(*other[:2]), everything(model, optimizer))
    files = fsspec.filesystem("memory")
    assert len(files.find("/bucket/run/step_00000002")) == 5, files.find("/bucket/run")
    files.rm_file("/bucket/run/step_00000002/manifest.json")
    found, lines = intact_checkpoint(folder)
    assert found == f"{folder}/step_00000001" and "it has no manifest.json" in lines[0]
    prune_checkpoints(folder, keep=1)
    assert files.ls("/bucket/run", detail=False) == ["/bucket/run/step_00000001"]
    with pytest.raises(ValueError, match="nowhere://x/step_00000001 cannot be opened"):
        save_checkpoint("nowhere://x/step_00000001", model, optimizer)
