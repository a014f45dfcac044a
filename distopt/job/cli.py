"""The command line: Hydra's, with its errors in one line, and the words that a choice of model implies."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal import utils
from hydra._internal.hydra import Hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from distopt.job.check import check, meant
from distopt.job.config import CONF
from distopt.job.reference import aligned, help_lines
from distopt.job.schema import SCHEMA


def program(config: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], Any]]:
    """Returns a decorator like `hydra.main` for a command line over one of the configurations of conf/."""
    OmegaConf.register_new_resolver("distopt.keys", lambda _root_: help_lines(_root_), replace=True)  # of `--help`
    decorate = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)

    def decorated(function: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        # by which distopt's launchers refuse a sweep
        vars(function)["check"] = lambda cfg, processes: check(cfg, config, processes)
        return decorate(function)

    return decorated


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Around the call of a program: raises ValueError, with a message for one line, where Hydra refuses the command."""
    # hydra-core 1.3.8 (hydra/_internal/utils.py) prints errors, in up to 25 lines, and exits; for `--help` it copies
    # the configuration once for each group (hydra/_internal/hydra.py), which takes longer than all the rest.
    listed = Hydra.format_config_groups if "--hydra-help" in sys.argv else _list_groups
    with (
        _replaced(utils, "run_and_report", lambda function: function()),
        _replaced(Hydra, "format_config_groups", listed),
        _replaced(sys.modules["hydra.main"], "get_args_parser", _parser),
    ):
        try:
            yield
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(explanation(error)) from error
        except ValueError as error:
            if "Config group override" not in str(error):
                raise
            raise ValueError(_no_choice(sys.argv[1:])) from error


def _parser() -> argparse.ArgumentParser:
    """Hydra's parser of words; its flags may stand between overrides, and what it does not know is one line."""

    def refuse(message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized") and unknown.startswith("-"):
            flags = [flag for flag in (*parser._option_string_actions, "--processes") if flag.startswith("--")]
            raise ValueError(f"there is no option {unknown}{meant(unknown, flags)} distopt --help lists the commands")
        raise ValueError(message)

    parser = utils.get_args_parser()
    vars(parser).update(parse_args=parser.parse_intermixed_args, error=refuse)
    return parser


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Gives an attribute another value in its body; unittest.mock would import asyncio."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def refuse(words: list[str], processes: int | None = None) -> None:
    """Raises ValueError, without torch, for a command of `distopt.train` that every process of it would refuse.

    Args:
        words: The words of the command.
        processes: How many processes it will have; None if a launcher's configuration says.
    """

    refused: list[ValueError] = []

    @program("train")
    def checked(cfg: DictConfig) -> None:
        try:
            check(cfg, "train", processes)
        except ValueError as error:  # of which Hydra would print a line of its own
            refused.append(error)

    sys.argv = ["distopt.train", *model_words(words), "hydra.run.dir=."]  # it leaves no folder
    with explained():
        checked()
    for error in refused:
        raise error


def _list_groups(program: Hydra, wanted: Callable[[str], bool], compact: bool = True) -> str:
    """The groups of conf/ and of `--config-dir`, a line each, with their choices."""
    choices: dict[str, set[str]] = defaultdict(set)
    for source in program.config_loader.get_search_path().get_path():
        for file in Path(str(source.path).removeprefix("file://")).glob("*/*.yaml"):
            choices[file.parent.name].add(file.stem)
    listed = sorted(group for group in choices if wanted(group))
    texts = {group: ", ".join(sorted(choices[group])) for group in listed}
    return "".join(aligned(f"{group}:", text, 12, f"{group}: {text}") + "\n" for group, text in texts.items())


def _no_choice(words: list[str]) -> str:
    """What to say of a command with a group that is set to null, a number or a boolean; Hydra does not say which."""
    groups = {folder.name: folder for folder in CONF.iterdir() if folder.is_dir()}
    for word in words:
        group, _, value = word.partition("=")
        if group in groups and re.fullmatch(r"(null|true|false|[-+.\d].*)?", value, re.IGNORECASE):
            choices = ", ".join(sorted(file.stem for file in groups[group].glob("*.yaml")))
            return f"{word}: {group} takes the name of one of its choices: {choices}"
    return "a group takes the name of one of its choices, as sam=on"


def explanation(error: Exception) -> str:
    """What Hydra or OmegaConf refuses, with the likely intention and the choices."""
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
        paths = [path for path in SCHEMA if path.endswith(f".{cause.key}") and path != found[1]]
        likely = f": did you mean {' or '.join(paths)}?" if paths else meant(str(cause.key), keys)  # of `steps=10`
        group = found[1].rpartition(".")[0]
        if not keys:
            return f"there is no {found[1]}: what is chosen for {group} has no keys"
        if found[1] in SCHEMA:  # data.path of `data=mixture`
            likely = f" in this choice of {group}."
        return f"there is no {found[1]}{likely} There are {', '.join(sorted(keys))}"
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key or 'the configuration'}: {str(error).splitlines()[0]}"
    return f"{error} {cause or ''}"


NAME = SCHEMA["name"]
HINT = """as "data.path='~/book.txt'\""""


def model_words(words: list[str]) -> list[str]:
    """The words of a command, extended by what those about a model imply, which Hydra's merging cannot express.

    `model.path=` chooses model=pretrained unless a model is chosen: the sizes of the default model are not those of the
    folder. `model.config` takes any option of a family; with `model.family=`, `model.config={...}` replaces the options
    of the choice, and without it is merged over them. `train.epochs=` takes the place of the default `train.steps`.

    Raises:
        ValueError: For a name of a run that leads out of runs/.
    """
    for word in words:
        key, _, value = word.partition("=")
        if key == "name" and "," not in value:
            NAME.bound.check("name", value.strip("'\""))  # here: Hydra makes the folder before anything can refuse it
    config = ("model.config=", "model.config.")
    family = any(word.startswith("model.family=") for word in words)
    path = [word for word in words if word.startswith("model.path=")][-1:]
    chosen = any(word.startswith("model=") for word in words) or path in ([], ["model.path="], ["model.path=null"])
    keys = [word.partition("=")[0] for word in words]
    counted = "train.steps" in keys or "train.epochs" not in keys or "train.epochs=null" in words
    implied: list[str] = []
    for word, key in zip(words, keys):  # beside the word that implies them: flags of Hydra divide a command in two
        implied += ["model=pretrained"] if key == "model.path" and not chosen else []
        implied += ["train.steps=null"] if key == "train.epochs" and not counted else []
        implied += ["~model.config"] if family and word.startswith("model.config={") else []
        implied.append(f"++{word}" if word.startswith(config) else word)
    return implied
