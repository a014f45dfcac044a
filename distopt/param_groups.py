"""Param groups: which parameters decay and take a trust ratio, and other options by the parameters' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distopt.names import bare_parameters


def param_groups(
    model: nn.Module, weight_decay: float = 0.01, overrides: Mapping[str, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Param groups for any torch optimizer, in which every trainable parameter stands exactly once.

    Parameters of two and more dimensions get `weight_decay`. The others (biases, the scales of norms) get
    `weight_decay=0.0, trust_ratio=False`, as in the published trainings of BERT with AdamW and LAMB.

    model: plain, on the meta device, or wrapped for DDP, FSDP2 or DeepSpeed. Tied weights stand once, by their first
        name; frozen parameters stand nowhere.
    weight_decay: for the parameters that decay, >= 0. It takes precedence over the optimizer's argument of that name.
    overrides: options for the parameters in whose names, without those of wrappers (`_orig_mod.` of `torch.compile`,
        `module.` of DDP), a regular expression is found (`re.search`), for example
        `{"wte": {"lr": 1e-4}, r"layers\\.0\\.": {"lr": 3e-4}}`. The first expression that is found wins; its options
        are merged over those above, so a bias keeps `weight_decay=0.0` unless the expression says otherwise.

    Raises ValueError for a negative weight decay, a model with nothing to train, and an expression that is malformed
    or that no trainable parameter follows. The values of options are for the optimizer to check.
    """
    if not isinstance(weight_decay, (int, float)) or not weight_decay >= 0:
        raise ValueError(f"weight_decay must be a number >= 0, got {weight_decay!r}")
    overrides = overrides or {}
    if not isinstance(overrides, Mapping) or not all(isinstance(options, Mapping) for options in overrides.values()):
        raise ValueError(f"overrides must be options by pattern, as {{wte: {{lr: 1e-4}}}}, got {overrides!r}")
    patterns = {pattern: _compile(pattern) for pattern in overrides}
    trainable = {name: param for name, param in bare_parameters(model).items() if param.requires_grad}
    if not trainable:
        raise ValueError("the model has no parameter with requires_grad=True: unfreeze what is to be trained")

    default = {True: {"weight_decay": weight_decay}, False: {"weight_decay": 0.0, "trust_ratio": False}}
    groups: dict[tuple[str | None, bool], dict[str, Any]] = {
        (pattern, decays): {**default[decays], **options, "params": []}
        for pattern, options in [(None, {}), *overrides.items()]
        for decays in (True, False)
    }
    for name, param in trainable.items():
        first = next((pattern for pattern, regex in patterns.items() if regex.search(name)), None)
        groups[first, _dims(param) > 1]["params"].append(param)
    for pattern in overrides:
        if not groups[pattern, True]["params"] and not groups[pattern, False]["params"]:
            raise ValueError(
                f"no trainable parameter follows the override {pattern!r}: it is found in none of the "
                f"{len(trainable)} names, or an earlier override takes them all; the first names are "
                f"{', '.join([*trainable][:5])}"
            )
    return [group for group in groups.values() if group["params"]]


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"the override {pattern!r} is not a regular expression ({error}): any text is '.*', a dot is '\\.'"
        ) from error


def _dims(param: Tensor) -> int:
    """The number of dimensions of the whole parameter."""
    # DeepSpeed 0.19.8 zero.Init (runtime/zero/partition_parameters.py) leaves an empty 1-D tensor in each parameter and
    # its shape in ds_shape; asking that tensor, no parameter would decay (DeepSpeed pull request 8438).
    return len(getattr(param, "ds_shape", param.shape))
