"""Data that is refused in one line, and the defaults of conf/data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from distopt.data import token_cache
from distopt.data.text_data import TextData

CONF = Path(__file__).parent.parent / "conf" / "data"


# Errors


def _not_utf8(path: Path) -> Path:
    path.with_suffix(".txt").write_bytes(b"abc\xe9")
    return path.with_suffix(".txt")


def _jsonl(content: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.with_suffix(".jsonl").write_text(content, encoding="utf-8")
        return path.with_suffix(".jsonl")

    return make


def _file(content: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_text(content, encoding="utf-8")
        return path

    return make


def _folder(path: Path) -> Path:
    path.mkdir()
    (path / "image.png").write_bytes(b"\x89PNG")
    return path


def _dataset_without_rows(path: Path) -> Path:
    """What `save_to_disk` leaves of a dataset of no rows."""
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"_data_files": [], "_fingerprint": "0"}))
    (path / "dataset_info.json").write_text("{}")
    return path


def _dataset_without_state(path: Path) -> Path:
    _dataset_without_rows(path)
    (path / "state.json").write_text("{}")
    (path / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    return path


BAD_INPUT = [
    ("nowhere", lambda path: path, {}, r"does not exist; give a file or folder"),
    ("empty file", _file(""), {}, r"contains no non-empty text file; give another path"),
    ("folder without text", _folder, {}, r"contains no non-empty text file ending in \('\.txt', .*; give another path"),
    ("not UTF-8", _not_utf8, {}, r"source\.txt is not UTF-8 at byte 3; convert it"),
    ("not JSON", _jsonl('{"text": "a"}\n{"text": '), {}, r"source\.jsonl:2 is not UTF-8 JSON \("),
    ("no field", _jsonl('{"body": "a"}'), {}, r"source\.jsonl:1 has no text under 'text' \(found: body\); give field="),
    ("not text", _jsonl('{"text": 1}'), {}, r"source\.jsonl:1 has no text under 'text'"),
    ("nested", _jsonl("[" * 99999), {}, r"source\.jsonl:1 is not UTF-8 JSON \(it is nested too deeply\)"),
    ("no rows", _dataset_without_rows, {}, r"source is a dataset without rows; give another path"),
    ("not a state", _dataset_without_state, {}, r"source is not a folder that datasets' save_to_disk wrote \(KeyError"),
    ("no object", _jsonl("[1]"), {}, r"source\.jsonl:1 has no text under 'text' \(found: list\)"),
    ("only empty text", _jsonl('{"text": ""}'), {}, r"contains no text; give another path"),
    ("no dataset", _folder, {"format": "datasets"}, r"is not a folder that datasets' save_to_disk wrote"),
    ("no tokenizer", _file("words"), {"tokenizer": "/no/such"}, r"tokenizer /no/such is not a folder with tokenizer"),
    ("other folder", _file("words"), {"tokenizer": str(CONF)}, r"data.tokenizer: .*conf/data has no tokenizer"),
    (
        "fraction 0",
        _file("words"),
        {"validation_fraction": 0},
        r"validation_fraction must be a number in \(0, 1\), got 0; ",
    ),
    (
        "fraction 1",
        _file("words"),
        {"validation_fraction": 1.0},
        r"validation_fraction must be a number in \(0, 1\), got 1.0",
    ),
    (
        "format",
        _file("words"),
        {"format": "xml"},
        r"format must be one of auto, ending, text, jsonl, json, csv, .*, got 'xml'",
    ),
    ("too short", _file("a"), {}, r"validation_fraction=0\.02 leaves no text for validation in .*; give more text"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "message"), [row[1:] for row in BAD_INPUT], ids=[row[0] for row in BAD_INPUT]
)
def test_bad_input(tmp_path: Path, make: Callable[[Path], Path], arguments: dict[str, str], message: str) -> None:
    path = str(make(tmp_path / "source"))
    with pytest.raises(ValueError, match=message) as caught:
        TextData(**{"path": path, "cache_dir": str(tmp_path / "c"), **arguments}).build()
    assert "\n" not in str(caught.value)


# Configuration


def choice(name: str) -> TextData:
    """The choice of the configuration, for a model that has no tokenizer of its own."""
    return instantiate(OmegaConf.create({"model": {"path": None}, "data": OmegaConf.load(CONF / f"{name}.yaml")}).data)


@pytest.mark.parametrize("name", ["text", "jsonl", "datasets"])
def test_config_says_that_it_needs_a_path(name: str) -> None:
    data = choice(name)
    with pytest.raises(
        ValueError, match=rf"format '{'ending' if name == 'text' else name}' needs a path, got None; give data.path="
    ):
        data.check()


def test_configs_hold_the_defaults() -> None:
    assert replace(choice("stdlib"), add_tokens=()) == TextData()
    other = choice("text")
    assert {**vars(other), "suffixes": tuple(other.suffixes), "add_tokens": (), "format": "auto"} == vars(TextData())


def test_import_is_cheap() -> None:
    """The job imports this before it knows which source it reads."""
    heavy = {"transformers", "datasets", "accelerate", "hydra"}
    program = f"import sys, distopt.data.text_data; print(sorted({heavy} & set(sys.modules)))"
    root = str(Path(token_cache.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
