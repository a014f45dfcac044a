"""Checks a composed configuration against the schema, before anything is instantiated."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from distopt.bounds import Bound, is_number, number, shown
from distopt.job.config import CONF
from distopt.job.lengths import check_lengths
from distopt.job.schema import HYDRA, OPTIONAL, SECTIONS, find, is_ours, keys_of

_FINITE = Bound("a finite number", is_number)


def check(cfg: DictConfig, config: str, processes: int | None = None) -> None:
    """Checks every key and value of a configuration, without torch.

    Args:
        cfg: The composed configuration.
        config: The name of its file in conf/: train or plan.
        processes: How many processes a training job will have; None if that is not known.

    Raises:
        ValueError: For the first key that is unknown or missing, or whose value is outside its bound, with key, value
            and bound; then for what does not fit together.
    """
    own, groups = _own_keys(config)
    _check_choices(groups)
    _check_names("", cfg, [*own, *groups])
    # What interpolations refer to comes first: seed before model.seed, optimizer before param_groups.weight_decay.
    for name in sorted(own | groups, key=lambda name: (name in SECTIONS, name not in groups)):
        if name not in cfg:
            raise ValueError(f"{name} is missing: it is needed")
        value = _resolved(cfg, name)
        if name not in SECTIONS:
            _check_value("", name, value)
        elif not (name in OPTIONAL and not value):
            _check_section(name, value, complete=own.get(name) or {})
    if config == "train":
        check_lengths(cfg, processes)


@functools.cache
def _own_keys(config: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of a file of conf/, with their values, and the groups that it composes, with their defaults."""
    loaded: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{config}.yaml"))
    groups = {group: choice for entry in loaded.pop("defaults") if entry != "_self_" for group, choice in entry.items()}
    groups = {group: choice for group, choice in groups.items() if group in SECTIONS}
    return {name: value for name, value in loaded.items() if name not in {"hydra", *groups}}, groups


def _check_choices(groups: Iterable[str]) -> None:
    """Refuses several choices of a group, which Hydra merges into one: `optimizer=[adamw,lamb]`."""
    chosen = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    for group in groups:
        if chosen and not isinstance(chosen.get(group), str):
            raise ValueError(f"{group} takes one choice: give a single name, or sweep over several by -m")


def _resolved(cfg: DictConfig, name: str) -> Any:
    """The value of a key with its interpolations resolved, as Python's own types."""
    try:
        value = cfg[name]
        return (
            OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value
        )
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key or name} is missing: it is needed") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or name}: {str(error).splitlines()[0]}") from error


def _check_section(section: str, values: Any, complete: Mapping[str, Any]) -> None:
    """Checks the keys and values of a section; all those of `complete` have to be there."""
    if not isinstance(values, Mapping):
        hint = "; to decay nothing, set optimizer.weight_decay=0" if section == "param_groups" else ""
        raise ValueError(f"{section} must be options by name, got {shown(values)}{hint}")
    if section not in ("train", "evaluation", "checkpoint") and "_target_" not in values:
        raise ValueError(f"{section}._target_ is missing: it names what to make")
    for name in values.keys() & HYDRA:
        _check_value(section, name, values[name])
    if not is_ours(values):
        return
    _check_names(section, values, keys_of(section))
    for name in complete:
        if name not in values:
            raise ValueError(f"{section}.{name} is missing: it is needed")
    for name, value in values.items():
        _check_value(section, name, value)
    if section == "param_groups":
        _check_overrides(values.get("overrides") or {})
    if section == "model":
        _check_model("model.config", values.get("config") or {})


def _check_names(section: str, given: Mapping[Any, Any], known: Iterable[str]) -> None:
    names = sorted(known)
    for name in map(str, given):
        if name not in names and name != "hydra" and not (section and name in HYDRA):
            path = f"{section}.{name}" if section else name
            raise ValueError(f"nothing reads {path}{meant(name, names)} There are {', '.join(names)}")


def _check_value(section: str, name: str, value: object) -> None:
    key = find(section, name)
    assert key is not None, f"{section}.{name} has no row in the schema"
    key.bound.check(f"{section}.{name}" if section else name, value, key.hint)


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    """Checks the options of patterns by the bounds that the optimizer's and SAM's own options have."""
    for pattern, options in overrides.items():
        for name, value in options.items():
            key = find("sam", "rho") if name == "sam_rho" else find("optimizer", str(name))
            if key is not None and not (name == "sam_rho" and value == 0):  # a group may be left as it is
                key.bound.check(f"param_groups.overrides.{pattern}.{name}", value)


def _check_model(path: str, options: Any) -> None:
    """Refuses numbers with which no model computes: transformers checks types, but not that they are finite."""
    for name, value in options.items() if isinstance(options, Mapping) else ():
        if isinstance(value, Mapping):
            _check_model(f"{path}.{name}", value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            bound = number(0, 1) if "drop" in str(name) else _FINITE
            bound.check(f"{path}.{name}", value)


def meant(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: a question, if one of the known words is near."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else "."
