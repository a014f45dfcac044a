"""Layouts: which rank has which part of each layer, the only thing that an engine has to tell an optimizer."""

from distopt.layout.base import ShardLayout
from distopt.layout.blocks import blocks_shape, check_blocks, zeros_per
from distopt.layout.ddp import ddp_layout
from distopt.layout.deepspeed import deepspeed_layout
from distopt.layout.deepspeed_private import full_shape
from distopt.layout.fit import check_shape, fit
from distopt.layout.flat import FlatLayout
from distopt.layout.foreign import refuse_foreign, refuse_replaced
from distopt.layout.infer import infer_layout, layout_of
from distopt.layout.param_sync import ParamSync
from distopt.layout.places import Segment
from distopt.layout.tensors import local, local_parts, trained, wide, with_gradient
from distopt.layout.wrapped import unwrap_optimizer
from distopt.layout.zero1 import zero1_layout

__all__ = [
    "FlatLayout",
    "ParamSync",
    "Segment",
    "ShardLayout",
    "blocks_shape",
    "check_blocks",
    "check_shape",
    "ddp_layout",
    "deepspeed_layout",
    "fit",
    "full_shape",
    "infer_layout",
    "layout_of",
    "local",
    "local_parts",
    "refuse_foreign",
    "refuse_replaced",
    "trained",
    "unwrap_optimizer",
    "wide",
    "with_gradient",
    "zero1_layout",
    "zeros_per",
]
