"""`import distopt` needs torch alone and costs nothing beside it; the linter keeps the import direction."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.jobs import BIN, ENVIRONMENT, ROOT

OTHERS = (
    "accelerate",
    "datasets",
    "deepspeed",
    "hydra",
    "matplotlib",
    "omegaconf",
    "pandas",
    "safetensors",
    "tensorboard",
    "tokenizers",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "tqdm",
    "transformers",
    "wandb",
)
PROBE = """
import json, sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import distopt
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, list[str]]]:
    """Three times, in processes of their own: the seconds that `import distopt` adds, and the modules."""
    folder = tmp_path_factory.mktemp("probe")
    command, env = [sys.executable, "-W", "error", "-c", PROBE], {**os.environ, **ENVIRONMENT}
    return [
        tuple(
            json.loads(subprocess.run(command, cwd=folder, env=env, capture_output=True, check=True, timeout=60).stdout)
        )
        for _ in range(3)
    ]


def test_torch_alone(probes: list[tuple[float, list[str]]]) -> None:
    """Beside what torch has brought: our own modules, and such of torch and of the standard library as are small."""
    for _, added in probes:
        assert "distopt.optim.base" in added
        assert [name for name in added if name in OTHERS or name.partition(".")[0] in OTHERS] == []
        foreign = {name.partition(".")[0] for name in added} - {"distopt", "torch", *sys.stdlib_module_names}
        assert foreign == set()


def test_next_to_no_time(probes: list[tuple[float, list[str]]]) -> None:
    assert statistics.median(seconds for seconds, _ in probes) < 0.3


ALLOWED: dict[str, dict[str, bool]] = {  # what a file may import, where the rules say something of it
    "distopt/optim/new.py": {"import torch": True, "import torch.distributed as dist": False},
    "distopt/sam/new.py": {
        "from torch.distributed.tensor import DTensor": False,
        "from torch import distributed": False,
    },
    "distopt/optim/clip.py": {"import accelerate": False, "import hydra": False, "import deepspeed": False},
    "distopt/kernels/new.py": {"from accelerate import Accelerator": False, "from omegaconf import DictConfig": False},
    "distopt/layout/new.py": {"import torch.distributed as dist": True},
    "distopt/checkpoint/new.py": {"import torch.distributed as dist": True},
    "distopt/engine/new.py": {"import torch.distributed as dist": True, "from accelerate import Accelerator": True},
    "distopt/integrations/accelerate/new.py": {
        "import torch.distributed as dist": True,
        "from accelerate import Accelerator": True,
    },
    "distopt/job/new.py": {"from accelerate import Accelerator": True, "import hydra": True},
    "distopt/plan/new.py": {"import hydra": False},
    "distopt/train.py": {"from accelerate import Accelerator": False, "import hydra": False},
}


@pytest.mark.parametrize(
    ("file", "line", "allowed"), [(f, line, ok) for f, lines in ALLOWED.items() for line, ok in lines.items()]
)
def test_the_linter_keeps_the_import_direction(tmp_path: Path, file: str, line: str, allowed: bool) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    # Inside a function too: what is late is still a dependency.
    for text in (f"{line}\n", f"def f() -> None:\n    {line}\n"):
        path.write_text(text)
        command = [str(BIN / "ruff"), "check", "--no-cache", "--select", "TID251", "--output-format", "concise", file]
        checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (checked.returncode, "TID251" in checked.stdout) == (0 if allowed else 1, not allowed), checked
