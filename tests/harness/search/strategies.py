"""What cases are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from tests.harness.search.case import Case, Event, Group, Leg, Options, Param, Step
from tests.harness.search.execute import DDP, WORLDS, ZERO1
from tests.harness.search.rules import AVERAGING, COUPLED, OTHERS

SHAPES = (
    (),
    (1,),
    (2,),
    (3,),
    (5,),
    (7,),
    (1, 1),
    (1, 5),
    (2, 3),
    (3, 2),
    (5, 3),
    (4, 4),
    (7, 1),
    (2, 1, 3),
    (3, 2, 2),
)
EMPTY = ((0,), (0, 3), (2, 0))
STEPS = 4  # of a leg, at most
PEERS = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW")  # of `torch.optim`
ADAM_COUPLED = COUPLED[:2]
MOMENTUM, ADAPTIVE = (
    ("SGD", "LARS", "RMSprop", "Adam", "AdamW", "LAMB", "Lion", "AdEMAMix", "ADOPT", *ADAM_COUPLED),
    ("Adagrad", "RMSprop", "Adam", "AdamW", "LAMB", "AdEMAMix", "ADOPT", "AdamWScheduleFree", *ADAM_COUPLED),
)
DECOUPLED = ("AdamW", "LAMB", "Lion", "AdEMAMix", "ADOPT", "Adafactor")  # whose weight decay is added to the direction
CAUTIOUS = ("SGD", "Adagrad", "RMSprop", "Adam", *DECOUPLED)  # LARS is cautious without trust ratios alone

_LR = st.sampled_from([0.0, 1e-3, 0.01, 0.05, 0.4])  # with the last one, weights overshoot their targets
_DECAY = st.sampled_from([0.0, 0.01, 0.1])
_BETA = st.sampled_from([0.0, 0.5, 0.9])
_BETA2 = st.sampled_from([0.9, 0.95, 0.99, 0.999, 0.9999])
_CLIP = st.sampled_from([None, (0.01, 10.0), (0.25, 0.4), (0.0, 1.0)])
_COMMON: dict[str, st.SearchStrategy[Any]] = {
    "lr": _LR,
    "weight_decay": _DECAY,
    "maximize": st.booleans(),
    "trust_ratio": st.booleans(),
    "trust_clip": _CLIP,
}
_MOMENTS = {"betas": st.tuples(_BETA, _BETA2), "eps": st.sampled_from([1e-8, 1e-6, 1e-3])}
_POSITIVE_MOMENTUM = st.sampled_from([0.5, 0.9])
_AVERAGE = {"r": st.sampled_from([0.0, 0.5]), "weight_lr_power": st.sampled_from([0.0, 1.0, 2.0])}
_EPS = {"eps": _MOMENTS["eps"]}
# By class: what may be set, in the constructor, in a param group, and in the middle of a run.
OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "SGD": {"dampening": st.sampled_from([0.0, 0.5, 0.9])},
    "LARS": {"dampening": st.sampled_from([0.0, 0.5]), "trust_coefficient": st.sampled_from([1e-3, 0.02, 0.5])},
    "Adagrad": {"lr_decay": st.sampled_from([0.0, 0.05]), "eps": st.sampled_from([1e-10, 1e-3])},
    "RMSprop": {"alpha": st.sampled_from([0.5, 0.9, 0.99, 0.999]), "eps": st.sampled_from([1e-8, 1e-3])},
    "Adam": _MOMENTS,
    "AdamW": _MOMENTS,
    "LAMB": _MOMENTS,
    "Lion": {"betas": st.tuples(_BETA, _BETA2)},
    "AdEMAMix": {
        **_MOMENTS,
        "beta3": st.sampled_from([0.95, 0.9999]),
        "slow_weight": st.sampled_from([0.0, 2.0, 5.0]),
        "slow_warmup": st.sampled_from([None, 1, 3, 10]),
    },
    "ADOPT": {**_MOMENTS, "clip_exponent": st.sampled_from([None, 0.0, 0.25])},
    "SGDScheduleFree": _AVERAGE,
    "AdamWScheduleFree": _AVERAGE | _EPS,
    "Prodigy": _EPS,
    "DAdaptAdam": _EPS,
    "DAdaptSGD": {},
    "Adafactor": {
        "beta2_decay": st.sampled_from([-1.0, -0.8, 0.0]),
        "eps": st.sampled_from([(None, 1e-3), (1e-3, 0.0), (1e-8, 0.1)]),
        "d": st.sampled_from([1.0, 2.0]),
    },
    "Muon": {"betas": st.tuples(_BETA, _BETA2), "momentum": _BETA, "nesterov": st.booleans()},
}
# Of rules that have one d for all groups: what is set for all of them.
_OF_ALL: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from([0.0, 0.5, 1.0]),
    "d_coef": st.sampled_from([0.5, 1.0, 2.0]),
}
SHARED = {
    **dict.fromkeys(ADAM_COUPLED, _OF_ALL | {"betas": st.tuples(_BETA, _BETA2)}),
    "DAdaptSGD": _OF_ALL | {"momentum": _BETA},
}
# And what decides which state there is, so that it is set in the constructor alone.
FIXED: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "SGD": {"momentum": st.sampled_from([0.0, 0.5, 0.9])},
    "LARS": {"momentum": st.sampled_from([0.0, 0.9])},
    "Adagrad": {"initial_accumulator_value": st.sampled_from([0.0, 0.1])},
    "RMSprop": {"momentum": st.sampled_from([0.0, 0.8]), "centered": st.booleans()},
    "SGDScheduleFree": {"momentum": _POSITIVE_MOMENTUM},
    "AdamWScheduleFree": {"betas": st.tuples(_POSITIVE_MOMENTUM, _BETA2)},
    **SHARED,
    "Muon": {"ns_steps": st.integers(1, 5)},
}
_RHO = st.sampled_from([0.05, 0.3])
_INTERVAL = st.integers(1, 3)
MEMBERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "SAM": {"interval": _INTERVAL},
    "ASAM": {"interval": _INTERVAL, "eta": st.sampled_from([0.01, 0.1])},
    "AWP": {"interval": _INTERVAL},
    "GSAM": {"interval": _INTERVAL, "alpha": st.sampled_from([0.0, 0.4])},
    "FriendlySAM": {"interval": _INTERVAL, "sigma": st.sampled_from([0.8, 1.0]), "decay": st.sampled_from([0.6, 0.9])},
    "LookSAM": {"interval": _INTERVAL, "alpha": st.sampled_from([0.0, 0.7])},
    "MomentumSAM": {"interval": _INTERVAL},
    "PreconditionedSAM": {"interval": _INTERVAL, "eps": st.sampled_from([1e-8, 1e-2])},
    "FunctionalSAM": {"interval": _INTERVAL, "precondition": st.booleans(), "eps": st.sampled_from([1e-8, 1e-2])},
}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    params = tuple(draw(st.lists(_params(), min_size=1, max_size=6)))
    kind = draw(st.sampled_from(sorted(OPTIONS)))
    sam = draw(st.none() | st.sampled_from(sorted(MEMBERS)))
    torch = sam is not None and kind in PEERS and draw(st.booleans())
    options = draw(_some(_options(kind, torch, sam) | FIXED.get(kind, {})))
    if kind in COUPLED:  # of the default, 1e-6, the first distances are a few roundings of float32
        options["d0"] = draw(st.sampled_from([0.01, 0.1]))
    if kind == "Muon":  # of bfloat16, the reference would have to know every rounding
        options["ns_dtype"] = "float32"
    sam_options: Options = {}
    if sam:
        sam_options = draw(_some({"rho": _RHO} | MEMBERS[sam]))
        if sam == "FunctionalSAM" and kind not in ADAPTIVE:
            sam_options["precondition"] = False
        stateless = kind in ("SGD", "LARS", "RMSprop") and not options.get("momentum", kind == "LARS")
        if sam == "MomentumSAM" and (kind not in MOMENTUM or stateless):
            sam, sam_options = None, {}
        if sam == "PreconditionedSAM" and kind not in ADAPTIVE:
            sam, sam_options = None, {}
        preconditioned = sam in ("PreconditionedSAM", "FunctionalSAM")
        if kind == "Adagrad" and preconditioned and not draw(st.booleans()):
            options.pop("initial_accumulator_value", None)
        torch = torch and sam is not None
    if options.get("momentum") and kind in ("SGD", "LARS") and not options.get("dampening") and draw(st.booleans()):
        options["nesterov"] = True
        options.pop("dampening", None)
    changing = _options(kind, torch, sam)
    if kind in ("SGD", "LARS") and (options.get("momentum") or draw(st.booleans())):
        changing["momentum"] = st.sampled_from([0.5, 0.9])
    if sam and draw(st.booleans()):
        changing["sam_rho"] = st.sampled_from([0.0, 0.05, 0.3])
    if options.get("nesterov"):
        changing.pop("dampening", None)
    return _Draws(draw, params, kind, options, sam, sam_options, torch, changing).case()


@dataclass
class _Draws:
    """What depends on what was drawn before: groups, layouts, steps and events."""

    draw: st.DrawFn
    params: tuple[Param, ...]
    kind: str
    options: Options
    sam: str | None
    sam_options: Options
    torch: bool
    changing: dict[str, st.SearchStrategy[Any]]

    def case(self) -> Case:
        draw = self.draw
        order = draw(st.permutations(range(len(self.params))))
        number = draw(st.integers(1, 3))
        where = [draw(st.integers(0, number)) for _ in order]  # the last is not given to the optimizer at first
        groups = [
            self.group(tuple(i for i, at in zip(order, where) if at == g), draw(_some(self.changing, 2)))
            for g in range(number)
        ]
        full = [group for group in groups if group.params]
        if not full:
            groups = [self.group(tuple(order), {})]
        elif self.sam and not draw(st.booleans()):
            groups = full
        inside = {i for group in groups for i in group.params}
        self.late = [i for i in order if i not in inside]
        closure = self.sam is not None and draw(st.booleans())
        max_norm = None if closure else draw(st.sampled_from([None, 0.5, 3.0]))
        self.frozen = {i for i, p in enumerate(self.params) if p.frozen}
        self.thawable: set[int] = set()
        self.number = len(groups)
        self.shared: Options = {}  # what has been set for all groups
        legs = [self.leg(i) for i in range(draw(st.integers(1, 2)))]
        # float32 has kernels of its own. Muon's polynomial multiplies its roundings by some hundreds.
        dtype = "float64" if self.kind == "Muon" else draw(st.sampled_from(["float64", "float64", "float32"]))
        return Case(
            self.params, tuple(groups), self.kind, self.options, tuple(legs), self.sam, self.sam_options, self.torch,
            closure, max_norm, dtype,
        )  # fmt: skip

    def group(self, params: tuple[int, ...], options: Options) -> Group:
        """Muon's own rule is for matrices."""
        if self.kind == "Muon" and any(len(self.params[i].shape) < 2 for i in params):
            options = options | {"rule": self.draw(st.sampled_from(sorted(OTHERS)))}
        return Group(params, options)

    def leg(self, number: int) -> Leg:
        draw = self.draw
        layouts = [name for name in WORLDS if not (self.torch and name in ZERO1)]
        if len(self.frozen) == len(self.params):  # DDP takes no such model
            layouts = [name for name in layouts if name not in DDP]
        layout = draw(st.sampled_from(layouts))
        world = draw(st.sampled_from(WORLDS[layout]))
        # DDP and ZeRO-1 are told once, when a model is wrapped, what is to be trained.
        self.thawable = set() if layout in (*DDP, *ZERO1) else set(self.frozen)
        steps = [self.step() for _ in range(draw(st.integers(1, STEPS)))]
        return Leg(layout, world, tuple(steps), permuted=number > 0 and draw(st.booleans()))

    def step(self) -> Step:
        draw = self.draw
        events = [event for _ in range(draw(st.integers(0, 2))) if (event := self.event())]
        some = st.sets(st.sampled_from(range(len(self.params))), max_size=2).map(lambda s: tuple(sorted(s)))
        second = None  # FunctionalSAM's second pass takes the slope at the first one's outputs
        if self.sam not in (None, "FunctionalSAM") and draw(st.booleans()):
            second = draw(some)
        step = Step(tuple(events), draw(some), second)
        for unused in (step.unused, step.second):  # functional SAM has to be shown outputs in each pass
            assume(self.sam != "FunctionalSAM" or not set(range(len(self.params))) - set(unused) <= self.frozen)
        return step

    def event(self) -> Event | None:
        draw = self.draw
        match draw(st.sampled_from(["set", "set all", "reload", "freeze", "thaw", "add", "through torch", "average"])):
            case "set":
                name = draw(st.sampled_from(sorted(self.changing)))
                return ("set", draw(st.integers(0, self.number - 1)), name, draw(self.changing[name]))
            case "set all" if self.kind in COUPLED:
                shared = SHARED[self.kind]
                name = draw(st.sampled_from(sorted(shared)))
                self.shared[name] = draw(shared[name])
                return ("set", None, name, self.shared[name])
            case "average" if self.kind in AVERAGING:
                return ("average",)
            case "reload":
                return ("reload",)
            case "freeze" if trained := sorted(set(range(len(self.params))) - self.frozen):
                i = draw(st.sampled_from(trained))
                self.frozen.add(i)
                self.thawable.add(i)
                return ("freeze", i)
            case "thaw" if self.thawable:
                i = draw(st.sampled_from(sorted(self.thawable)))
                self.thawable.remove(i)
                self.frozen.remove(i)
                return ("thaw", i)
            case "add" if self.late:
                params = tuple(self.late)
                self.late = []
                self.number += 1
                return ("add", self.group(params, draw(_some(self.changing, 2)) | self.shared))
            case "through torch" if self.kind in PEERS:
                return ("through torch",)
        return None


