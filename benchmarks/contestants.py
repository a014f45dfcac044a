"""The optimizers whose steps are compared: torch's, distopt's and those of other packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import distopt
from benchmarks.muons import MUONS, split
from distopt.optim.clip import step_clipped

Make = Callable[[list[Tensor]], Any]  # returns what has the method `step`

BASE = "torch AdamW fused"  # the reference of all comparisons,
CLIPPED_BASE = "torch clip + AdamW fused"  # and of those that clip
_MAX_NORM = 1e-3  # below every norm here, so that every step clips

_ADAM: dict[str, Any] = dict(lr=1e-4, weight_decay=0.01)
_AVERAGED = dict(momentum=0.9, dampening=0.9)
_NESTEROV = dict(momentum=0.9, nesterov=True)
_CENTERED = dict(centered=True, momentum=0.9)

# Families, whose members take turns: the name of a rule, the bytes that it has to read and write per float32 parameter,
# its class (in torch.optim and in distopt), its arguments, and torch's implementations. The states of a family are in
# memory at the same time; all rules at once would need 20 GB for 124M parameters.
_FAMILIES: dict[str, list[tuple[str, int, str, dict[str, Any], tuple[str, ...]]]] = {
    "adam": [
        ("AdamW", 28, "AdamW", _ADAM, ("fused", "foreach")),
        ("Adam", 28, "Adam", {"lr": 1e-4}, ("fused", "foreach")),
    ],
    "layerwise": [
        ("LAMB", 40, "LAMB", _ADAM, ()),
        ("LARS", 28, "LARS", dict(lr=1e-4, weight_decay=0.01), ()),
    ],
    "sgd": [
        ("SGD", 12, "SGD", {"lr": 1e-4}, ("fused", "foreach")),
        ("momentum", 20, "SGD", dict(lr=1e-4, momentum=0.9, weight_decay=0.01), ("fused", "foreach")),
        ("averaged momentum", 20, "SGD", dict(lr=1e-4, **_AVERAGED), ("fused", "foreach")),
        ("Nesterov", 20, "SGD", dict(lr=1e-4, **_NESTEROV), ("fused", "foreach")),
    ],
    "scaled": [
        ("Adagrad", 20, "Adagrad", {"lr": 1e-4}, ("fused", "foreach")),
        ("RMSprop", 20, "RMSprop", {"lr": 1e-4}, ("foreach",)),
        ("RMSprop centered momentum", 36, "RMSprop", dict(lr=1e-4, **_CENTERED), ("foreach",)),
    ],
    # The state in fewer bits; the bytes without those of scales.
    "narrow": [
        ("AdamW, 32 bits", 28, "AdamW", _ADAM, ()),
        ("AdamW, 16 bits", 20, "AdamW", {**_ADAM, "state_bits": 16}, ()),
        ("AdamW, 8 bits", 16, "AdamW", {**_ADAM, "state_bits": 8}, ()),
        ("AdamW, 4 bits", 14, "AdamW", {**_ADAM, "state_bits": 4}, ()),
        ("LAMB, 32 bits", 40, "LAMB", _ADAM, ()),
        ("LAMB, 8 bits", 26, "LAMB", {**_ADAM, "state_bits": 8}, ()),
        ("Lion, 32 bits", 20, "Lion", {"lr": 1e-4}, ()),
        ("Lion, 8 bits", 14, "Lion", {"lr": 1e-4, "state_bits": 8}, ()),
    ],
}

# LAMBs of other packages: name, module, class, whether it needs a GPU.
_LAMBS = (
    ("timm LAMB", "timm.optim", "Lamb", False),
    ("pytorch_optimizer LAMB", "pytorch_optimizer", "Lamb", False),
    ("bitsandbytes LAMB", "bitsandbytes.optim", "LAMB", True),
    ("DeepSpeed FusedLamb", "deepspeed.ops.lamb", "FusedLamb", True),
)


def contestants(gpu: bool) -> dict[str, dict[str, tuple[int, Make]]]:
    """Return bytes per parameter and constructor of each optimizer, by family and name; print the missing ones."""
    found: dict[str, dict[str, tuple[int, Make]]] = {family: {} for family in _FAMILIES}
    for family, rules in _FAMILIES.items():
        for name, size, cls, arguments, ways in rules:
            for way in ways:
                if gpu and (name, way) == ("Adagrad", "fused"):
                    print("torch Adagrad fused does not take part: torch 2.13 has it for the CPU only")
                    continue
                found[family][f"torch {name} {way}"] = size, _maker(torch.optim, cls, {way: True, **arguments})
            found[family][f"distopt {name}"] = size, _maker(distopt, cls, arguments)
    for name, module, cls, gpu_only in _LAMBS:
        if gpu_only and not gpu:
            print(f"{name} does not take part: it has no CPU version")
            continue
        try:
            package = import_module(module)
            _maker(package, cls, _ADAM)([torch.zeros(1, requires_grad=True)])
        except Exception as error:  # not installed, or incompatible with the installed versions
            print(f"{name} does not take part: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            continue
        found["layerwise"][name] = 40, _maker(package, cls, _ADAM)
    found["layerwise"]["distopt LAMB, consumes_grads"] = 40, _consuming
    return found | {"matrices": _muons(), "clipping": clipping()}


class Stepper:
    """An optimizer whose `step` is something more."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step


def clipping() -> dict[str, tuple[int, Make]]:
    """Return clipping by the global norm, then a step: torch's, and distopt's before and in the step."""

    def by_torch(params: list[Tensor]) -> Stepper:
        optimizer = torch.optim.AdamW(params, fused=True, **_ADAM)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, _MAX_NORM)
            optimizer.step()

        return Stepper(step)

    def before(params: list[Tensor]) -> Stepper:
        optimizer = distopt.AdamW(params, **_ADAM)

        def step() -> None:
            distopt.clip_grad_norm_(optimizer, _MAX_NORM)
            optimizer.step()

        return Stepper(step)

    def within(cls: Any) -> Callable[[list[Tensor]], Stepper]:
        def made(params: list[Tensor]) -> Stepper:
            optimizer = cls(params, **_ADAM)
            return Stepper(lambda: step_clipped(optimizer, distopt.Clip(optimizer, _MAX_NORM), consumes_grads=True))

        return made

    return {
        CLIPPED_BASE: (40, by_torch),
        "distopt clip_grad_norm_, then AdamW": (40, before),
        "distopt clip in AdamW": (32, within(distopt.AdamW)),
        "distopt clip in LAMB": (44, within(distopt.LAMB)),
        "distopt clip in LARS": (20, within(distopt.LARS)),
    }


def _muons() -> dict[str, tuple[int, Make]]:
    """Return the Muons, which read weights, gradients and momentum, and write two; their products are the work."""
    found: dict[str, tuple[int, Make]] = {}
    for name, make in MUONS.items():
        try:
            make(split([torch.zeros(1, 1, requires_grad=True) for _ in range(3)]))
        except ImportError as error:
            print(f"{name} does not take part: {error}")
            continue
        found[name] = 20, lambda params, make=make: make(split(params))  # type: ignore[misc]
    return found


def _consuming(params: list[Tensor]) -> Stepper:
    optimizer = distopt.LAMB(params, **_ADAM)
    return Stepper(lambda: optimizer.step(consumes_grads=True))


def _maker(package: Any, cls: str, arguments: dict[str, Any]) -> Make:
    return lambda params: getattr(package, cls)(params, **arguments)
