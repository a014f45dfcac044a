"""Resuming: which checkpoint a run starts from, whether it may, and what the new configuration changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distopt import collective
from distopt.checkpoint import intact_checkpoint
from distopt.checkpoint.average import state_of_groups
from distopt.checkpoint.folder import open_checkpoint
from distopt.models import pretrained


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run resumes from, and what its manifest says of the run that saved it.

    Attributes:
        path: The checkpoint's folder.
        step: The number of steps done when it was saved.
        identity: What must be equal for a run to continue it: seed, sizes, the digest of the data, the adapter and the
            architecture of the model.
    """

    path: Path
    step: int
    identity: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Start:
        """Reads the manifest of a checkpoint, without its tensors; raises ValueError if it is not complete."""
        identity = dict(open_checkpoint(path)["extra"])
        if "step" not in identity:
            raise ValueError(f"{path} was not saved by distopt.train: its manifest has no step")
        return cls(path, identity.pop("step"), identity | pretrained.saved_architecture(path))

    def check(self, run: dict[str, Any], steps: int | None) -> None:
        """Refuses a run that does not continue the saved one.

        Args:
            run: The identity of the new run, or a part of it.
            steps: The total number of steps of the new run; None if it is not known yet.

        Raises:
            ValueError: If a value differs, so that other batches would follow or another model, or if the checkpoint is
                beyond the last step.
        """
        for name, value in run.items():
            if self.identity.get(name) != value:
                raise ValueError(
                    f"{self.path} was trained with {name} {self.identity.get(name)}, now it is {value}: "
                    "start a new run, by train.resume=never and another name"
                )
        if steps is not None and self.step > steps:
            raise ValueError(
                f"{self.path} is already at step {self.step} of {steps}: raise train.steps or train.epochs"
            )

    def architecture(self, config: Any) -> dict[str, Any]:
        """The part of a run's identity that its model's configuration determines, where the checkpoint tells it."""
        told = any(name.startswith("model.config.") for name in self.identity)
        return pretrained.architecture(config) if told else {}


def find_start(folder: Path, resume: str, restarted: bool = False) -> tuple[Start | None, list[str]]:
    """Finds the checkpoint that `train.resume` means. Every process has to call it.

    Args:
        folder: The folder of this run's checkpoints.
        resume: `never`, `auto` (the newest intact checkpoint of this run, if there is one) or a checkpoint's folder.
        restarted: Whether the launcher has restarted this run, which then resumes from its newest intact checkpoint,
            and starts as `resume` says if it has none.

    Returns:
        The start, None for step 0, and a line about each broken or damaged checkpoint that is passed over for it.

    Raises:
        ValueError: If there is no such folder, it is no complete checkpoint, or it is not the newest of its own run.
    """
    if resume == "never" and not restarted:
        return None, []
    newest, broken = intact_checkpoint(folder)
    if resume == "auto" or (restarted and newest is not None):
        name = newest.name if newest is not None else "the start"
        notes = [f"{line}; resuming from {name}" for line in broken]
        return (None if newest is None else collective.on_first(lambda: Start.read(newest))), notes
    if resume == "never":
        return None, []
    return collective.on_first(lambda: _named(folder, resume, newest, broken)), []


def _named(folder: Path, resume: str, newest: Path | None, broken: list[str]) -> Start:
    """Reads the checkpoint whose folder is given; `broken` are lines on those that cannot be resumed from."""
    path = Path(resume).expanduser()
    if not path.is_dir():
        raise ValueError(f"train.resume={resume}: no such folder; give never, auto, or a checkpoint's folder")
    ours = path.resolve().parent == folder.resolve()
    if ours and (lines := [line for line in broken if line.startswith(f"{path.resolve().name}: ")]):
        instead = f"auto resumes from {newest.name}" if newest is not None else "auto begins anew"
        raise ValueError(f"train.resume={resume}: {lines[0]}; {instead}")
    if ours and newest is not None and path.resolve() != newest.resolve():
        # The newer ones would stay, to be taken for this run's own by train.resume=auto and by pruning.
        raise ValueError(
            f"train.resume={resume} is not the newest complete checkpoint of its run, {newest.name} is: "
            "give auto to resume from that one, or another name to resume from this one"
        )
    try:
        return Start.read(path)
    except ValueError as error:
        raise ValueError(f"train.resume={resume}: {error}") from error


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """A copy of every param group without its parameters and what is state in it."""
    state = ("params", *state_of_groups(optimizer))
    return [{name: value for name, value in group.items() if name not in state} for group in optimizer.param_groups]


def keep_configured(optimizer: Optimizer, schedule: LambdaLR, configured: list[dict[str, Any]]) -> None:
    """Restores the hyper-parameters of this run's configuration, which loading a checkpoint has replaced.

    So a run that diverged can resume with a lower lr, and a longer run follows the longer schedule from its first step.

    Args:
        optimizer: The optimizer, after `load_checkpoint`.
        schedule: Its schedule, after `load_checkpoint`.
        configured: `hyperparameters` before `load_checkpoint`, with each group's `initial_lr`.
    """
    for group, options in zip(optimizer.param_groups, configured):
        group.update(options)
    schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas):
        group["lr"] = base * factor(schedule.last_epoch)
