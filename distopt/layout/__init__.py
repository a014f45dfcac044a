"""Where each layer lives: the only thing an engine has to tell an optimizer."""

from distopt.layout.base import Segment, ShardLayout, local, trained, wide, with_gradient
from distopt.layout.deepspeed import FlatLayout, deepspeed_layout
from distopt.layout.fit import check_shape, fit
from distopt.layout.foreign import refuse_foreign
from distopt.layout.infer import infer_layout, layout_of
from distopt.layout.zero1 import zero1_layout

__all__ = [
    "FlatLayout",
    "Segment",
    "ShardLayout",
    "check_shape",
    "deepspeed_layout",
    "fit",
    "infer_layout",
    "layout_of",
    "local",
    "refuse_foreign",
    "trained",
    "wide",
    "with_gradient",
    "zero1_layout",
]
