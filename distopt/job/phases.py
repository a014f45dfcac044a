"""Phases: a run that starts from the weights and the optimizer state of another one (`train.init`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distopt import collective
from distopt.checkpoint import load_checkpoint, load_training_weights
from distopt.checkpoint.folder import newest_checkpoint, open_checkpoint, small_files
from distopt.job.records import RUN
from distopt.job.resume import Start, hyperparameters, keep_configured
from distopt.rng import current_gpu, random_state, set_random_state

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from distopt.job.components import Components
    from distopt.job.trainee import Trainee

# What a phase of another sequence length may change of a model; tensors of other shapes are refused all the same.
_LENGTH = re.compile(r"model\.config\.(max_position_embeddings|n_positions|n_ctx|(original_)?rope_\w+)")
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Init:
    """The checkpoint that a phase starts from.

    Attributes:
        given: `train.init` as it was given.
        start: The checkpoint.
        state: Whether its optimizer state is taken too.
    """

    given: str
    start: Start
    state: bool

    @classmethod
    def read(cls, given: str, state: bool, folder: Path) -> Init:
        """Reads the manifest of the checkpoint that `train.init` names.

        Args:
            given: The folder of a run, whose newest complete checkpoint it is, or of a checkpoint.
            state: Whether its optimizer state is taken too.
            folder: The folder of the new run.

        Raises:
            ValueError: If there is no such checkpoint, or it is of the new run itself, whose folder it would replace.
        """
        path = Path(given).expanduser()
        if not path.is_dir():
            raise ValueError(f"train.init={given}: no such folder; give the folder of a run, or of a checkpoint")
        try:
            start = Start.read(checkpoint := newest_checkpoint(path).resolve())
        except ValueError as error:
            raise ValueError(f"train.init={given}: {error}") from error
        if folder.resolve() in checkpoint.parents:
            raise ValueError(
                f"train.init={given} is a checkpoint of this run itself: give the phase another name, or resume by "
                "train.resume=auto"
            )
        return cls(given, start, state)

    def __str__(self) -> str:
        what = "weights and optimizer state" if self.state else "the weights"
        return f"starting with {what} of step {self.start.step} of {self.start.path}"

    def record(self) -> dict[str, Any]:
        """Returns what a run's folder and its checkpoints keep of its start, with that of the run it came from."""
        known = self.start.identity
        before = known.get("init")
        sizes = known.get("batch_size", 0) * known.get("sequence_length", 0)
        own = known.get("tokens", self.start.step * sizes)
        return {
            "given": self.given,
            "checkpoint": str(self.start.path),
            "step": self.start.step,
            "tokens": own + (before["tokens"] if before else 0),
            "state": self.state,
            "init": before,
        }

    def check_parts(self, parts: Components, optimizer: type) -> None:
        """Refuses what the manifest alone shows: first values that nothing would use, and another optimizer's state."""
        if parts.init is not None:
            raise ValueError(f"init={parts.init.name}: a phase has its weights from train.init; give init=family")
        before, now = self.start.identity.get("adapter"), parts.adapter and parts.adapter.describe()
        if before != now:
            raise ValueError(
                f"train.init={self.given} was trained with adapter {before}, now it is {now}: its full weights become "
                "a pretrained model by distopt export, for model.path"
            )
        saved = open_checkpoint(self.start.path)["optimizer"]
        if self.state and saved != optimizer.__name__:
            raise ValueError(
                f"train.init={self.given} has the state of {saved}, this run has {optimizer.__name__}: "
                "train.init_state=false takes the weights alone"
            )

    def check_model(self, architecture: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Refuses another model or tokenizer, whose tensors might have the same shapes.

        Args:
            architecture: That of the new run's model.
            files: The files of the new run's checkpoints.
        """
        for name, value in architecture.items() if self._told else ():
            if self.start.identity.get(name) != value and not _LENGTH.fullmatch(name):
                raise ValueError(
                    f"train.init={self.given} was trained with {name} {self.start.identity.get(name)}, now it is "
                    f"{value}: a phase continues the same model"
                )
        saved = small_files(self.start.path)
        if saved.get(_TOKENIZER) != files.get(_TOKENIZER):
            raise ValueError(
                f"train.init={self.given} was trained with another tokenizer: give data.tokenizer the one in "
                f"{self.start.path}"
            )

    def load(self, trainee: Trainee, model: Any) -> None:
        """Loads weights and state; hyper-parameters and random numbers stay those of this run."""
        configured, numbers = hyperparameters(trainee.optimizer), random_state(*current_gpu())
        try:
            if self.state:
                load_checkpoint(self.start.path, model, trainee.stepper, keep_groups=True)
            else:
                load_training_weights(self.start.path, model, trainee.stepper)
        except ValueError as error:
            remedy = "; train.init_state=false takes the weights alone" if self.state else ""
            raise ValueError(f"train.init: {error}{remedy}") from error
        set_random_state(numbers)
        keep_configured(trainee.optimizer, trainee.schedule, configured)
        for group in trainee.optimizer.param_groups:
            group.pop("sam_steps", None)  # SAM's schedule begins with the phase

    @property
    def _told(self) -> bool:
        return any(name.startswith("model.config.") for name in self.start.identity)


def find_init(options: DictConfig, folder: Path, start: Start | None) -> Init | None:
    """Finds the checkpoint that `train.init` means. Every process has to call it.

    Args:
        options: The section `train`.
        folder: The folder of the new run.
        start: The checkpoint that the run resumes from, which has all there is of an earlier init.

    Raises:
        ValueError: As `Init.read`; and for a run that is resumed with another `train.init` than it was started with.
    """
    given, state = options.get("init"), options.get("init_state", True)
    if start is None:
        return None if given is None else collective.on_first(lambda: Init.read(given, state, folder))
    before = start.identity.get("init")
    if given is not None and given != (before or {}).get("given"):
        was = f"train.init={before['given']}" if before else "no train.init"
        raise ValueError(
            f"{start.path} was started with {was}, now it is {given}: leave it out to resume, or start a new run, by "
            "train.resume=never and another name"
        )
    return None


def chain(folder: Path) -> list[dict[str, Any]]:
    """Returns the starts of a run and of the runs it came from, the last one first; nothing for a run from scratch.

    Each has `checkpoint`, `step`, `tokens` (of all phases up to there) and `state` (whether the optimizer's was taken).
    """
    file = folder / RUN
    record = json.loads(file.read_text()).get("init") if file.is_file() else None
    found = []
    while record:
        found.append({key: value for key, value in record.items() if key != "init"})
        record = record["init"]
    return found
