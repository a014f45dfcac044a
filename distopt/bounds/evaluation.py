"""The bounds of what evaluates a run: the prompts that it continues, and when it stops early."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distopt.bounds import Bound, choice, integer, number, text

EARLY_STOPPING: dict[str, Bound] = {
    "metric": text("the name of a metric", empty=False),
    "patience": integer(1),
    "min_delta": number(0),
    "mode": choice("min", "max"),
}


def _are_prompts(value: object) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return isinstance(value, str) and bool(value)
    texts = [entry.get("prompt") if isinstance(entry, Mapping) else entry for entry in value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


PROMPTS = Bound("a file of prompts, or a list such as ['2+2=', {prompt: '3+4=', answer: '7'}]", _are_prompts)
