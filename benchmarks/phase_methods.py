"""The models and the phases that `python -m benchmarks sam_phase` compares."""

from __future__ import annotations

import argparse
from typing import NamedTuple


class Size(NamedTuple):
    """A Llama over bytes, and how long it is trained.

    Attributes:
        layers, width, intermediate, heads, key_value_heads: The sizes of the model.
        lr: The learning rate of the pretraining, and the first one that a phase tries.
        steps, phase_steps, tuning_steps: The steps of the pretraining, of a phase, and of the fine-tuning.
        batch_size: Sequences in a step.
        sequence_length: Bytes in a sequence.
    """

    layers: int
    width: int
    intermediate: int
    heads: int
    key_value_heads: int
    lr: float
    steps: int
    phase_steps: int
    tuning_steps: int
    batch_size: int
    sequence_length: int

    def replaced(self, options: argparse.Namespace) -> Size:
        """Return the size with what the command line gives in place of its own."""
        names = ("steps", "phase_steps", "tuning_steps", "batch_size", "sequence_length")
        return self._replace(**{name: getattr(options, name) for name in names if getattr(options, name) is not None})

    def words(self, steps: int, lr: float) -> list[str]:
        """Return the words of a command that trains it for some steps."""
        config = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
        }
        run = {
            "train.steps": steps,
            "train.batch_size": self.batch_size,
            "train.sequence_length": self.sequence_length,
            "optimizer.lr": lr,
            "evaluation.every": steps,
            "evaluation.max_sequences": self.batch_size,  # the losses of the table are measured afterwards
        }
        model = [f"model.config.{name}={value}" for name, value in config.items()]
        return ["model=llama_tiny", *model, *(f"{name}={value}" for name, value in run.items())]

    def groups(self, lower: str = "") -> str:
        """Return the word that gives options to the embedding and the lower half of the blocks.

        They have param groups of their own in all runs, since a phase takes the optimizer state of the run before.
        """
        pattern = "|".join(["embed", *(rf"layers\.{layer}\." for layer in range(self.layers // 2))])
        return f"param_groups.overrides={{{pattern}: {{{lower}}}}}"


SIZES = {
    "0.4M": Size(4, 96, 256, 3, 1, 2e-3, 800, 80, 40, 8, 128),
    "4M": Size(5, 256, 704, 4, 4, 2e-3, 3000, 600, 200, 32, 256),
    "20M": Size(12, 384, 1024, 6, 6, 1e-3, 6000, 1000, 300, 64, 512),
    "60M": Size(12, 640, 1728, 10, 10, 7e-4, 12000, 2000, 300, 64, 512),
}


class Chosen(NamedTuple):
    """The options of a search.

    Attributes:
        tuning_lr: The learning rate of the fine-tuning.
        lr: The first learning rate of a phase, which falls to 0 on a line.
        rho: The radius of SAM.
        preconditioned_rho: The radius of PreconditionedSAM.
    """

    tuning_lr: float
    lr: float
    rho: float
    preconditioned_rho: float


class Method(NamedTuple):
    """A phase.

    Attributes:
        name: Its name on the command line.
        label: Its name in the table.
        sam: The choice of the group `sam`.
        radius: The name of its radius in `Chosen`; None for no SAM.
        factor: Its steps, in those of a phase.
        passes: The gradients that a step computes.
        upper: Whether only the last half of the blocks, and the norm after them, are perturbed.
    """

    name: str
    label: str
    sam: str = "off"
    radius: str | None = None
    factor: int = 1
    passes: int = 1
    upper: bool = False

    def words(self, chosen: Chosen, size: Size) -> list[str]:
        """Return the words of a command for the phase."""
        words = [f"sam={self.sam}", size.groups("sam_rho: 0" if self.upper else "")]
        return words if self.radius is None else [*words, f"sam.rho={getattr(chosen, self.radius):g}"]

    def option(self, chosen: Chosen) -> str:
        """Return what distinguishes it, for the name of a run."""
        return f"lr{chosen.lr:g}" + (f"-rho{getattr(chosen, self.radius):g}" if self.radius else "")


_METHODS = (
    Method("AdamW", "AdamW"),
    Method("AdamW-twice", "AdamW, twice the steps", factor=2),
    Method("SAM", "SAM", "on", "rho", passes=2),
    Method("SAM-upper", "SAM, last half of the blocks", "on", "rho", passes=2, upper=True),
    Method("PreconditionedSAM", "PreconditionedSAM", "preconditioned", "preconditioned_rho", passes=2),
)
METHODS = {method.name: method for method in _METHODS}
