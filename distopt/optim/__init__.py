"""The optimizers, one file for each update rule, and what a new rule needs: `ShardedOptimizer`, `Rule` and `Shards`."""

from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.optim.adafactor import Adafactor
from distopt.optim.adagrad import Adagrad
from distopt.optim.adam import Adam, AdamW
from distopt.optim.ademamix import AdEMAMix
from distopt.optim.adopt import ADOPT
from distopt.optim.base import ShardedOptimizer
from distopt.optim.dadaptation import DAdaptAdam
from distopt.optim.dadaptation_sgd import DAdaptSGD
from distopt.optim.lamb import LAMB
from distopt.optim.lars import LARS
from distopt.optim.lion import Lion
from distopt.optim.muon import Muon
from distopt.optim.prodigy import Prodigy
from distopt.optim.rmsprop import RMSprop
from distopt.optim.schedule_free import AdamWScheduleFree, SGDScheduleFree
from distopt.optim.sgd import SGD

__all__ = [
    "ADOPT",
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "DAdaptAdam",
    "DAdaptSGD",
    "Lion",
    "Muon",
    "Prodigy",
    "RMSprop",
    "Rule",
    "SGDScheduleFree",
    "ShardedOptimizer",
    "Shards",
]
