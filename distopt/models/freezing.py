"""Parameters that are not trained, by patterns of their names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from distopt.bounds import PATTERNS


def compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Return regular expressions; raise `ValueError` for what is none."""
    PATTERNS.check("model.freeze", patterns)
    try:
        return [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"model.freeze: {error.pattern!r} is not a regular expression ({error})") from error


def freeze(model: nn.Module, patterns: Sequence[re.Pattern[str]]) -> None:
    """Freeze the parameters whose name one of some regular expressions is found in; of tied ones either name.

    Raises:
        ValueError: One of them is found in no name, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [p for name, p in named.items() if pattern.search(name)]
        if not found:
            raise ValueError(
                f"model.freeze: {pattern.pattern!r} is found in no name of a parameter: {_some(list(named))}"
            )
        for p in found:
            p.requires_grad_(False)
    if patterns and not any(p.requires_grad for p in named.values()):
        raise ValueError(
            f"model.freeze={[pattern.pattern for pattern in patterns]} leaves nothing to train: freeze less"
        )


def _some(names: Sequence[str]) -> str:
    """List the kinds of names, where a number stands for all others in its place."""
    kinds = list(dict.fromkeys(re.sub(r"\d+", "0", name) for name in names))
    return f"there are {', '.join(kinds[:12])}{', ...' * (len(kinds) > 12)}"
