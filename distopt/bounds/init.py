"""The bounds of the options of an initialisation."""

from __future__ import annotations

from distopt.bounds import choice, integer, mapping, number, or_null, text

# In the order of `distopt.init.scheme.SCHEMES`.
NAMES = (
    "xavier_uniform",
    "xavier_normal",
    "he_uniform",
    "he_normal",
    "truncated_normal",
    "orthogonal",
    "gpt2",
    "mup",
)
BOUNDS = {
    "scheme": choice(*NAMES),
    "seed": integer(0),
    "fan": or_null(choice("in", "out", "avg")),
    "gain": or_null(number(0, above=True)),
    "std": or_null(number(0, above=True)),
    "embedding_std": number(0, above=True),
    "residual": or_null(text("a regular expression for names of parameters", empty=False)),
    "stds": or_null(mapping("standard deviations by pattern, such as {pos_embed: 0.02},")),
    "base_width": or_null(integer(1)),
}
