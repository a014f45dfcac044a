"""The flatness of a minimum: worst and noisy losses, Hessian eigenvalues and trace, and landscapes, on shards too."""

import importlib
from typing import TYPE_CHECKING, Any

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

# Imported when they are first used: `python -m distopt.sharpness --help` needs no torch.
_NAMES = {
    "ball": "WorstLoss worst_loss",
    "directions": "filter_normalised gaussian rademacher",
    "hessian": "Eigenvalues eigenvalues trace",
    "landscape": "line plane",
    "mean": "Mean",
    "noise": "noisy_loss",
    "objective": "Objective",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        return value
