"""The command line is Hydra's; here its errors become one line, and what it takes without a word is refused."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
from hydra._internal import utils
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from distopt.job.config import CONF


def program(config: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Returns a decorator like `hydra.main` for a command line over one of the configurations of conf/."""
    return hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around a function that `hydra.main` made: raises ValueError, in words for one line, where Hydra refuses."""
    # hydra-core 1.3.8 (hydra/_internal/utils.py) prints what goes wrong, in up to 25 lines, and exits.
    with mock.patch.object(utils, "run_and_report", lambda function: function()):
        try:
            yield
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explanation(error)) from error
        except ValueError as error:
            if "Config group override" not in str(error):
                raise
            raise ValueError(f"a group takes the name of one of its choices, as sam=on ({error})") from error


def explanation(error: Exception) -> str:
    """What Hydra means, with what was meant and what there is to choose from."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        choices = sorted(error.options or ())
        return f"{group}={choice}: there is no such {group}{meant(choice, choices)} Choose from {', '.join(choices)}"
    if isinstance(error, OverrideParseException):
        reason = error.message.splitlines()[0]
        return f"{error.override!r} is not KEY=VALUE, or has special characters that need quotes, {HINT}: {reason}"
    cause = error.__cause__
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)) and (
        found := re.match("Could not override '(.+)'", str(error))
    ):
        keys = [str(key) for key in cause.parent_node or () if key != "hydra" and not str(key).startswith("_")]
        return f"there is no {found[1]}{meant(str(cause.key), keys)} There are {', '.join(sorted(keys))}"
    return f"{error} {cause or ''}"


HINT = """as "data.path='~/book.txt'\""""


def meant(word: str, words: Iterable[str]) -> str:
    """What ends the sentence before: a question, if one of the words is near."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f": did you mean {near[0]}?" if near else "."


def model_words(words: list[str]) -> list[str]:
    """The words of a command, with what those of a model imply, which Hydra's merging does not know.

    `model.path=` chooses model=pretrained, unless a model is chosen: the sizes of the default one are not the folder's.
    `model.config` takes any option of a family; beside `model.family=`, `model.config={...}` is all of them, and by
    itself it is merged over those of the choice.
    """
    config = ("model.config=", "model.config.")
    family = any(word.startswith("model.family=") for word in words)
    path = [word for word in words if word.startswith("model.path=")][-1:]
    chosen = any(word.startswith("model=") for word in words)
    implied = [] if chosen or path in ([], ["model.path="], ["model.path=null"]) else ["model=pretrained"]
    for word in words:
        implied += ["~model.config"] if family and word.startswith("model.config={") else []
        implied.append(f"++{word}" if word.startswith(config) else word)
    return implied


def check_keys(cfg: DictConfig, conf: Path) -> None:
    """Raises ValueError for a key that nobody reads, which Hydra adds to any configuration by `+key=value`."""
    known = OmegaConf.load(conf / "train.yaml")
    assert isinstance(known, DictConfig)
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    _check_keys("", cfg, groups | known.keys() - {"defaults", "hydra"})
    for section in ("train", "evaluation", "checkpoint"):
        _check_keys(f"{section}.", cfg[section], known[section].keys())


def _check_keys(section: str, given: object, known: Iterable[object]) -> None:
    keys = sorted(map(str, known))
    for key in map(str, given) if isinstance(given, DictConfig) else ():
        if key not in keys:
            raise ValueError(f"nothing reads {section}{key}{meant(key, keys)} There are {', '.join(keys)}")
