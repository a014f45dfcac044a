"""Names on the hub in a configuration, downloaded by one process of each machine while the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from distopt import collective
from distopt.data import hub
from distopt.job.agreement import check_agreement

_KINDS = {
    "model.path": hub.MODEL,
    "data.tokenizer": hub.TOKENIZER,
    "data.path": hub.DATA,
    "data.validation_path": hub.DATA,
}


class Name(NamedTuple):
    """A key of a configuration whose value names a repository on the hub.

    Attributes:
        key: The key.
        value: The name.
        kind: The kind of repository.
        files: Patterns of the files to download; none for those of the kind.
    """

    key: str
    value: str
    kind: hub.Kind
    files: tuple[str, ...]


def hub_names(cfg: DictConfig) -> list[Name]:
    """Returns the names on the hub in a configuration: what is no path here, and is not read from there as a stream."""
    return [name for name in _values(cfg) if isinstance(name.value, str) and hub.is_name(name.value, name.kind)]


def _values(cfg: DictConfig) -> Iterator[Name]:
    streamed = str(OmegaConf.select(cfg, "data._target_")).endswith(".StreamData")
    for key, kind in _KINDS.items():
        if streamed and kind is hub.DATA:
            continue
        files = OmegaConf.select(cfg, "data.files") if kind is hub.DATA else None
        yield Name(key, OmegaConf.select(cfg, key), kind, (files,) if files else ())
    for source, options in (OmegaConf.select(cfg, "data.sources") or {}).items():
        files = options.get("files")
        if options.get("stream") is True:
            continue
        yield Name(f"data.sources.{source}.path", options.get("path"), hub.DATA, (files,) if files else ())


def download(names: list[Name]) -> list[str]:
    """Downloads repositories: rank 0, then the first rank of each other machine; every process has to call it.

    The others wait outside of any collective, for as long as it takes.

    Args:
        names: The names, the same on every process.

    Returns:
        A line for each name, with the commit.

    Raises:
        ValueError: On every process, for a name that cannot be downloaded, or if machines have other commits of it.
    """

    def folders() -> list[Path]:
        return [hub.folder(name.key, name.value, name.kind, name.files) for name in names]

    commits = [folder.name for folder in collective.one_after_another(folders)]
    claims = {f"the commit of {name.key}={name.value}": commit for name, commit in zip(names, commits)}
    check_agreement(claims, "name one of them, as OWNER/NAME@COMMIT")
    found = dict(zip((name.value for name in names), commits))  # model and tokenizer are one
    return [f"{value} is commit {commit[:12]} of the hub" for value, commit in found.items()]
