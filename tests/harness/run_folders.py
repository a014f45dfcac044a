"""Folders of runs as the training job writes them, with chosen metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ABOUT = {
    "model": "gpt2",
    "parameters": 12345,
    "data": "text: book.txt (1 files)",
    "tokenizer": "bytes",
    "digest": "abc",
    "device": "CPU",
    "processes": 2,
    "version": "0.1.0",
    "commit": "0123456789",
    "began": "2026-01-02T03:04:05+00:00",
}


def write_run(
    folder: Path,
    optimizer: str = "adamw",
    lr: float = 0.1,
    seed: int = 0,
    final: float = 2.0,
    *,
    steps: int = 3,
    skipped: int = 0,
    config: dict[str, Any] | None = None,
    about: dict[str, Any] | None = None,
) -> Path:
    """A run of so many steps, of 10 tokens in a tenth of a second each; a final loss that is not finite ends it."""
    folder.mkdir(parents=True)
    values = {"seed": seed, "optimizer": {"_target_": optimizer, "lr": lr}, "train": {"steps": 3}, **(config or {})}
    (folder / "config.yaml").write_text(json.dumps(values))
    told = {"command": "distopt train", "choices": {"optimizer": optimizer}, **(ABOUT if about is None else about)}
    (folder / "run.json").write_text(json.dumps(told))
    rows: list[dict[str, Any]] = [{"step": 0, "validation_loss": 6.0, "bits_per_byte": 8.0}]
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 6.0 - step, "lr": lr, "grad_norm": step / 2, "tokens": 10 * step}
        rows.append({**row, "tokens_per_second": 100.0, "skipped": skipped})
    if math.isfinite(final):
        rows.append({"step": steps, "validation_loss": final, "bits_per_byte": 2 * final})
    else:
        rows[-1]["grad_norm"] = final
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(
        folder / "layers.jsonl",
        [{"step": 1, "grad_norm": {"a": lr, "b": final}}, {"step": 3, "grad_norm": {"a": 2 * lr}}],
    )
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
