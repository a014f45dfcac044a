"""Where each layer lives: the only thing an engine has to tell an optimizer."""

from distopt.layout.deepspeed import FlatLayout, deepspeed
from distopt.layout.scatter import zero1_scattered
from distopt.layout.shards import Segment, ShardLayout, local, of, trained
from distopt.layout.zero1 import zero1

__all__ = [
    "FlatLayout",
    "Segment",
    "ShardLayout",
    "deepspeed",
    "local",
    "of",
    "trained",
    "zero1",
    "zero1_scattered",
]
