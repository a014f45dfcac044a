"""Optimizers whose update is exactly the unsharded one, however parameters, gradients and state are sharded."""

import importlib
from typing import TYPE_CHECKING, Any

from distopt.version import __version__ as __version__

if TYPE_CHECKING:
    from distopt import health, layout
    from distopt.checkpoint import async_save_checkpoint, load_checkpoint, save_checkpoint
    from distopt.engine.mezo import MeZO
    from distopt.init import base_shapes, initialize
    from distopt.integrations.accelerate.attach import attach
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
    from distopt.optim.averaged import averaged
    from distopt.optim.base import ShardedOptimizer
    from distopt.optim.clip import Clip, clip_grad_norm_, grad_norms
    from distopt.optim.lr_range import LRRange, lr_range_test
    from distopt.optim.param_groups import param_groups
    from distopt.optim.schedules import (
        warmup_constant,
        warmup_cosine,
        warmup_inverse_sqrt,
        warmup_linear,
        warmup_stable_decay,
    )
    from distopt.optim.weight_average import EMA, LAWA
    from distopt.proof import Fingerprint, fingerprint, prove, prove_every
    from distopt.sam import ASAM, AWP, GSAM, SAM, FriendlySAM, FunctionalSAM, LookSAM, MomentumSAM, PreconditionedSAM

__all__ = [
    "ADOPT",
    "ASAM",
    "AWP",
    "EMA",
    "GSAM",
    "LAMB",
    "LARS",
    "LAWA",
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
    "averaged",
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

# A name is imported when it is first used: `distopt --help` needs no torch, and an optimizer no checkpoints.
_OPTIMIZERS = (
    "ADOPT LAMB LARS SGD Adafactor Adagrad Adam AdamW AdamWScheduleFree AdEMAMix DAdaptAdam DAdaptSGD Lion Muon "
    "Prodigy RMSprop SGDScheduleFree"
)
_NAMES = {
    "distopt.checkpoint": "async_save_checkpoint load_checkpoint save_checkpoint",
    "distopt.engine.mezo": "MeZO",
    "distopt.init": "base_shapes initialize",
    "distopt.integrations.accelerate.attach": "attach",
    "distopt.optim": _OPTIMIZERS,
    "distopt.optim.averaged": "averaged",
    "distopt.optim.base": "ShardedOptimizer",
    "distopt.optim.clip": "Clip clip_grad_norm_ grad_norms",
    "distopt.optim.lr_range": "LRRange lr_range_test",
    "distopt.optim.param_groups": "param_groups",
    "distopt.optim.schedules": ("warmup_constant warmup_cosine warmup_inverse_sqrt warmup_linear warmup_stable_decay"),
    "distopt.optim.weight_average": "EMA LAWA",
    "distopt.proof": "Fingerprint fingerprint prove prove_every",
    "distopt.sam": "ASAM AWP GSAM SAM FriendlySAM FunctionalSAM LookSAM MomentumSAM PreconditionedSAM",
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names.split()}
_MODULES = ("checkpoint", "health", "layout", "optim", "proof", "sam")

if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> Any:
        if name in _MODULES:  # it becomes an attribute of this module by its import
            return importlib.import_module(f"distopt.{name}")
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULE_OF, *_MODULES})
