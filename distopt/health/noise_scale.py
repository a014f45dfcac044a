"""The gradient noise scale: how large a batch has to be before its gradient is mostly signal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distopt.bounds.health import NOISE_DECAY


class NoiseScale:
    r"""The gradient noise scale of a training, from the gradient norms of a small and of a large batch of each step.

        |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b)                 unbiased, of the gradient over all data
        tr S  = (|g_b|^2 - |g_B|^2) / (1 / b - 1 / B)             unbiased, of the covariance of a sequence's gradient
        noise scale = mean(tr S) / mean(|G|^2)                    exponential means over the steps

    for batches of b < B sequences, of which the small one may be a part of the large one. Averages of a quotient would
    be biased, so the two are averaged each for itself. A batch of as many sequences is critical: a larger one saves few
    steps, a smaller one few tokens. It is measured of plain gradients: preconditioned optimizers differ by a factor.

    Args:
        decay: Decay rate of the means, in [0, 1), corrected for their start.

    Attributes:
        steps: The number of steps measured.

    Reference: McCandlish, Kaplan, Amodei et al., An Empirical Model of Large-Batch Training, 2018, arXiv 1812.06162,
    appendix A.1.
    """

    def __init__(self, decay: float = 0.99) -> None:
        NOISE_DECAY.check("decay", decay)
        self.decay = decay
        self.steps, self._signal, self._noise = 0, 0.0, 0.0

    def update(self, small_square: float, small: int, large_square: float, large: int) -> None:
        """Takes the norms of a step.

        Args:
            small_square: |g_b|^2; the mean over several small batches of a step is more accurate.
            small: b, in sequences.
            large_square: |g_B|^2.
            large: B > b.
        """
        signal = (large * large_square - small * small_square) / (large - small)
        noise = (small_square - large_square) / (1.0 / small - 1.0 / large)
        self.steps += 1
        self._signal = self.decay * self._signal + (1.0 - self.decay) * signal
        self._noise = self.decay * self._noise + (1.0 - self.decay) * noise

    @property
    def value(self) -> float | None:
        """The noise scale in sequences, the critical batch size; None where the noise still hides the gradient."""
        return self._noise / self._signal if self._signal > 0.0 and self._noise > 0.0 else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the means, for JSON."""
        return {"steps": self.steps, "signal": self._signal, "noise": self._noise}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned."""
        self.steps, self._signal, self._noise = state["steps"], state["signal"], state["noise"]
