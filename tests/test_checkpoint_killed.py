"""No checkpoint is lost, whatever is killed or full while one is written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distopt.checkpoint import (
    async_save_checkpoint,
    checkpoint_path,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from distopt.optim import schedules as schedules
from tests.harness.checkpoints import start, train
from tests.harness.distributed import run

_SECONDS = float(os.environ.get("DISTOPT_TEST_SECONDS", "120"))  # more, where other programs use the machine
KILLED = """
import os, signal, sys
from pathlib import Path
import torch, distopt
from distopt.checkpoint import checkpoint_path, latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint
assert "torch.distributed.checkpoint" not in sys.modules, "import distopt must not wait for it"

folder = Path(sys.argv[1])
path = checkpoint_path(folder, 2)
model = torch.nn.Linear(3, 2)
optimizer = distopt.LAMB(model.parameters(), lr=0.1)

def save(value):
    torch.nn.init.constant_(model.weight, value)
    save_checkpoint(path, model, optimizer, extra={"value": value})

def at_operation(kill, function, *args):
    '''Runs in a child that is killed at its kill-th operation on the folder; whether it came to its end before.'''
    child = os.fork()
    if child == 0:
        seen = 0
        def count(event, args):
            nonlocal seen
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"):
                seen += 1
                if seen == kill:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        try:
            function(*args)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status), f"failed at operation {kill}"
    return status == 0

def found():
    newest, broken = latest_checkpoint(folder)
    assert newest is not None and broken == [], (newest, broken)
    value = load_checkpoint(path, model, optimizer)["value"]
    assert (model.weight == value).all()
    return value

save(0.0)
value, kill, ended = 0.0, 0, False
while not ended:
    kill += 1
    ended = at_operation(kill, save, value + 1)
    assert found() in (value, value + 1), kill
    value = found()
assert found() == value and os.listdir(folder) == [path.name], os.listdir(folder)
print("saving:", kill - 1, "operations,", int(value), "replaced")

for step in (3, 4):
    path = checkpoint_path(folder, step)
    save(float(step))
kill, ended = 0, False
while not ended:
    kill += 1
    ended = at_operation(kill, prune_checkpoints, folder, 1)
    assert found() == 4.0
assert os.listdir(folder) == [path.name], os.listdir(folder)
print("pruning:", kill - 1, "operations")
"""


def test_killed_at_any_operation_on_the_disk_no_checkpoint_is_lost(tmp_path: Path) -> None:
    """Each time a real SIGKILL, one operation later, in a save over the only checkpoint there is."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path], env=environment, capture_output=True, text=True, timeout=_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    operations = int(done.stdout.split()[1])
    assert operations > 20, done.stdout


def disk_full_on(full_rank: int, folder: Path, background: bool) -> tuple[str, list[str]]:
    parts = start("fsdp2", "lamb")
    if background:  # also makes its process group, which gloo cannot under the limit below
        path = async_save_checkpoint(checkpoint_path(folder, 1), *parts, extra={"good": True}).result()
    else:
        path = save_checkpoint(checkpoint_path(folder, 1), *parts, extra={"good": True})
    train(*parts, 0, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for other in (path, checkpoint_path(folder, 2)):
            with pytest.raises(RuntimeError) as caught:
                if background:
                    async_save_checkpoint(other, *parts).result()
                else:
                    save_checkpoint(other, *parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path, *parts) == {"good": True}
    dist.barrier()
    return str(caught.value), [*os.listdir(folder), *os.listdir(path)]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_rank_cannot_write_all_raise_alike_and_the_former_checkpoint_stays(
    tmp_path: Path, rank: int, background: bool
) -> None:
    """The kernel refuses files of more than 1000 bytes to one rank. Nothing is left that would take the space."""
    results = run(2, disk_full_on, rank, tmp_path, background)
    assert results[0] == results[1]
    assert f"rank {rank}: OSError: [Errno 27] File too large" in results[0][0]
    assert results[0][1][0] == "step_00000001" and len(results[0][1]) == 3 and "manifest.json" in results[0][1]


def nowhere_to_write(path: Path) -> str:
    with pytest.raises(RuntimeError) as caught:
        save_checkpoint(path, *start("ddp", "lamb"))
    return str(caught.value)


def test_where_the_folder_cannot_be_made_all_ranks_raise_alike(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    results = run(2, nowhere_to_write, tmp_path / "file" / "step_00000001")
    assert results[0] == results[1] and "rank 0: NotADirectoryError" in results[0]


def slow_manifest(folder: Path) -> None:
    replace = os.replace
    if dist.get_rank() == 0:
        os.replace = lambda *args: (time.sleep(0.3), replace(*args))
    try:
        path = save_checkpoint(checkpoint_path(folder, 1), *start("fsdp2", "lamb"))
        assert latest_checkpoint(folder) == (path, [])
    finally:
        os.replace = replace


def test_no_rank_continues_before_the_checkpoint_is_complete(tmp_path: Path) -> None:
    run(2, slow_manifest, tmp_path)


def load_elsewhere(path: Path, extra: dict[str, Any]) -> str:
    parts = start("fsdp2", "lamb")
    with pytest.raises(ValueError) as caught:
        if extra:
            save_checkpoint(path, *parts, extra=extra if dist.get_rank() else {})
        else:
            load_checkpoint(path, *parts)
    return str(caught.value)


def test_what_is_refused_is_refused_on_every_rank(tmp_path: Path) -> None:
    for extra, message in (({}, "there is no such folder"), ({"rank": 1}, "extra must be the same on every rank")):
        results = run(2, load_elsewhere, tmp_path / "a", extra)
        assert results[0] == results[1] and message in results[0]
