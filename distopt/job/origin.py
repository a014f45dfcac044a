"""Where a run starts: at a checkpoint of its own, with the weights of another run, or with first values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from distopt.checkpoint import load_checkpoint
from distopt.data.batch_sizes import BatchSizes
from distopt.engine import Engine
from distopt.job.components import Components
from distopt.job.phases import Init, find_init
from distopt.job.resume import Start, find_start, hyperparameters, keep_configured
from distopt.job.run_lock import RunLock, claim
from distopt.job.terminal import Terminal
from distopt.job.trainee import Trainee
from distopt.models import pretrained

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a run starts.

    Attributes:
        start: The checkpoint that it resumes from, if any.
        init: The checkpoint of another run whose weights it takes, if any.
        lock: This job's claim to the run's folder, on the first process.
        notes: Lines for the user about earlier owners of the folder, and checkpoints that are passed over.
    """

    start: Start | None
    init: Init | None
    lock: RunLock | None
    notes: list[str]

    @classmethod
    def find(cls, options: DictConfig, folder: Path, parts: Components) -> Origin:
        """Claims a run's folder, and finds where the run starts; every process has to call it.

        Args:
            options: The section `train`.
            folder: The folder of the run.
            parts: Its components.

        Raises:
            ValueError: If another job holds the folder, or as `find_start`, `find_init` and `Init.check_parts`.
        """
        lock, restarted, taken = claim(folder)
        start, broken = find_start(folder / "checkpoints", options.resume, restarted)
        init = find_init(options, folder, start)
        if init:
            init.check_parts(parts, type(parts.probe()))
        return cls(start=start, init=init, lock=lock, notes=[*taken, *broken])

    @property
    def step(self) -> int:
        """The number of steps done."""
        return self.start.step if self.start else 0

    @property
    def checkpoint(self) -> Path | None:
        """The run's own checkpoint that it starts from."""
        return self.start.path if self.start else None

    def check(self, identity: dict[str, Any], steps: int | None) -> None:
        """As `Start.check`, if the run is resumed."""
        if self.start:
            self.start.check(identity, steps)

    def check_model(
        self, identity: dict[str, Any], steps: int, config: PretrainedConfig, files: dict[str, bytes]
    ) -> None:
        """Refuses another model than that of the checkpoint, before one is built.

        Args:
            identity: The identity of the run.
            steps: The total number of its steps.
            config: The configuration of its model.
            files: The files of its checkpoints.

        Raises:
            ValueError: As `Start.check` and `Init.check_model`.
        """
        if self.start:
            self.check(identity | self.start.architecture(config), steps)
        if self.init:
            self.init.check_model(pretrained.architecture(config), files)

    def load(self, trainee: Trainee, engine: Engine, terminal: Terminal) -> dict[str, Any]:
        """Loads the weights and the state, but for the hyper-parameters, which stay those of the configuration.

        Returns:
            What else the run's own checkpoint keeps; empty without one.
        """
        if loaded := self.start or (self.init and self.init.start):
            terminal.phase(f"loading {loaded.path.name}")
        model = engine.unwrap(trainee.model)
        saved: dict[str, Any] = {}
        if self.start:
            configured = hyperparameters(trainee.optimizer)
            saved = load_checkpoint(self.start.path, model, trainee.stepper, trainee.schedule)
            keep_configured(trainee.optimizer, trainee.schedule, configured)
        if self.init:
            self.init.load(trainee, model)
        return saved

    def record(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Returns what the run's checkpoints keep of `train.init`, given what `load` returned."""
        record = self.init.record() if self.init else saved.get("init")
        return {"init": record} if record else {}

    def told(self) -> list[str]:
        """Returns a line for the user, if the run does not start from first values."""
        if self.start:
            return [f"resuming after step {self.step} from {self.start.path}"]
        return [str(self.init)] if self.init else []


def identity_of(cfg: DictConfig, parts: Components, batches: BatchSizes) -> dict[str, Any]:
    """Returns what must not change when a run is resumed, as far as the configuration tells it.

    Args:
        cfg: The configuration.
        parts: Its components.
        batches: The number of sequences of each step.
    """
    return {
        "seed": cfg.seed,
        "sequence_length": cfg.train.sequence_length,
        "batch_size": cfg.train.batch_size,
        "batch_schedule": [list(change) for change in batches.changes[1:]] or None,
        "adapter": parts.adapter and parts.adapter.describe(),
        "frozen": parts.language_model.freeze or None,
    }
