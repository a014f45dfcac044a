"""The flatness of a minimum: worst and noisy losses, Hessian eigenvalues and trace, and landscapes, on shards too."""

from typing import TYPE_CHECKING

from distopt.lazy import lazy

if TYPE_CHECKING:
    from distopt.sharpness.ball import WorstLoss, worst_loss
    from distopt.sharpness.directions import filter_normalised, gaussian, rademacher
    from distopt.sharpness.hessian import Eigenvalues, eigenvalues, trace
    from distopt.sharpness.landscape import line, plane
    from distopt.sharpness.mean import Mean
    from distopt.sharpness.noise import noisy_loss
    from distopt.sharpness.objective import Objective

__all__ = [
    "Eigenvalues",
    "Mean",
    "Objective",
    "WorstLoss",
    "eigenvalues",
    "filter_normalised",
    "gaussian",
    "line",
    "noisy_loss",
    "plane",
    "rademacher",
    "trace",
    "worst_loss",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    _NAMES = {
        "ball": "WorstLoss worst_loss",
        "directions": "filter_normalised gaussian rademacher",
        "hessian": "Eigenvalues eigenvalues trace",
        "landscape": "line plane",
        "mean": "Mean",
        "noise": "noisy_loss",
        "objective": "Objective",
    }
    __getattr__, __dir__ = lazy(__name__, _NAMES)