def _options(kind: str, torch: bool, sam: str | None) -> dict[str, st.SearchStrategy[Any]]:
    options = _COMMON | OPTIONS[kind]
    options |= {"cautious": st.booleans()} if kind in CAUTIOUS else {}
    options |= {"cautious_decay": st.booleans()} if kind in DECOUPLED else {}
    left_out = {"trust_ratio", "trust_clip", "cautious", "cautious_decay"} if torch else set()
    if kind in (*AVERAGING, *COUPLED, "Adafactor", "Muon"):
        left_out |= {"trust_ratio", "trust_clip"}
    if kind in COUPLED:
        left_out |= {"lr"}
    if sam:  # which perturbs along the gradient whatever the sign of the step
        left_out |= {"maximize"}
    return {name: values for name, values in options.items() if name not in left_out}


@st.composite
def _some(draw: st.DrawFn, options: dict[str, st.SearchStrategy[Any]], most: int = 4) -> Options:
    names: Sequence[str] = sorted(draw(st.sets(st.sampled_from(sorted(options)), max_size=most)))
    return {name: draw(options[name]) for name in names}


@st.composite
def _params(draw: st.DrawFn) -> Param:
    shapes = EMPTY if draw(st.booleans()) and draw(st.booleans()) else SHAPES
    flags = draw(st.sets(st.sampled_from(["zero", "frozen", "tied", "unit", "ignored"]), max_size=2))
    return Param(draw(st.sampled_from(shapes)), **dict.fromkeys(sorted(flags), True))
