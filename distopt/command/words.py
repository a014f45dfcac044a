"""Completion of the words of a command: groups, choices and keys of conf/, runs, and files."""

from __future__ import annotations

from pathlib import Path

from click.shell_completion import CompletionItem

# As in distopt.job.config, which imports Hydra: in the wheel conf/ is inside the package.
_INSIDE = Path(__file__).parents[1] / "conf"
CONF = _INSIDE if _INSIDE.is_dir() else Path(__file__).parents[2] / "conf"
_SECTIONS = ("train", "evaluation", "checkpoint", "param_groups")
_PATHS = ("data.path", "data.validation_path", "data.tokenizer", "model.path", "train.resume")


def completed(command: str, configured: bool, words: list[str], incomplete: str) -> list[CompletionItem]:
    """Returns how a word may go on.

    Args:
        command: The subcommand.
        configured: Whether its words are Hydra's.
        words: The words before; bash makes three of `optimizer=ad`: `optimizer`, `=` and `ad`.
        incomplete: The beginning of the word.
    """
    if not configured:
        newest = sorted(Path("runs").glob("*/config.yaml"), key=lambda file: file.stat().st_mtime, reverse=True)
        items = [CompletionItem(str(file.parent)) for file in newest if str(file.parent).startswith(incomplete)]
        return items or [CompletionItem(incomplete, type="file")]
    key, sign, value = incomplete.partition("=")
    cut = [word for word in words if word != "="]
    if not sign and cut and (words[-1] == "=" or cut[-1] in groups() or cut[-1] in _PATHS):
        return _values(cut[-1], incomplete, "")
    if sign:
        return _values(key, value, f"{key}=")
    names = [f"{name}=" for name in (*groups(), *_keys(command))]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def groups() -> dict[str, list[str]]:
    """Returns the choices of every group of the configuration."""
    folders = sorted(folder for folder in CONF.iterdir() if folder.is_dir())
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _values(key: str, value: str, before: str) -> list[CompletionItem]:
    if key in _PATHS:
        return [CompletionItem(value, type="file")]
    *chosen, begun = value.split(",")  # a sweep's values
    kept = "".join(f"{choice}," for choice in chosen)
    return [CompletionItem(f"{before}{kept}{name}") for name in groups().get(key, []) if name.startswith(begun)]


def _keys(command: str) -> list[str]:
    """Returns the keys of a file of conf/: of the plan, or of a run."""
    import yaml

    file = CONF / f"{'plan' if command == 'plan' else 'train'}.yaml"
    content = yaml.safe_load(file.read_text())
    keys = [f"{name}.{key}" for name in _SECTIONS for key in content.get(name, {}) if not key.startswith("_")]
    return [name for name, value in content.items() if not isinstance(value, dict) and name != "defaults"] + keys
