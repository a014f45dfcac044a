"""Names on the hub in place of paths: from its cache, from a server, and what is said if they are neither."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distopt.data import hub
from distopt.data.text_data import TextData
from distopt.job.downloads import download, hub_names
from distopt.models.language_model import LanguageModel
from tests.harness.hub import COMMIT, cached, served
from tests.harness.pretrained import write_lines, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "base"
    write_model(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which has no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def rows(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(folder / name, [{"text": f"{name} {i} " * 9} for i in range(20)])
    (folder / "README.md").write_text("About the rows.")
    return folder


@pytest.mark.parametrize(
    ("value", "model", "data"),
    [
        ("me/base", True, True),
        ("me/base@v1.0", True, True),
        ("gpt2", True, False),
        ("book.txt", False, False),
        ("runs/book", False, False),  # runs/ is a folder here
        ("./me/base", False, False),
        ("/me/base", False, False),
        ("me/base/data", False, False),
        ("me/$HOME", False, False),
        ("", False, False),
    ],
)
def test_a_name_is_told_from_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, model: bool, data: bool
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (hub.is_name(value, hub.MODEL), hub.is_name(value, hub.DATA)) == (model, data)


def test_model_tokenizer_and_data_are_found_in_the_cache(cache: Path, base: Path, tmp_path: Path) -> None:
    """Without a network, by their names; the export of an adapter names the model as others find it."""
    snapshot = cached(cache, "me/base", base)
    cached(cache, "me/rows", rows(tmp_path / "files", "data/train-0.jsonl"), "dataset")
    model = LanguageModel(path="me/base")
    model.check_tokenizer("me/base")
    assert (model.path, hub.origin(snapshot)) == (snapshot, "me/base")
    corpus = TextData(path="me/rows", tokenizer="me/base", cache_dir=str(tmp_path / "c")).build()
    assert (corpus.tokenizer, corpus.source) == (str(snapshot), "jsonl: me/rows (1 files)")
    assert next((tmp_path / "c").iterdir()).name.startswith("rows-")
    assert LanguageModel(path=f"me/base@{COMMIT}").path == snapshot


def test_without_a_network_the_command_to_run_is_named(cache: Path, base: Path, tmp_path: Path) -> None:
    for make, line in (
        (
            lambda: LanguageModel(path="me/base"),
            "model.path=me/base: no such path here, and it is not with model.safetensors in the hub's cache: "
            "run `hf download me/base` where the hub can be reached",
        ),
        (
            lambda: TextData(path=str(tmp_path), tokenizer="me/base@v2").check(),
            "data.tokenizer=me/base@v2: no such path here, and it is not in the hub's cache: "
            "run `hf download me/base --revision v2` where the hub can be reached",
        ),
        (
            lambda: TextData(path="me/rows", files="*train*").check(),
            "data.path=me/rows: no such path here, and it is not in the hub's cache: run `hf download me/rows "
            "--repo-type dataset --include '*train*'` where the hub can be reached",
        ),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert str(caught.value) == line
    # A tokenizer that was downloaded alone is no model.
    (snapshot := cached(cache, "me/base", base)).joinpath("model.safetensors").unlink()
    assert hub.folder("data.tokenizer", "me/base", hub.TOKENIZER) == snapshot
    with pytest.raises(ValueError, match=r"it is not with model\.safetensors in the hub's cache"):
        LanguageModel(path="me/base")


def test_of_several_splits_one_is_chosen(cache: Path, tmp_path: Path) -> None:
    files = rows(tmp_path / "files", "data/train-0.jsonl", "data/test-0.jsonl")
    cached(cache, "me/rows", files, "dataset")
    with pytest.raises(ValueError, match=r"data.path=me/rows has files of train, test: give data.files, .*'\*train\*'"):
        TextData(path="me/rows").check()
    corpus = TextData(path="me/rows", files="*train*", cache_dir=str(tmp_path / "c")).build()
    text = corpus.decode(corpus.train)
    assert "train-0" in text and "test-0" not in text
    with pytest.raises(ValueError, match=r"no non-empty jsonl file .* whose path fits data.files=\*dev\*"):
        TextData(path="me/rows", files="*dev*", format="jsonl").check()


def test_the_first_process_of_a_machine_downloads(
    cache: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run needs, and no more: neither weights in another format nor what is there already."""
    from huggingface_hub import constants

    (tmp_path / "remote").mkdir()
    for file in base.iterdir():
        (tmp_path / "remote" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "remote" / "pytorch_model.bin").write_bytes(b"pickled")
    repositories = {
        "me/base": tmp_path / "remote",
        "datasets/me/rows": rows(tmp_path / "files", "train.jsonl", "test.jsonl"),
    }
    cfg = OmegaConf.create(
        {
            "model": {"path": "me/base"},
            "data": {"path": "me/rows", "files": "*train*", "tokenizer": "${model.path}", "validation_path": None},
        }
    )
    with served(repositories) as (address, requests):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("LOCAL_RANK", "1")
        with pytest.raises(ValueError, match="run `hf download me/base` where"):
            download(hub_names(cfg))
        assert requests == []
        monkeypatch.setenv("LOCAL_RANK", "0")
        lines = download(hub_names(cfg))
        assert lines == [f"{name} is commit {COMMIT[:12]} of the hub" for name in ("me/base", "me/rows")]
        got = {request.split("/")[-1] for request in requests if request.startswith("GET") and "/resolve/" in request}
        assert got == {file.name for file in base.iterdir()} | {"train.jsonl"}
        before = len(requests)
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert download(hub_names(cfg)) == lines and len(requests) == before
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(
            ValueError, match=r"model.path=me/bsae: .* the hub has no model of this name, or it is priv"
        ):
            hub.folder("model.path", "me/bsae", hub.MODEL)
    assert os.listdir(cache)
