"""Param groups: which parameters have weight decay and a trust ratio, and other options by parameter name."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distopt.bounds import OVERRIDES
from distopt.init import Width, widths
from distopt.init.width import Shapes
from distopt.layout import full_shape
from distopt.layout.names import bare_parameters
from distopt.optim.hidden import outside, summary
from distopt.optim.mup import check_scaling, scale
from distopt.optim.validate import BOUNDS

# Stacks of vectors, one for each expert or head, which have two or more dimensions: biases, the scales of norms, the
# gains of weight norm; and the logarithm of Mamba's A, which mamba_ssm marks and transformers does not.
_VECTORS = re.compile(
    r"(^|[._])(bias|weight_g|A_log)$"
    r"|(norm|(^|[._])ln)(_?\d+)?[._](weight|scale|gain|gamma)$"
    r"|(^|\.)parametrizations\.\w+\.original0$"  # its original1 is weight norm's direction
)
_OTHERS = {"trust_ratio", "trust_clip", "trust_coefficient", "sam_rho", "name", "rule", "ns_dtype"}
_MEANT = {"learning_rate": "lr", "initial_lr": "lr", "wd": "weight_decay"}

log = logging.getLogger(__name__)


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    lr: float | None = None,
    mup: nn.Module | Shapes | None = None,
    rule: str = "adam",
    independent_decay: bool = False,
    matrices: str | None = None,
    others: str = "adamw",
) -> list[dict[str, Any]]:
    """Sorts a model's trainable parameters into param groups for any torch optimizer, each into exactly one.

    The first of these rules that applies to a parameter decides:

    1. The options of the first pattern of `overrides` that is found in its name, for the options that it has.
    2. `weight_decay=0.0, trust_ratio=False` for a parameter with fewer than two dimensions (biases, the scales of
       norms), as in the published trainings of BERT with AdamW and LAMB.
    3. The same for a parameter that is marked as not decaying: it has the attribute `_no_weight_decay`; or the method
       `no_weight_decay()` of its model, or of a module that contains it, returns its name, as in timm's models; or its
       name is that of a stack of vectors: it ends with `bias`, with `norm.weight` or the like, or with `weight_g` or
       `parametrizations.weight.original0`, the gains of weight norm; or it is Mamba's `A_log`, or the `D` next to it.
    4. `weight_decay` for the others.

    Every group has `param_names`, in the order of `params` and without the prefixes of wrappers (DDP, `torch.compile`,
    activation checkpointing), as torch's optimizers do when they are made from `model.named_parameters()`. How many
    parameters decay, and why others do not, is logged at the level INFO.

    Args:
        model: Plain, on the meta device, or wrapped for DDP, FSDP2 or DeepSpeed. Tied weights belong to a group once,
            by their first name; frozen parameters to none. `fully_shard` and `to_empty` replace parameters and drop
            their attributes: a model that marks its parameters by `_no_weight_decay` needs an override under FSDP2.
        weight_decay: For the parameters that decay, >= 0. It overrides the optimizer's argument of that name.
        overrides: Options for the parameters in whose names a regular expression is found (`re.search`), for example
            `{"wte": {"lr": 1e-4}, r"layers\\.0\\.": {"lr": 3e-4}}`. The first expression that is found wins; its
            options are merged over those of the rules above: a bias keeps `weight_decay=0.0` unless they say otherwise.
        lr: The peak of the learning rate, of the base model under muP; needed by `mup` and `independent_decay`, whose
            groups have an lr of their own. An override's lr takes its place.
        mup: The base model, or its shapes (`distopt.base_shapes`): each group's lr is multiplied by muP's factor for
            its width (`distopt.init.width`), and its weight decay divided by it, so that lr * weight_decay remains.
        rule: The row of muP's table: `adam` (Adam, AdamW, RMSprop, Adagrad) or `sgd`.
        independent_decay: Divide the weight decay by the group's peak lr, so that AdamW computes

                p <- p - lr_t * direction - s_t * weight_decay * p        s_t = lr_t / peak, the schedule's factor

            as in the paper of AdamW: another lr decays as much, and the decay follows the schedule. For AdamW only.
        matrices: The rule of the hidden matrices, `muon` for `distopt.Muon`: groups have a `rule` then. Hidden are all
            matrices, stacks of them (three dimensions) and filters but those of embeddings, of the output layer, also
            a tied one, and of convolutions in one dimension. `overrides={"gate": {"rule": "adamw"}}` excepts more. How
            many parameters have which rule, and why, is logged.
        others: The rule of the other parameters, `adamw` or `lion`; has an effect with `matrices` alone.

    Returns:
        The param groups that are not empty. Groups that are added to the optimizer later need `param_names` too, which
        torch requires of all groups or of none.

    Raises:
        ValueError: For a negative weight decay, a model with nothing to train, an expression that is malformed or that
            matches no trainable parameter, and an option that no optimizer of torch or distopt has; for a learning rate
            that is missing; for `mup` with `matrices`; and as `distopt.init.widths`. The optimizer checks the values of
            options.
    """
    patterns = _patterns(weight_decay, overrides := {} if overrides is None else overrides)
    check_scaling(lr, rule, independent_decay, mup is not None)
    if mup is not None and matrices is not None:
        raise ValueError(
            f"muP's table has no row for the steps of matrices={matrices!r}: give mup=None, or no matrices"
        )
    trainable = {name: param for name, param in bare_parameters(model).items() if param.requires_grad}
    if not trainable:
        raise ValueError("the model has no parameter with requires_grad=True: unfreeze what is to be trained")

    sizes = {} if mup is None else widths(model, mup)
    kinds = list(dict.fromkeys([Width(), *sizes.values()]))
    default = {True: {"weight_decay": weight_decay}, False: {"weight_decay": 0.0, "trust_ratio": False}}
    rules: dict[bool, dict[str, Any]] = {True: {}}
    if matrices is not None:
        rules = {True: {"rule": matrices}, False: {"rule": others}}
    groups: dict[tuple[str | None, bool, Width, bool], dict[str, Any]] = {
        (pattern, decays, width, hidden): default[decays] | rules[hidden] | {**options, "params": [], "param_names": []}
        for pattern, options in [(None, {}), *overrides.items()]
        for decays in (True, False)
        for width in kinds
        for hidden in rules
    }
    marked = _marked_as_not_decaying(model, trainable)
    not_hidden = {} if matrices is None else outside(model, trainable, marked)
    for name, param in trainable.items():
        first = next((pattern for pattern, regex in patterns.items() if regex.search(name)), None)
        decays = len(full_shape(param)) > 1 and name not in marked
        group = groups[first, decays, sizes.get(name, Width()), name not in not_hidden]
        group["params"].append(param)
        group["param_names"].append(name)
    _check_found(overrides, {of for (of, *_), group in groups.items() if group["params"]}, trainable)
    if lr is not None:
        for (_, _, width, _), group in groups.items():
            scale(group, width, lr, rule, independent_decay)
    made = [group for group in groups.values() if group["params"]]
    log.info(_summary(made, trainable, marked))
    if matrices is not None:
        log.info(summary(made, not_hidden))
    return made


def _patterns(weight_decay: float, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, re.Pattern[str]]:
    """Checks the arguments of `param_groups`, and returns the compiled patterns of the overrides."""
    BOUNDS["weight_decay"].check("weight_decay", weight_decay)
    OVERRIDES.check("overrides", overrides)
    patterns = {pattern: _compile(pattern) for pattern in overrides}
    for pattern, options in overrides.items():
        _check_names(pattern, options)
    return patterns


def _check_found(overrides: Iterable[str], found: Container[str | None], names: Collection[str]) -> None:
    """Raises ValueError for an override that no parameter has taken."""
    for pattern in overrides:
        if pattern not in found:
            raise ValueError(
                f"no trainable parameter matches the override {pattern!r}: it is found in none of the {len(names)} "
                f"names, or an earlier override takes them all; the first names are {', '.join([*names][:5])}"
            )


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"the override {pattern!r} is not a regular expression ({error}): any text is '.*', a dot is '\\.'"
        ) from error


def _check_names(pattern: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that would do nothing or, as `initial_lr`, belongs to a schedule."""
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    known = {name for c in classes for name in inspect.signature(c).parameters} - {"params", "defaults"} | _OTHERS
    for name in options:
        if name not in known:
            near = _MEANT.get(name) or next(iter(difflib.get_close_matches(str(name), known, n=1)), None)
            hint = f"did you mean {near!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise ValueError(
                f"the override {pattern!r} has the option {name!r}, which no optimizer of torch or distopt has: {hint} "
                "(an option of another optimizer can be set in the groups that param_groups returns)"
            )


