"""A random training as data: what `tests.harness.search` draws, runs on every rank, and prints when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

Options = dict[str, Any]
# Before a step: ("set", group, option, value), of all groups where it is None, ("freeze", param), ("thaw", param),
# ("add", Group), ("reload",), ("through torch",), which is a state dict that goes through the torch optimizer of the
# same name, and ("average",), which looks at the average of a schedule-free optimizer and goes on.
Event = tuple[Any, ...]


class _Short:
    """What is not as it is by default; Python reads it back."""

    def __repr__(self) -> str:
        said = []
        for f in fields(self):  # type: ignore[arg-type]
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if (value := getattr(self, f.name)) != default:
                said.append(f"{f.name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"


@dataclass(frozen=True, repr=False)
class Param(_Short):
    """A parameter of the model.

    zero: it starts at zero. frozen: it is never trained. tied: the model has it under two names.
    unit: it belongs to the submodule that FSDP2 shards as a unit of its own.
    ignored: FSDP2 leaves it unsharded.
    """

    shape: tuple[int, ...]
    zero: bool = False
    frozen: bool = False
    tied: bool = False
    unit: bool = False
    ignored: bool = False


@dataclass(frozen=True, repr=False)
class Group(_Short):
    """A param group: indices into the case's parameters, in the order in which the optimizer gets them."""

    params: tuple[int, ...]
    options: Options = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Step(_Short):
    """One step of the optimizer.

    unused: parameters without a gradient. unused_in_second: those of SAM's second pass, if they are others.
    """

    events: tuple[Event, ...] = ()
    unused: tuple[int, ...] = ()
    unused_in_second: tuple[int, ...] | None = None

    @property
    def second(self) -> tuple[int, ...]:
        return self.unused if self.unused_in_second is None else self.unused_in_second


@dataclass(frozen=True, repr=False)
class Leg(_Short):
    """Some steps at one layout and world size. A checkpoint leads from one leg to the next.

    permuted: the new optimizer gets the parameters of each group in the opposite order.
    """

    layout: str
    world: int
    steps: tuple[Step, ...]
    permuted: bool = False


@dataclass(frozen=True, repr=False)
class Case(_Short):
    """A training.

    optimizer: the class; torch: of `torch.optim` instead of distopt. options: its defaults, as in the constructor.
    sam: a member of SAM's family around it, with `sam_options`. closure: SAM takes both passes in `step(closure)`.
    max_norm: clips the gradients that the step takes.
    """

    params: tuple[Param, ...]
    groups: tuple[Group, ...]
    optimizer: str
    options: Options
    legs: tuple[Leg, ...]
    sam: str | None = None
    sam_options: Options = field(default_factory=dict)
    torch: bool = False
    closure: bool = False
    max_norm: float | None = None
    dtype: str = "float64"


@dataclass
class Standing:
    """Which groups there are, and which parameters are frozen, at some point of a case."""

    groups: list[Group]
    frozen: set[int]

    def apply(self, event: Event) -> None:
        match event:
            case ("add", group):
                self.groups.append(group)
            case ("set", None, name, value):  # a group that comes later has to have it too
                self.groups = [replace(group, options=group.options | {name: value}) for group in self.groups]
            case ("set", i, "momentum", value):  # which decides what state there is, and so what a checkpoint is for
                self.groups[i] = replace(self.groups[i], options=self.groups[i].options | {"momentum": value})
            case ("freeze", i):
                self.frozen.add(i)
            case ("thaw", i):
                self.frozen.discard(i)


def standing(case: Case, legs: int) -> Standing:
    """As it is after the first so many legs."""
    now = Standing(list(case.groups), {i for i, p in enumerate(case.params) if p.frozen})
    for event in _events(case, legs):
        now.apply(event)
    return now


def _events(case: Case, legs: int) -> Iterator[Event]:
    for leg in case.legs[:legs]:
        for step in leg.steps:
            yield from step.events
