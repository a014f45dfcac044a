"""Where each layer lives: the only thing an engine has to tell an optimizer."""

from distopt.layout.base import Segment, ShardLayout, local, of, trained, wide, with_gradient
from distopt.layout.deepspeed import FlatLayout, deepspeed
from distopt.layout.fit import check_shape, fit
from distopt.layout.foreign import refuse_foreign
from distopt.layout.zero1 import zero1
from distopt.layout.zero1_reduce_scatter import zero1_scattered

__all__ = [
    "FlatLayout",
    "Segment",
    "ShardLayout",
    "check_shape",
    "deepspeed",
    "fit",
    "local",
    "of",
    "refuse_foreign",
    "trained",
    "wide",
    "with_gradient",
    "zero1",
    "zero1_scattered",
]
