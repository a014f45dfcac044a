"""`import distopt` needs torch alone and takes next to no time; imports between folders run downwards only."""

from __future__ import annotations

import ast
import graphlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import distopt
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
import gc, json, sys, time, torch
gc.disable()  # a collection of all that torch has made takes as long, wherever it falls
before = set(sys.modules)
start = time.process_time()
import distopt
distopt.AdamW
distopt.SAM
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, list[str]]]:
    """The CPU seconds that `import distopt` adds to `import torch`, and the modules, in each of three processes."""
    folder = tmp_path_factory.mktemp("probe")
    command, env = [sys.executable, "-W", "error", "-c", PROBE], {**os.environ, **ENVIRONMENT}
    return [
        tuple(
            json.loads(subprocess.run(command, cwd=folder, env=env, capture_output=True, check=True, timeout=60).stdout)
        )
        for _ in range(3)
    ]


def test_torch_alone(probes: list[tuple[float, list[str]]]) -> None:
    """In addition to what torch imports: our own modules, and small ones of torch and of the standard library."""
    for _, added in probes:
        assert "distopt.optim.base" in added
        assert [name for name in added if name in OTHERS or name.partition(".")[0] in OTHERS] == []
        foreign = {name.partition(".")[0] for name in added} - {"distopt", "torch", *sys.stdlib_module_names}
        assert foreign == set()


def test_next_to_no_time(probes: list[tuple[float, list[str]]]) -> None:
    """A tenth of a second and some; and without what no optimizer needs, which takes as long again."""
    assert statistics.median(seconds for seconds, _ in probes) < 0.6  # three times that of a quiet machine
    for _, added in probes:
        folders = {name.split(".")[1] for name in added if name.startswith("distopt.")}
        assert folders.isdisjoint({"checkpoint", "data", "engine", "health", "integrations", "job", "models"})


def test_every_public_name_is_found_when_it_is_used() -> None:
    for name in distopt.__all__:
        assert name in dir(distopt) and getattr(distopt, name) is getattr(distopt, name)
    with pytest.raises(AttributeError, match="module 'distopt' has no attribute 'Adamw'"):
        distopt.Adamw  # type: ignore[attr-defined]  # noqa: B018


ALLOWED: dict[str, dict[str, bool]] = {  # whether a line is allowed in a file
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
    # An import inside a function is a dependency as well.
    for text in (f"{line}\n", f"def f() -> None:\n    {line}\n"):
        path.write_text(text)
        command = [str(BIN / "ruff"), "check", "--no-cache", "--select", "TID251", "--output-format", "concise", file]
        checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (checked.returncode, "TID251" in checked.stdout) == (0 if allowed else 1, not allowed), checked


def test_the_linter_s_exceptions_are_folders() -> None:
    """At most eight of them, and two files at the top level."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        ignores = tomllib.load(file)["tool"]["ruff"]["lint"]["per-file-ignores"]
    exceptions = {pattern for pattern, rules in ignores.items() if "TID251" in rules} - {"!distopt/**"}
    folders = {pattern for pattern in exceptions if pattern.endswith("/**")}
    assert len(folders) <= 8
    assert exceptions - folders <= {"distopt/collective.py", "distopt/train.py"}
    for pattern in exceptions:
        assert (ROOT / pattern.removesuffix("/**")).exists(), f"{pattern} excepts nothing"


# The folders of the package, and the modules at its top level, from the bottom to the top. A module imports from lower
# levels and from its own folder. CONTRIBUTING.md shows the same levels.
LEVELS = (
    {"bounds", "counter", "failures", "lazy", "rng", "version"},
    {"collective"},
    {"kernels"},
    {"layout"},
    {"proof"},
    {"init"},
    {"optim"},
    {"sam"},
    {"checkpoint", "data", "health"},
    {"models"},
    {"engine"},
    {"job"},
    {"integrations", "plan", "report", "robustness", "sharpness"},
    {"command", "train", "export", "jacobian", "prepare", "sample", "verify"},
    {"distopt", "__main__"},  # its __init__.py, which has the public names, and `python -m distopt`
)
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}


def import_graph(package: Path) -> dict[tuple[str, str], list[str]]:
    """Imports between the folders of a package: `file:line` of each, by (importing folder, imported folder).

    Imports inside functions and under TYPE_CHECKING count. The launcher plugin, a package of its own, is left out.
    """
    files = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] != "plugin"
    }
    graph: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                parent = module.split(".")[: len(module.split(".")) - node.level + (path.name == "__init__.py")]
                base = ".".join([*(parent if node.level else ()), *filter(None, [node.module])])
                imported = [f"{base}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            for name in imported:
                if name.partition(".")[0] != package.name:
                    continue
                while name not in files:  # a name in a module
                    name = name.rpartition(".")[0]
                source, target = _folder(module), _folder(name)
                if source != target:
                    graph[source, target].append(f"{path.relative_to(package.parent)}:{node.lineno}")
    return graph


def _folder(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def circle(graph: dict[tuple[str, str], list[str]]) -> list[str]:
    """The folders of one circle of imports, or none."""
    imports: dict[str, set[str]] = defaultdict(set)
    for source, target in graph:
        imports[source].add(target)
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def upward(graph: dict[tuple[str, str], list[str]]) -> dict[str, list[str]]:
    """The imports from a folder of the same or a higher level, with their places."""
    return {
        f"{source} -> {target}": places for (source, target), places in graph.items() if LEVEL[source] <= LEVEL[target]
    }


def test_imports_between_folders_run_downwards() -> None:
    graph = import_graph(ROOT / "distopt")
    assert len(graph) > 20
    assert {folder for arrow in graph for folder in arrow} <= {*LEVEL}, "a new folder belongs into LEVELS"
    assert circle(graph) == []
    assert upward(graph) == {}


@pytest.mark.parametrize(
    "line",
    [
        "from distopt.train import main",
        "from distopt import job",
        "import distopt.job.config",
        "import distopt",
        "from ..job.config import CONF",
        "if TYPE_CHECKING:\n    from distopt.engine import Engine",
        "def late():\n    from distopt.checkpoint import save_checkpoint",
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, line: str) -> None:
    package = tmp_path / "distopt"
    shutil.copytree(ROOT / "distopt", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "sam" / "planted.py").write_text(f"{line}\n")
    found = upward(import_graph(package))
    assert [places for places in found.values() if "planted.py" in str(places)] and len(found) == 1


def test_a_circle_of_folders_is_found(tmp_path: Path) -> None:
    package = tmp_path / "distopt"
    for path, line in {"layout/a.py": "from distopt.optim import b", "optim/b.py": "import distopt.layout.a"}.items():
        (package / path).parent.mkdir(parents=True)
        (package / path).write_text(line)
    assert {*circle(import_graph(package))} == {"layout", "optim"}


def test_contributing_shows_these_levels() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shown = text.partition("<!-- levels -->")[2].partition("<!-- /levels -->")[0]
    lines = [line.split("#")[0].replace(",", " ").split() for line in shown.splitlines() if line.startswith("    ")]
    assert [{*words} for words in reversed(lines)] == [*LEVELS]
