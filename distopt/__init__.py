"""Optimizers whose update is exactly the unsharded one, however parameters, gradients and state are sharded."""

import importlib
from typing import TYPE_CHECKING, Any

from distopt import layout
from distopt.optim import (
    ADOPT,
    LAMB,
    LARS,
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AdamWScheduleFree,
    AdEMAMix,
    DAdaptAdam,
    DAdaptSGD,
    Lion,
    Muon,
    Prodigy,
    RMSprop,
    SGDScheduleFree,
)
from distopt.optim.base import ShardedOptimizer
from distopt.optim.clip import Clip, clip_grad_norm_, grad_norms
from distopt.optim.param_groups import param_groups
from distopt.optim.schedules import (
    warmup_constant,
    warmup_cosine,
    warmup_inverse_sqrt,
    warmup_linear,
    warmup_stable_decay,
)
from distopt.proof import Fingerprint, fingerprint, prove, prove_every
from distopt.sam import ASAM, AWP, GSAM, SAM, FriendlySAM, FunctionalSAM, LookSAM, MomentumSAM, PreconditionedSAM
from distopt.version import __version__ as __version__

if TYPE_CHECKING:
    from distopt import health
    from distopt.checkpoint import async_save_checkpoint, load_checkpoint, save_checkpoint
    from distopt.engine.mezo import MeZO
    from distopt.init import base_shapes, initialize
    from distopt.integrations.accelerate.attach import attach
    from distopt.optim.lr_range import LRRange, lr_range_test

__all__ = [
    "ADOPT",
    "ASAM",
    "AWP",
    "GSAM",
    "LAMB",
    "LARS",
    "SAM",
    "SGD",
    "AdEMAMix",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "AdamWScheduleFree",
    "Clip",
    "DAdaptAdam",
    "DAdaptSGD",
    "Fingerprint",
    "FriendlySAM",
    "FunctionalSAM",
    "LRRange",
    "Lion",
    "LookSAM",
    "MeZO",
    "MomentumSAM",
    "Muon",
    "PreconditionedSAM",
    "Prodigy",
    "RMSprop",
    "SGDScheduleFree",
    "ShardedOptimizer",
    "async_save_checkpoint",
    "attach",
    "base_shapes",
    "clip_grad_norm_",
    "fingerprint",
    "grad_norms",
    "health",
    "initialize",
    "layout",
    "load_checkpoint",
    "lr_range_test",
    "param_groups",
    "prove",
    "prove_every",
    "save_checkpoint",
    "warmup_constant",
    "warmup_cosine",
    "warmup_inverse_sqrt",
    "warmup_linear",
    "warmup_stable_decay",
]

# What no optimizer needs is imported when it is first used: it takes longer than all the rest.
_LATER = {
    "LRRange": "distopt.optim.lr_range",
    "MeZO": "distopt.engine.mezo",
    "async_save_checkpoint": "distopt.checkpoint",
    "attach": "distopt.integrations.accelerate.attach",
    "base_shapes": "distopt.init",
    "initialize": "distopt.init",
    "load_checkpoint": "distopt.checkpoint",
    "lr_range_test": "distopt.optim.lr_range",
    "save_checkpoint": "distopt.checkpoint",
}

if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        if name == "health":  # a module, which becomes an attribute of this one by its import
            return importlib.import_module("distopt.health")
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER, "health"})
