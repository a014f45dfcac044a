"""Options that all optimizers share: distopt's own, and those of `torch.optim` that change nothing here."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # typing has Unpack from Python 3.11 on
    from typing import Literal, TypedDict

    class TorchOptions(TypedDict, total=False):
        """Arguments of torch's constructors that are also accepted here, and options of all rules."""

        cautious: bool
        cautious_decay: bool
        master_weights: Literal["float32", "remainder", "none"]
        state_bits: Literal[32, 16, 8, 4]

        foreach: bool | None
        fused: bool | None
        differentiable: bool
        amsgrad: bool
        decoupled_weight_decay: bool


# The defaults of distopt's own options, for rules that do not name them.
OWN: dict[str, Any] = {"cautious": False, "cautious_decay": False, "master_weights": "float32", "state_bits": 32}
COMMON: dict[str, Any] = {
    "maximize": False,
    "trust_ratio": False,
    "trust_clip": None,
    "capturable": False,
    **OWN,
}

Accepted = tuple[tuple[bool | None, ...], str]

_CHOICE: Accepted = (
    (None, False, True),
    "it must be true, false or None, and changes nothing: kernels are chosen by the tensors",
)
# name: (the values that change nothing, why no other is accepted and what to do)
TORCH_OPTIONS: dict[str, Accepted] = {
    "foreach": _CHOICE,
    "fused": _CHOICE,
    "differentiable": ((None, False), "no gradient flows through a step of distopt: give False, or use torch.optim"),
    "amsgrad": (
        (None, False),
        "distopt keeps no maximum of the second moment: give False, or use torch.optim",
    ),
    "decoupled_weight_decay": ((None, False), "weight decay is a part of the gradient here: use distopt.AdamW"),
}
DECOUPLED: dict[str, Accepted] = TORCH_OPTIONS | {
    "decoupled_weight_decay": ((None, True), "weight decay is always decoupled here: use distopt.Adam")
}


def options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options among the `locals()` of a constructor, in the order of its signature."""
    others = ("self", "params", "torch_options", "__class__")
    return {name: value for name, value in arguments.items() if name not in others}


def check_torch_options(options: Mapping[str, Any], accepted: Mapping[str, Accepted] = TORCH_OPTIONS) -> None:
    """Raises ValueError for the first option of torch's that would change an update."""
    for name, (values, remedy) in accepted.items():  # in the table's order, so that all ranks raise the same error
        if name in options and not any(options[name] is value for value in values):
            raise ValueError(f"{name}={options[name]!r}: {remedy}")


def drop_torch_options(group: MutableMapping[str, Any], accepted: Mapping[str, Accepted] = TORCH_OPTIONS) -> None:
    """Removes torch's options from a param group, so that a state dict is the same whoever made or saved the group."""
    for name in accepted.keys() & group.keys():
        del group[name]
