"""The gradient noise scale of a training job: `train.noise_scale`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distopt.health.noise_scale import NoiseScale
from distopt.job.config import Config, named

if TYPE_CHECKING:
    from distopt.job.components import Components
    from distopt.job.job import Job


def check_noise_scale(cfg: Config, parts: Components, passed: int) -> None:
    """Refuses the noise scale where no gradient of a part of a step's batch can be measured.

    Args:
        cfg: The configuration.
        parts: Its components.
        passed: The number of sequences in one forward pass of all processes.

    Raises:
        ValueError: With the key at fault and the remedy.
    """
    if cfg.train.get("noise_scale") is None:
        return
    with named("engine"):
        parts.engine.check_noise_scale()
    if parts.make_sam or parts.forward_only:
        raise ValueError(
            "train.noise_scale compares gradients of the same weights, and SAM steps with those of others, MeZO with "
            "none: give null, or sam=off and another optimizer"
        )
    if passed == cfg.train.batch_size:
        raise ValueError(
            f"train.noise_scale compares a micro-batch with the batch, and a step has only one of {passed} sequences: "
            "give a smaller train.micro_batch_size"
        )


class Noise:
    """Measures a job's noise scale from norms that its steps have anyway, without a collective of its own.

    The small batch is the first micro-batch: of one process before gradients are exchanged (DDP, ZeRO-1), or of all of
    them (FSDP2).

    Args:
        job: The job.
        decay: Decay rate of the means.
        saved: The means in the checkpoint that the job resumes from, if there are any.

    Attributes:
        scale: The means.
    """

    def __init__(self, job: Job, decay: float, saved: Mapping[str, Any] | None) -> None:
        self.scale, self._sizes = NoiseScale(decay), job.sequences.sizes
        self._small = job.micro_batch * job.engine.small_batches(job.accelerator.num_processes)
        self._length = job.cfg.train.sequence_length
        self._large = (math.nan, 0)
        if saved is not None:
            self.scale.load_state_dict(saved)

    def measured(self, norm: float, done: int) -> None:
        """Takes the norm of the gradient of the last step, given the number of steps done."""
        self._large = norm, self._sizes.size(done - 1)

    def row(self, small_square: float = math.nan) -> dict[str, float]:
        """Returns what to log of the last step, given |g|^2 of its small batch."""
        norm, large = self._large
        if math.isfinite(norm) and math.isfinite(small_square) and large > self._small:
            self.scale.update(small_square, self._small, norm**2, large)
        if (value := self.scale.value) is None:
            return {}
        return {"noise_scale": value, "critical_batch_tokens": value * self._length}
