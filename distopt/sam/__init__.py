"""Sharpness-aware minimization (SAM) around any torch optimizer, and its descendants."""

from distopt.sam.asam import ASAM
from distopt.sam.awp import AWP
from distopt.sam.base import SAM
from distopt.sam.friendly import FriendlySAM
from distopt.sam.functional import FunctionalSAM
from distopt.sam.gsam import GSAM
from distopt.sam.looksam import LookSAM
from distopt.sam.momentum import MomentumSAM
from distopt.sam.preconditioned import PreconditionedSAM

__all__ = ["ASAM", "AWP", "GSAM", "SAM", "FriendlySAM", "FunctionalSAM", "LookSAM", "MomentumSAM", "PreconditionedSAM"]
