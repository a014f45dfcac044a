"""The private names of Accelerate that distopt reads, as of version 1.15; nothing else in distopt uses them.

They are in accelerate/accelerator.py, which has no public lists of what it prepared. A name that has moved is a
ValueError that says which, and the version that has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

VERSION = "1.15"


def prepared_models(accelerator: Accelerator) -> list[nn.Module]:
    """Returns Accelerate's own list of the models that it prepared; it has the modules inside of DDP."""
    return _read(accelerator, "_models")


def prepared_optimizers(accelerator: Accelerator) -> list[Any]:
    """Returns Accelerate's own list of the optimizers that it prepared, each in Accelerate's wrapper."""
    return _read(accelerator, "_optimizers")


def prepared_schedulers(accelerator: Accelerator) -> list[Any]:
    """Returns Accelerate's own list of the schedulers that it prepared."""
    return _read(accelerator, "_schedulers")


def _read(accelerator: Accelerator, name: str) -> Any:
    try:
        return getattr(accelerator, name)
    except AttributeError as error:
        raise ValueError(
            f"Accelerate's {type(accelerator).__name__} has no {name!r} any more: distopt reads it as of Accelerate "
            f"{VERSION}; install that version"
        ) from error
