"""The initialisations by name: a distribution, and its standard deviation as gain / sqrt(fan) or as a number.

| scheme | distribution | standard deviation of a matrix | reference |
|---|---|---|---|
| `xavier_uniform`, `xavier_normal` | uniform, normal | 1 / sqrt((fan_in + fan_out) / 2) | Glorot, Bengio, 2010 |
| `he_uniform`, `he_normal` | uniform, normal | sqrt(2) / sqrt(fan_in) | He et al., 2015, arXiv 1502.01852 |
| `truncated_normal` | normal, cut at 2 deviations | 1 / sqrt(fan_in) | LeCun et al., 1998 |
| `gpt2` | normal | 0.02; into the residual stream 0.02 / sqrt(2 * blocks) | Radford et al., 2019 |
| `orthogonal` | uniform over orthogonal matrices | (gain 1) | Saxe et al., 2013, arXiv 1312.6120 |
| `mup` | normal | 0.02 in the base model, then as `distopt.init.width` | Yang et al., 2022, arXiv 2203.03466 |

The deviation is the one that the numbers have: that of the normal which is cut is larger by 1 / 0.8796, and a uniform
distribution reaches to sqrt(3) deviations.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from distopt.bounds.init import NAMES

# The names that projections into the residual stream have in transformers and in torch.
RESIDUAL = r"(c_proj|o_proj|out_proj|down_proj|attention\.dense|dense_4h_to_h|fc2|linear2)\.weight$"


class Scheme(NamedTuple):
    """A named initialisation: the distribution, and the standard deviation as gain / sqrt(fan), or as a number."""

    distribution: str
    fan: str | None = None
    gain: float | None = None
    std: float | None = None
    residual: bool = False


SCHEMES = {
    "xavier_uniform": Scheme("uniform", "avg", 1.0),
    "xavier_normal": Scheme("normal", "avg", 1.0),
    "he_uniform": Scheme("uniform", "in", math.sqrt(2.0)),
    "he_normal": Scheme("normal", "in", math.sqrt(2.0)),
    "truncated_normal": Scheme("truncated_normal", "in", 1.0),
    "orthogonal": Scheme("orthogonal", None, 1.0),
    "gpt2": Scheme("normal", std=0.02, residual=True),
    "mup": Scheme("normal", std=0.02),
}
assert tuple(SCHEMES) == NAMES
