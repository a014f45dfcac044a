"""The types and bounds of options: each is a condition on a value, with the words that an error message needs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real

_MOST = 2**63 - 1  # the largest integer that torch takes


@dataclass(frozen=True)
class Bound:
    """A condition on the value of an option.

    Attributes:
        text: The condition in words that follow "must be", such as "an integer >= 1".
        holds: Whether a value satisfies it.
        null: Whether None does, too.
        most: The largest integer that does, for which there is no word in the text.
    """

    text: str
    holds: Callable[[object], bool]
    null: bool = False
    most: int | None = None

    def accepts(self, value: object) -> bool:
        """Whether a value is within the bound."""
        return self.null if value is None else self.holds(value)

    def check(self, name: str, value: object, hint: str = "") -> None:
        """Raises ValueError, with the name of the option, the bound, the value and a hint, if the value is outside."""
        if self.accepts(value):
            return
        too_large = self.most is not None and isinstance(value, int) and value > self.most
        bound = f"{self}, and less than 2^63" if too_large else self
        raise ValueError(f"{name} must be {bound}, got {shown(value)}{'; ' * bool(hint)}{hint}")

    def __str__(self) -> str:
        return f"{self.text}{' or null' * self.null}"


def shown(value: object) -> str:
    """The value in one short line."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return "an integer beyond the largest float"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def or_null(bound: Bound) -> Bound:
    """The same bound, or None."""
    return replace(bound, null=True)


def either(one: Bound, other: Bound) -> Bound:
    """What one bound or the other accepts."""
    return Bound(f"{one}, or {other}", lambda value: one.accepts(value) or other.accepts(value))


def integer(low: int) -> Bound:
    """An integer >= low that fits into 64 bits; booleans are no integers."""

    def holds(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= _MOST

    return Bound(f"an integer >= {low}", holds, most=_MOST)


def number(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Bound:
    """A finite number in [low, high].

    Args:
        low: The least value.
        high: The greatest value.
        above: Exclude `low`.
        below: Exclude `high`.
    """

    def holds(value: object) -> bool:
        if not is_number(value) or not low <= value <= high:  # type: ignore[operator]
            return False
        return not (above and value == low) and not (below and value == high)

    if high == math.inf:
        return Bound(f"a number {'>' if above else '>='} {low:g}", holds)
    return Bound(f"a number in {'(' if above else '['}{low:g}, {high:g}{')' if below else ']'}", holds)


def is_number(value: object) -> bool:
    """Whether a value is a finite number within the range of a float; booleans are no numbers."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def choice(*values: str | int) -> Bound:
    """One of some values."""

    def holds(value: object) -> bool:
        return any(value == known and type(value) is type(known) for known in values)

    return Bound(f"one of {', '.join(map(str, values))}" if len(values) > 1 else str(values[0]), holds)


def switch() -> Bound:
    """True or false: any text would count as true."""
    return Bound("true or false", lambda value: isinstance(value, bool))


def text(what: str = "text", empty: bool = True) -> Bound:
    """A string.

    Args:
        what: What it is, for messages.
        empty: Allow the empty string.
    """
    return Bound(what, lambda value: isinstance(value, str) and (empty or bool(value)))


def texts(what: str, one: bool = False, none: bool = True) -> Bound:
    """A list of strings that are not empty.

    Args:
        what: What they are, for messages.
        one: Allow a string in place of a list of one.
        none: Allow the empty list.
    """

    def holds(value: object) -> bool:
        if isinstance(value, str):
            return one and bool(value)
        if not isinstance(value, Sequence) or not (value or none):
            return False
        return all(isinstance(item, str) and bool(item) for item in value)

    return Bound(what, holds)


def pair(what: str, holds: Callable[[float, float], bool], infinite: bool = False) -> Bound:
    """Two numbers that satisfy a condition together.

    Args:
        what: The bound in words.
        holds: The condition.
        infinite: Allow inf.
    """

    def both(value: object) -> bool:
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            return False
        return all(is_number(item) or (infinite and item == math.inf) for item in value) and holds(*value)

    return Bound(what, both)


def mapping(what: str, of: type | tuple[type, ...] = object, empty: bool = True) -> Bound:
    """Values by name, each an instance of a class, or of one of some."""

    def holds(value: object) -> bool:
        named = isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(v, of) for k, v in value.items())
        return named and (empty or bool(value))

    return Bound(what, holds)


# Bounds that a constructor and the schema of the configuration share.
SEED = integer(0)
POSITIVE = number(0, above=True)
EFFICIENCY = number(0, 1, above=True)
VALIDATION_FRACTION = number(0, 1, above=True, below=True)
VALIDATION_DOCUMENTS = integer(1)
SHUFFLE_BUFFER = integer(1)
DROPOUT = number(0, 1, below=True)
RATIO = number(0, 1)
PROVE_EVERY = or_null(integer(0))
PATH = text("a path", empty=False)
FAMILY = text("a model type of transformers", empty=False)
MODEL_CONFIG = mapping("options by name, such as {n_layer: 4}")
SOURCES = mapping("sources by name, each with path and weight", Mapping, empty=False)
TARGET_MODULES = or_null(texts("all-linear, or names such as [q_proj, v_proj],", one=True, none=False))
PATTERNS = texts("regular expressions for names, such as [wte, 'h\\.[0-3]\\.']")
TOKENS = texts("tokens such as ['<|user|>', '<|tool|>']")
FORMAT = choice("auto", "ending", "text", "jsonl", "json", "csv", "parquet", "datasets")
PATTERN = text("a pattern of paths, such as '*train*'", empty=False)
EXAMPLE_FORMAT = choice("auto", "messages", "sharegpt", "completion", "alpaca")
FIELDS = mapping("names by name, such as {messages: dialog}", str)
FIELD = text("text", empty=False)
SUFFIXES = texts("endings of names, such as [.txt, .md]", one=True)
IGNORE = texts("names of fields, such as [id, source]")
ATTENTION = choice("sdpa", "flash", "eager")
PRECISION = choice("auto", "fp32", "bf16")
REDUCE_DTYPE = or_null(choice("fp32", "bf16"))
PARAM_DTYPE = or_null(choice("bf16"))
STAGE = choice(1, 2, 3)
DTYPES = ("float32", "bfloat16", "float16")  # of exported weights
SCOPE = choice("global", "local")
CALLBACKS = Bound(
    "a list of entries with _target_, such as [{_target_: mine.Distance}]",
    lambda value: (
        isinstance(value, Sequence)
        and all(isinstance(entry, Mapping) and isinstance(entry.get("_target_"), str) for entry in value)
    ),
)
OVERRIDES = or_null(mapping("options by pattern, such as {wte: {lr: 1e-4}},", of=Mapping))
