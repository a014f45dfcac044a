"""Engines that run the model: DDP, ZeRO-1, FSDP2, DeepSpeed. An optimizer sees only the layout of its parameters."""

from distopt.engine.base import Engine
from distopt.engine.ddp import DDP
from distopt.engine.deepspeed import DeepSpeed
from distopt.engine.fsdp2 import FSDP2
from distopt.engine.zero1 import Zero1

__all__ = ["DDP", "FSDP2", "DeepSpeed", "Engine", "Zero1"]
