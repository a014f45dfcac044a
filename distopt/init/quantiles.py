"""The distributions of first values, by their quantile functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The bounds of a truncated normal, in standard deviations of the normal that is cut, and the deviation that is left.
CUT = 2.0
_BELOW = 0.5 * math.erfc(CUT / math.sqrt(2.0))
_KEPT = math.sqrt(1.0 - 2.0 * CUT * math.exp(-0.5 * CUT * CUT) / math.sqrt(2.0 * math.pi) / (1.0 - 2.0 * _BELOW))


def standardized(distribution: str, u: Tensor) -> Tensor:
    """Returns numbers of mean 0 and variance 1 by the distribution's quantile function of uniform numbers.

    uniform             sqrt(3) * (2 u - 1)
    normal              z(u)                                   z: the quantile function of the normal
    truncated_normal    z(b + (1 - 2 b) u) / 0.8796...         b = P(Z < -2), 0.8796... its standard deviation
    """
    if distribution == "uniform":
        return u.mul_(2.0).sub_(1.0).mul_(math.sqrt(3.0))
    if distribution == "normal":
        return torch.special.ndtri(u)
    return torch.special.ndtri(u.mul_(1.0 - 2.0 * _BELOW).add_(_BELOW)).div_(_KEPT)
