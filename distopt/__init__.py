"""Optimizers whose update is exactly the unsharded one, however parameters, gradients and state are sharded."""

from distopt import layout
from distopt.checkpoint import async_save_checkpoint, load_checkpoint, save_checkpoint
from distopt.integrations.accelerate.attach import attach
from distopt.optim import LAMB, LARS, SGD, Adagrad, Adam, AdamW, RMSprop
from distopt.optim.base import ShardedOptimizer
from distopt.optim.clip import clip_grad_norm_, grad_norms
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

__all__ = [
    "ASAM",
    "AWP",
    "GSAM",
    "LAMB",
    "LARS",
    "SAM",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Fingerprint",
    "FriendlySAM",
    "FunctionalSAM",
    "LookSAM",
    "MomentumSAM",
    "PreconditionedSAM",
    "RMSprop",
    "ShardedOptimizer",
    "async_save_checkpoint",
    "attach",
    "clip_grad_norm_",
    "fingerprint",
    "grad_norms",
    "layout",
    "load_checkpoint",
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
