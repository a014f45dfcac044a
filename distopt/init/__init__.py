"""First values of a model's weights: each element is a function of seed, name and index, so sharding changes none."""

from distopt.init.initialization import Initialization, initialize
from distopt.init.width import Width, base_shapes, widths

__all__ = ["Initialization", "Width", "base_shapes", "initialize", "widths"]
