"""The private names of transformers that distopt reads, as of versions 5.20 to 5.23; nothing else in distopt uses them.

They are those of its loading of weights, which transformers does for a full model at once. A name that has moved is a
ValueError that says which, and the versions that have it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

VERSIONS = "5.20 to 5.23"
# By module of transformers.
NAMES = {
    "conversion_mapping": ("get_model_conversion_mapping",),
    "core_model_loading": ("WeightConverter", "WeightRenaming", "dot_natural_key", "rename_source_key"),
    "modeling_utils": ("str_to_torch_dtype",),
}


def read(module: str, name: str) -> Any:
    """Returns a name of a module of transformers.

    Args:
        module: The module, without the name of the package.
        name: A name of that module in `NAMES`.

    Raises:
        ValueError: If it is not there any more.
    """
    assert name in NAMES[module]
    try:
        return getattr(import_module(f"transformers.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise _moved(f"transformers.{module}", name) from error


def method(model: object, name: str) -> Any:
    """Returns a private method or attribute of a model of transformers; raises ValueError if it has none."""
    try:
        return getattr(model, name)
    except AttributeError as error:
        raise _moved(type(model).__name__, name) from error


def _moved(where: str, name: str) -> ValueError:
    return ValueError(
        f"{where} has no {name!r} any more: distopt reads it as of transformers {VERSIONS}; install one of them"
    )
