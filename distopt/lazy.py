"""Names of a package that are imported when they are first used: `distopt --help` needs no torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy(
    package: str, names: Mapping[str, str], modules: Collection[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes a package's `__getattr__` and `__dir__`, as PEP 562 describes them.

    Args:
        package: The package's `__name__`.
        names: The names in each of its modules, separated by spaces.
        modules: Those of its modules that are attributes themselves.
    """
    content = vars(sys.modules[package])
    module_of = {name: module for module, listed in names.items() for name in listed.split()}

    def getattr_(name: str) -> Any:
        if name in modules:  # it becomes an attribute of the package by its import
            return importlib.import_module(f"{package}.{name}")
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{module_of[name]}")
        value = content[name] = getattr(module, name)
        return value

    def dir_() -> list[str]:
        return sorted({*content, *module_of, *modules})

    return getattr_, dir_
