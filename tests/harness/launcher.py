"""A program that knows nothing of distopt, swept by hydra/launcher=accelerate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.harness import jobs

# Anybody's program. What it does is in its configuration; every process leaves a note of what it saw.
SCRIPT = """
import json, os, signal, time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base=VERSION_BASE, config_path=CONFIG_PATH, config_name="config")
def main(cfg):
    rank, folder = os.environ.get("RANK", "0"), Path(HydraConfig.get().runtime.output_dir)
    names = ("WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "MASTER_PORT", "HYDRA_LAUNCHER_RESUME", "MINE")
    note = {"pid": os.getpid(), "cwd": os.getcwd(), "word": cfg.word, "job": HydraConfig.get().job.num}
    (folder / f"rank-{rank}.json").write_text(json.dumps(note | {name: os.environ.get(name) for name in names}))
    if cfg.do == "sleep":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if cfg.do == "leave":
        os._exit(0)
    if cfg.x == 2 and os.environ.get("HYDRA_LAUNCHER_RESUME") != "auto":
        raise ValueError("two is not allowed")
    return float(cfg.x) ** 2 + 100 * int(rank)

if __name__ == "__main__":
    main()
"""
CONFIG = "x: 0\ndo: square\nword: from the file\nhydra: {sweep: {dir: out}}\n"
SWEEP = ["-m", "hydra/launcher=accelerate"]


def written(folder: Path, version_base: str = "1.3", config: str = "conf") -> list[str]:
    """The command of a script in a folder, with its configuration next to it."""
    text = SCRIPT.replace("VERSION_BASE", repr(version_base)).replace("CONFIG_PATH", repr(config))
    (folder / "script.py").write_text(text)
    (folder / "conf").mkdir()
    (folder / "conf" / "config.yaml").write_text(CONFIG)
    return [sys.executable, str(folder / "script.py")]


def notes(job: Path) -> list[dict[str, Any]]:
    """The records of the processes of a job, by rank."""
    return [json.loads(file.read_text()) for file in sorted(job.glob("rank-*.json"))]


def sweep(cwd: Path, command: list[str], *words: str, seconds: float = 100.0) -> jobs.Ended:
    return jobs.launch(cwd, [*SWEEP, *words], command, seconds)