def _marked_as_not_decaying(model: nn.Module, names: Mapping[str, Tensor]) -> set[str]:
    """Returns the names of the parameters that are marked as not decaying, whatever their shape."""
    marked = {name for name, param in names.items() if getattr(param, "_no_weight_decay", False)}
    marked |= {name for name in names if _VECTORS.search(name) and _is_gain(name, names)}
    marked |= {name for name in names if re.search(r"(^|\.)D$", name) and f"{name[:-1]}A_log" in names}
    members = {id(param): name for name, param in names.items()}
    for module in model.modules():
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            wanted = set(listed())
            own = bare_parameters(module, remove_duplicate=False)
            marked |= {members[id(p)] for name, p in own.items() if name in wanted and id(p) in members}
    return marked


def _is_gain(name: str, names: Mapping[str, Tensor]) -> bool:
    """Returns False for parametrizations other than weight norm: they have an original0, but most have no original1."""
    return not name.endswith(".original0") or f"{name[:-1]}1" in names


def _summary(groups: list[dict[str, Any]], trainable: Mapping[str, Tensor], marked: set[str]) -> str:
    """Returns one line: how many parameters decay, and why the others do not."""
    decaying = {name for group in groups if group["weight_decay"] for name in group["param_names"]}
    rest = [name for name in trainable if name not in decaying]
    vectors = [name for name in rest if len(full_shape(trainable[name])) < 2]
    named = [name for name in rest if len(full_shape(trainable[name])) > 1 and name in marked]
    line = f"{len(decaying)} parameters decay, {len(rest)} do not: {len(vectors)} have fewer than two dimensions"
    if named:
        line += f", {len(named)} are marked as not decaying ({', '.join(named[:3])}{', ...' * (len(named) > 3)})"
    if others := len(rest) - len(vectors) - len(named):
        line += f", {others} by weight_decay=0"
    return line
