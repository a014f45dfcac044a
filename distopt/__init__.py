"""Optimizers whose update is exactly the unsharded one, however parameters, gradients and state are sharded."""

from typing import TYPE_CHECKING

from distopt.lazy import lazy
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

if not TYPE_CHECKING:  # a type checker would take any name for one of this module
    _NAMES = {
        "checkpoint": "async_save_checkpoint load_checkpoint save_checkpoint",
        "engine.mezo": "MeZO",
        "init": "base_shapes initialize",
        "integrations.accelerate.attach": "attach",
        "optim": "ADOPT LAMB LARS SGD Adafactor Adagrad Adam AdamW AdamWScheduleFree AdEMAMix DAdaptAdam DAdaptSGD "
        "Lion Muon Prodigy RMSprop SGDScheduleFree",
        "optim.averaged": "averaged",
        "optim.base": "ShardedOptimizer",
        "optim.clip": "Clip clip_grad_norm_ grad_norms",
        "optim.lr_range": "LRRange lr_range_test",
        "optim.param_groups": "param_groups",
        "optim.schedules": "warmup_constant warmup_cosine warmup_inverse_sqrt warmup_linear warmup_stable_decay",
        "optim.weight_average": "EMA LAWA",
        "proof": "Fingerprint fingerprint prove prove_every",
        "sam": "ASAM AWP GSAM SAM FriendlySAM FunctionalSAM LookSAM MomentumSAM PreconditionedSAM",
    }
    __getattr__, __dir__ = lazy(__name__, _NAMES, ("checkpoint", "health", "layout", "optim", "proof", "sam"))
