"""The flatness of a minimum: worst and noisy losses, Hessian eigenvalues and trace, and landscapes, on shards too."""

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
